"""Transfer score."""

import time

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from ..arrays import read_probabilities, read_rows
from ..score import Score, SelectionError
from ..statistics import Array
from ..subject import Subject
from ._principal import principal_components

_BLOCK = 1024
# Apart from the numbers that the same seed gives elsewhere, such as those the features were drawn with.
_DRAWS_STREAM = 2


def transfer_score(
    weights: ArrayLike,
    features: ArrayLike,
    probabilities: ArrayLike,
    *,
    components: int = 50,
    draws: int = 10,
    share: float = 0.05,
    seed: int = 0,
) -> Score:
    """Hop - M / log K - U: how good a classifier looks on a target without labels, such as after adaptation
    (Yang et al., "Can we evaluate domain adaptation models without target-domain labels?", ICLR 2024).

    U: the mean over pairs of classes of (∠(w_i, w_j) - θ₀)² with θ₀ = arccos(-1 / (K - 1)), in radians; 0
    where the weights of all classes are equally far apart. M = mean H(P_i) - H(mean P): 0 for undecided
    answers, -log K for sure and balanced ones; H(mean P) is of all images, not of mini-batches as released.
    Hop: Hopkins' statistic u / (u + w), with u the summed distances of points drawn uniformly from the
    features' bounding box to the nearest feature, and w those of as many features to their nearest other; ½
    for features that fill the box, 1 for tight clusters. It is a mean over draws on the first principal
    components, since in thousands of dimensions it is near 1 for anything; noise between seeds is about 0.02.
    All three are in the details, as "U", "M" and "Hop".

    U can be compared between models with the same K only. The value is at most 2.

    Args:
        weights: of the classifier, one row for each class, shape (K, width).
        features: of the target's images, shape (N, d).
        probabilities: what the classifier answers for them, shape (N, K), rows summing to 1.
        components: Hopkins' statistic is computed on at most so many principal components.
        draws: Hopkins' statistic is the mean of so many.
        share: of the features that are drawn each time, above 0 and at most 1; one at least.
        seed: of the draws.

    Raises:
        SelectionError: the arrays cannot be read or do not belong together, there are fewer than two classes
            or two images, a class's weights are all zero, all features are the same, or an option is not
            possible.
    """
    started = time.perf_counter()
    if components < 1 or draws < 1 or not 0 < share <= 1:
        raise SelectionError(
            f"components={components}, draws={draws} and share={share}; give 1 or more of the first two, and"
            " a share above 0 and at most 1"
        )
    heads, rows, answers = (
        read_rows(weights, "weights"),
        read_rows(features),
        read_probabilities(probabilities),
    )
    _check(heads, rows, answers)
    classes = len(heads)
    uniformity = _non_uniformity(heads.astype(np.float64))
    answers = answers / answers.sum(axis=1, keepdims=True, dtype=np.float64)
    mutual = float(entr(answers).sum(axis=1).mean() - entr(answers.mean(axis=0)).sum())
    hopkins = _hopkins(_reduced(rows, components), draws, share, seed)
    counts = np.bincount(answers.argmax(axis=1), minlength=classes).astype(np.int64)
    warnings: tuple[str, ...] = ()
    if not counts.all():
        warnings = (f"{int((counts == 0).sum())} of {classes} classes are predicted for no image",)
    subject = Subject(len(rows), rows.shape[1], counts, (), (), started)
    angle = _equal_angle(classes)
    return subject.score(
        "transfer_score",
        float(hopkins.mean()) - mutual / np.log(classes) - uniformity,
        low=-(max(angle, np.pi - angle) ** 2),
        high=2,
        warnings=warnings,
        details={
            "U": uniformity,
            "M": mutual,
            "Hop": float(hopkins.mean()),
            "Hop_deviation": float(hopkins.std()),
        },
    )


def _check(heads: NDArray[np.floating], rows: NDArray[np.floating], answers: NDArray[np.floating]) -> None:
    if len(heads) < 2:
        raise SelectionError(
            "the classifier has one class; the score compares classes, so it needs two or more"
        )
    if answers.shape[1] != len(heads):
        raise SelectionError(
            f"the classifier has weights of {len(heads)} classes, and the probabilities are of"
            f" {answers.shape[1]}; give weights of shape (classes, width)"
        )
    if len(rows) != len(answers):
        raise SelectionError(
            f"{len(rows)} rows of features and {len(answers)} of probabilities; give as many"
        )
    if len(rows) < 2:
        raise SelectionError("one image was given; the score needs two or more")
    zero = np.flatnonzero(~heads.any(axis=1))
    if len(zero):
        raise SelectionError(
            f"the weights of class {zero[0]} are all zero, so they have no direction; give others"
        )
    if not np.ptp(rows, axis=0).any():
        raise SelectionError(
            "all features are constant: this model gives the same for every image; check its weights and its"
            " preprocessing"
        )


def _equal_angle(classes: int) -> float:
    """Between any two of so many directions that are as far apart as they can be: those of a simplex."""
    return float(np.arccos(-1 / (classes - 1)))


def _non_uniformity(weights: Array) -> float:
    """U, in blocks of rows."""
    directions = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    classes, angle, total = len(weights), _equal_angle(len(weights)), 0.0
    for start in range(0, classes, _BLOCK):
        block = directions[start : start + _BLOCK]
        # Rounding can carry a cosine beyond 1, where the angle is not a number.
        deviations = (np.arccos(np.clip(block @ directions.T, -1, 1)) - angle) ** 2
        deviations[np.arange(len(block)), start + np.arange(len(block))] = 0
        total += float(deviations.sum())
    return total / (classes * (classes - 1))


def _reduced(rows: NDArray[np.floating], components: int) -> Array:
    if rows.shape[1] <= components:
        return rows.astype(np.float64)
    return principal_components(rows, most=components).coordinates


def _hopkins(points: Array, draws: int, share: float, seed: int) -> Array:
    """Hopkins' statistic of each draw, shape (draws,)."""
    from sklearn.neighbors import NearestNeighbors

    random = np.random.default_rng((seed, _DRAWS_STREAM))
    count = max(1, round(share * len(points)))
    low, high = points.min(axis=0), points.max(axis=0)
    neighbours = NearestNeighbors(n_neighbors=2).fit(points)
    values = np.zeros(draws)
    for draw in range(draws):
        uniform = random.uniform(low, high, size=(count, len(low)))
        sampled = points[random.choice(len(points), count, replace=False)]
        from_uniform = float(neighbours.kneighbors(uniform, 1)[0].sum())
        # A feature's nearest neighbour is itself, at distance 0.
        between = float(neighbours.kneighbors(sampled, 2)[0][:, 1].sum())
        values[draw] = from_uniform / (from_uniform + between)
    return values
