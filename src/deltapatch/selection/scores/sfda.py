"""SFDA."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh
from scipy.special import softmax

from ..closed_form import discriminant
from ..score import Score, SelectionError, ranking_score
from ..statistics import Array, Statistics, indicator
from ..subject import Samples, read_samples

_BLOCK = 4096


@ranking_score("features")
def sfda(
    features: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    components: int | None = None,
    scaled: bool = True,
) -> Score:
    """Self-challenging Fisher discriminant analysis (Shao et al., "Not all models are equal: predicting model
    transferability in a self-challenging Fisher space", ECCV 2022): the mean probability of the true class
    under a linear discriminant, after every sample was moved towards the other classes the more, the surer
    it was.

    The paper projects on all generalised eigenvectors E of (S_T - S_W, S_W); since E Eᵀ = S_W⁻¹ exactly,
    that is linear discriminant analysis with the shrunk S_W, and one Cholesky factor does it. λ =
    max(exp(-5 λ_max(S_W)), 1e-10) shrinks both passes. ConfMix: p = softmax(softmax(δ))_y, x̃ = p x + (1 -
    p) m, with m the unweighted mean of the other classes' means. The value is in 0..1. The released code
    overwrites the caller's features; here nothing is written to.

    With fewer samples than about 3 d the value is 1 for every model, so features are then projected on their
    first N / 5 principal directions, which is said.

    Args:
        features: shape (N, d), any floating dtype.
        labels: integers of shape (N,).
        components: principal directions to project on; None decides as above, ``d`` never projects.
        scaled: scale features to tr S_T = d first, since λ depends on it; False as published.

    Raises:
        SelectionError: the input cannot be scored, or there are fewer features than components.
    """
    subject = read_samples(features, labels)
    rows, statistics, kept = _projected(subject, components)
    scale = 1.0
    if scaled:
        scale = statistics.width * statistics.samples / float(np.trace(statistics.scatter))
    within = statistics.within
    largest = scale * _largest_eigenvalue(within) / statistics.samples
    shrinkage = max(float(np.exp(-5 * largest)), 1e-10)
    labels_of_rows, parts = subject.labels, _blocks(len(rows))
    rule = discriminant(statistics, shrinkage, within)
    sureness = np.concatenate(
        [_of_true_class(softmax(rule.scores(rows[part]), axis=1), labels_of_rows[part]) for part in parts]
    )
    others = _means_of_others(statistics.class_means)
    mixed_means, mixed_within = _mixed(rows, labels_of_rows, sureness, others, statistics)
    second = discriminant(statistics, shrinkage, mixed_within, mixed_means)
    from_others = second.scores(others)
    found: list[Array] = []
    for part in parts:
        # The rule is linear up to its bias, so what it says of a mix is the mix of what it says.
        own, share = labels_of_rows[part], sureness[part, None]
        said = share * second.scores(rows[part]) + (1 - share) * from_others[own]
        found.append(_of_true_class(said, own))
    warnings: tuple[str, ...] = ()
    if kept < subject.width:
        warnings = (
            f"{subject.samples} samples for {subject.width} features: projected on {kept} principal"
            " directions",
        )
    elif subject.samples < 3 * subject.width:
        warnings = (
            f"{subject.samples} samples for {subject.width} features: the value nears 1 for all models",
        )
    return subject.score(
        "sfda",
        float(np.concatenate(found).mean()),
        low=0,
        high=1,
        warnings=warnings,
        details={"shrinkage": shrinkage, "components": kept, "sureness": float(sureness.mean())},
    )


def _projected(subject: Samples, components: int | None) -> tuple[NDArray[np.floating], Statistics, int]:
    """Rows and statistics to work on, and how many columns they have."""
    if components is None:
        few = subject.samples < 3 * subject.width
        components = min(max(subject.samples // 5, 1), subject.width) if few else subject.width
    if not 1 <= components <= subject.width:
        raise SelectionError(
            f"components is {components}, but there are {subject.width} features; give 1 to {subject.width}"
        )
    size = subject.spanned.shape[1]
    if components >= size:
        return subject.spanned, subject.statistics, components
    _, directions = eigh(subject.statistics.scatter, subset_by_index=[size - components, size - 1])
    rows = subject.spanned @ directions
    return rows, Statistics.of(rows, subject.labels, subject.classes), components


def _mixed(
    rows: NDArray[np.floating],
    labels: NDArray[np.int64],
    sureness: Array,
    others: Array,
    statistics: Statistics,
) -> tuple[Array, Array]:
    """Class means (K, d) and scatter within classes (d, d) of the mixed rows, never all in memory."""
    sums = indicator(labels, len(others), 1 - sureness).sum(axis=1)[:, None] * others
    for part in _blocks(len(rows)):
        sums += indicator(labels[part], len(others), sureness[part]) @ rows[part]
    means = sums / statistics.counts[:, None]
    within = np.zeros_like(statistics.scatter)
    for part in _blocks(len(rows)):
        own, share = labels[part], sureness[part, None]
        centred = share * rows[part]
        centred += (1 - share) * others[own] - means[own]
        within += centred.T @ centred
    return means, within


def _means_of_others(means: Array) -> Array:
    """Of each class the unweighted mean of all other classes' means, shape (K, d)."""
    return (means.sum(axis=0) - means) / (len(means) - 1)


def _largest_eigenvalue(matrix: Array) -> float:
    """Of a positive semi-definite matrix: few products with vectors where it is large."""
    if len(matrix) < 100:
        return float(np.linalg.eigvalsh(matrix)[-1])
    return float(eigsh(matrix, k=1, v0=np.ones(len(matrix)), return_eigenvectors=False)[0])


def _of_true_class(scores: Array, labels: NDArray[np.int64]) -> Array:
    """The probability of each row's own class: (N, K) -> (N,)."""
    return softmax(scores, axis=1)[np.arange(len(labels)), labels]


def _blocks(samples: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, samples, _BLOCK)]
