"""TMI: how much variety the features keep inside the classes."""

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.special import digamma

from ..drawing import stratified
from ..score import Score, SelectionError, ranking_score
from ..subject import Samples, read_samples

Array = NDArray[np.float64]
Estimator = Literal["entropy", "variance"]

# Points of a class whose neighbours are looked up, and how many of them at once.
_QUERIES = 1000
_BLOCK = 256
_FLOOR = 1e-6
# Spread, relative to the largest, below which a feature is constant.
_CONSTANT = 1e-12


@ranking_score("features")
def tmi(
    features: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    estimator: Estimator = "entropy",
    neighbours: int = 3,
    seed: int = 0,
) -> Score:
    """Transferability by intra-class variety, the conditional entropy H(F | Y) (Xu & Kang, "Fast and Accurate
    Transferability Measurement by Evaluating Intra-class Feature Variance", ICCV 2023). Written from the
    formula alone.

    The idea is that features which do not collapse their classes are the more adaptable ones: larger is
    better, the opposite of what `gbc` and `parc` reward.

    With "entropy" the value is the entropy inside classes, in nats for each feature dimension, of features
    that are scaled by one number to a mean variance of 1 (tr S_T = d):

        TMI = 1/d Σ_k n_k/N h_k,      h_k = ψ(n_k) - ψ(κ) + d/n_k Σ_i log(2 ρ_i),

    where ρ_i is the distance, in the maximum norm, of f_i to its κ-th neighbour in its class (the estimator
    of Kozachenko and Leonenko). Without that scale and that 1/d the entropy moves by d log(scale) and ranks
    models by width and scale; it is in the details as ``entropy``. Constant features are no dimensions. The
    value has no bound: log(2πe)/2 = 1.42 is the most that features could have, but the estimate lies above
    that where neighbours are far, the more so the wider the features are (independent normal features, 25
    samples a class: 1.51, 1.83 and 2.23 for d = 8, 64 and 2048). Of models of different widths it therefore
    favours the wider; "variance" does not.
    The public code raises all distances below 1 to 1, which makes normalised features of one width all alike;
    this raises those below 1e-6 of the median, and says their share (``floored``).

    With "variance" the value is tr(S_W) / tr(S_T), the share of the variance that is inside classes, 0 to 1.

    Args:
        features: shape (N, d).
        labels: integers, shape (N,). Classes need more than ``neighbours`` samples for the entropy.
        estimator: "entropy" or "variance"; values of the two cannot be compared.
        neighbours: κ.
        seed: draws the 1000 samples of a class whose neighbours are looked up where it has more.

    Raises:
        SelectionError: the features cannot be scored (`read_samples`), or fewer than one neighbour is asked
            for.

    Example:
        >>> points = [[0.0], [1.0], [3.0], [7.0]]
        >>> tmi([*points, *points], [0] * 4 + [1] * 4, neighbours=1).diagnostics.details["entropy"]
        3.046340899313237
    """
    if neighbours < 1:
        raise SelectionError(f"tmi got neighbours={neighbours}; give 1 or more")
    if estimator not in get_args(Estimator):
        raise SelectionError(f"tmi got estimator={estimator!r}; give one of {', '.join(get_args(Estimator))}")
    if estimator == "variance":
        subject = read_samples(features, labels)
        within, total = _squared_lengths(subject)
        return subject.score("tmi variance", within / total, low=0, high=1)
    subject = read_samples(features, labels, min_count=neighbours + 1)
    return _entropy(subject, neighbours, seed)


def _entropy(subject: Samples, neighbours: int, seed: int) -> Score:
    distances = [_neighbour_distances(rows, neighbours, seed) for rows in _class_rows(subject)]
    together = np.concatenate(distances)
    spread = np.ptp(subject.rows, axis=0)
    dimensions = int((spread > _CONSTANT * spread.max()).sum())
    # The standard deviation of a feature, by which the scaled ones are divided.
    scale = float(np.sqrt(_squared_lengths(subject)[1] / (subject.samples * dimensions)))
    apart = together[together > 0]
    floor = _FLOOR * (float(np.median(apart)) if len(apart) else scale)
    logarithms = np.array([np.log(2 * np.maximum(found, floor)).mean() for found in distances])
    per_class = digamma(subject.counts) - digamma(neighbours) + dimensions * logarithms
    entropy = float(per_class @ subject.counts) / subject.samples
    floored = float((together < floor).mean())
    warnings: tuple[str, ...] = ()
    if floored > 0:
        warnings += (
            f"{floored:.1%} of the samples have {neighbours} others of their class at the same place",
        )
    if len(together) < subject.samples:
        warnings += (f"{_QUERIES} samples, drawn at random, stand for each class that has more",)
    details = {
        "entropy": entropy,
        "dimensions": dimensions,
        "neighbours": neighbours,
        "floored": floored,
        "queried": len(together),
    }
    value = entropy / dimensions - float(np.log(scale))
    return subject.score("tmi", value, warnings=warnings, details=details)


def _neighbour_distances(rows: Array, neighbours: int, seed: int) -> Array:
    """From each of at most `_QUERIES` rows to its κ-th neighbour among all of them, in the maximum norm."""
    chosen = stratified(np.zeros(len(rows), np.int64), _QUERIES, seed)
    found: list[Array] = []
    for start in range(0, len(chosen), _BLOCK):
        distances = cdist(rows[chosen[start : start + _BLOCK]], rows, "chebyshev")
        # The nearest is the row itself, at distance 0.
        found.append(np.partition(distances, neighbours, axis=1)[:, neighbours].astype(np.float64))
    return np.concatenate(found)


def _squared_lengths(subject: Samples) -> tuple[float, float]:
    """Of all samples around the means of their classes, and around the mean of everything."""
    mean = subject.rows.mean(axis=0, dtype=np.float64)
    within = between = 0.0
    for rows in _class_rows(subject):
        own = rows.mean(axis=0)
        within += float(((rows - own) ** 2).sum())
        between += len(rows) * float(((own - mean) ** 2).sum())
    return within, within + between


def _class_rows(subject: Samples) -> Iterator[Array]:
    """The rows of one class after the other, raised to float64."""
    order = np.argsort(subject.labels, kind="stable")
    for members in np.split(order, np.cumsum(subject.counts)[:-1]):
        yield subject.rows[members].astype(np.float64)
