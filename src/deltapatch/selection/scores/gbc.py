"""GBC: how much the classes overlap, each seen as a Gaussian."""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..score import Score, SelectionError, ranking_score
from ..statistics import indicator
from ..subject import Samples, read_samples
from ._principal import principal_components

Array = NDArray[np.float64]
Covariance = Literal["diagonal", "spherical", "full"]

_FLOOR = 1e-8
_BLOCK_NUMBERS = 1 << 22
_SAMPLES_PER_DIMENSION = 10


@ranking_score("features")
def gbc(
    features: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    components: int | None = 64,
    covariance: Covariance = "diagonal",
) -> Score:
    """Gaussian Bhattacharyya coefficient (Pándy et al., CVPR 2022), negated.

    On principal components, each class k is a Gaussian with mean μ_k and covariance Σ_k (maximum likelihood).
    With Σ̄ = (Σ_i + Σ_j) / 2 and the Bhattacharyya distance

        D(i, j) = (μ_i - μ_j)ᵀ Σ̄⁻¹ (μ_i - μ_j) / 8 + log( |Σ̄| / √(|Σ_i| |Σ_j|) ) / 2,
        GBC = -Σ_{i≠j} exp(-D(i, j)),        -K(K-1) <= GBC <= 0.

    0 means that no classes overlap. The sum is over ordered pairs, twice that over unordered ones. The
    details give ``mean_overlap``, the mean of exp(-D) over pairs. Determinants are only ever handled as
    logarithms: public code multiplies 64 variances, which underflow against a constant that is added, and
    published values beyond the bound come from that. Variances below 1e-8 of the mean one are raised to it.
    Features may be scaled and rotated without effect.

    Args:
        features: shape (N, d).
        labels: integers, shape (N,).
        components: so many principal components are kept; None takes all.
        covariance: "diagonal" (one variance for each component and class), "spherical" (one for each class),
            or "full", which needs more than ten samples in every class for each component.

    Raises:
        SelectionError: the features cannot be scored (`read_samples`), there is no component, or classes are
            too small for full covariances.

    Example:
        >>> gbc([[-2.0], [0.0], [0.0], [2.0]], [0, 0, 1, 1]).value  # means -1 and 1, variances 1
        -1.2130613194252668
    """
    if components is not None and components < 1:
        raise SelectionError(f"gbc got components={components}; give 1 or more, or None for all")
    if covariance not in get_args(Covariance):
        raise SelectionError(
            f"gbc got covariance={covariance!r}; give one of {', '.join(get_args(Covariance))}"
        )
    subject = read_samples(features, labels)
    principal = principal_components(subject, most=components)
    coordinates, classes = principal.coordinates, subject.classes
    means = (indicator(subject.labels, classes) @ coordinates) / subject.counts[:, None]
    floored = 0.0
    if covariance == "full":
        overlap = _full_overlap(means, _covariances(subject, coordinates, means))
    else:
        variances, floored = _variances(subject, coordinates, means, spherical=covariance == "spherical")
        overlap = _diagonal_overlap(means, variances)
    pairs = classes * (classes - 1)
    details = {
        "mean_overlap": overlap / pairs,
        "components": principal.count,
        "variance_kept": principal.variance_kept,
        "floored_variances": floored,
    }
    warnings: tuple[str, ...] = ()
    if subject.samples < 3 * principal.count:
        warnings = (
            f"{subject.samples} samples are few for {principal.count} components, so overlaps come out too"
            " small; give more images or fewer components",
        )
    return subject.score("gbc", -overlap, low=-pairs, high=0, warnings=warnings, details=details)


def _variances(subject: Samples, coordinates: Array, means: Array, *, spherical: bool) -> tuple[Array, float]:
    """Of each class, shape (K, q), spherical ones with equal columns; and the share below the floor."""
    offsets = (coordinates - means[subject.labels]) ** 2
    variances = (indicator(subject.labels, subject.classes) @ offsets) / subject.counts[:, None]
    if spherical:
        variances = np.repeat(variances.mean(axis=1, keepdims=True), variances.shape[1], axis=1)
    # Where the classes have no spread at all, that of everything says how small a variance is negligible.
    floor = _FLOOR * (float(variances.mean()) or float(coordinates.var()))
    return np.maximum(variances, floor), float((variances < floor).mean())


def _diagonal_overlap(means: Array, variances: Array) -> float:
    """Σ_{i≠j} exp(-D(i, j)), a block of classes i against all j at a time."""
    classes, width = means.shape
    logarithms = np.log(variances).sum(axis=1)
    total, size = 0.0, max(1, _BLOCK_NUMBERS // (classes * width))
    for start in range(0, classes, size):
        block = slice(start, start + size)
        mean_variances = (variances[block, None] + variances) / 2
        distances = ((means[block, None] - means) ** 2 / mean_variances).sum(axis=2) / 8
        distances += np.log(mean_variances, out=mean_variances).sum(axis=2) / 2
        distances -= (logarithms[block, None] + logarithms) / 4
        coefficients = np.exp(-np.maximum(distances, 0))
        coefficients[np.arange(len(coefficients)), np.arange(classes)[block]] = 0
        total += float(coefficients.sum())
    return total


def _covariances(subject: Samples, coordinates: Array, means: Array) -> Array:
    """Of each class, shape (K, q, q), with the floor added to their diagonals."""
    width = coordinates.shape[1]
    least = _SAMPLES_PER_DIMENSION * width
    if subject.counts.min() <= least:
        raise SelectionError(
            f"the smallest class has {subject.counts.min()} samples, and full covariances of {width}"
            f" components need more than {least}; take fewer components or covariance='diagonal'"
        )
    found = np.empty((subject.classes, width, width))
    for label, mean in enumerate(means):
        offsets = coordinates[subject.labels == label] - mean
        found[label] = offsets.T @ offsets / len(offsets)
    spread = float(np.trace(found, axis1=1, axis2=2).mean()) / width
    return found + _FLOOR * (spread or float(coordinates.var())) * np.eye(width)


def _full_overlap(means: Array, covariances: Array) -> float:
    """Σ_{i≠j} exp(-D(i, j)), one class i against all later j at a time."""
    logarithms = np.linalg.slogdet(covariances)[1]
    total = 0.0
    for first in range(len(means) - 1):
        others = slice(first + 1, None)
        between = (covariances[first] + covariances[others]) / 2
        apart = (means[others] - means[first])[:, :, None]
        lengths = (apart * np.linalg.solve(between, apart)).sum(axis=(1, 2))
        halves = (logarithms[first] + logarithms[others]) / 2
        distances = lengths / 8 + (np.linalg.slogdet(between)[1] - halves) / 2
        total += 2 * float(np.exp(-np.maximum(distances, 0)).sum())
    return total
