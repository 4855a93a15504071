"""How well a linear classifier on the features does on images that it has not seen."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh

from ..score import Score, ranking_score
from ..spectrum import rank_of
from ..statistics import Array
from ..subject import Samples, read_samples

# Penalties in units of the mean squared length of a centred row.
_PENALTIES = np.logspace(-6, 2, 17)
# A sample that a smoother follows by more than this has no prediction without itself.
_LARGEST_LEVERAGE = 1 - 1e-9


@ranking_score("features")
def linear_probe(features: ArrayLike | Samples, labels: ArrayLike | None = None) -> Score:
    """The leave-one-out accuracy of ridge regression on the classes' indicators: what every other score has
    to beat, and in the unit that users think in.

    With H the matrix that maps targets to fitted values, intercept included, the prediction for a sample by
    the fit without it is y - (y - ŷ) / (1 - H_ii) (Allen's PRESS, 1974), so one eigendecomposition serves
    all samples and penalties. The penalty with the smallest squared error of these predictions is taken;
    the one choice among 17 makes the value a little optimistic. In 0..1.

    Args:
        features: shape (N, d), any floating dtype.
        labels: integers of shape (N,).

    Raises:
        SelectionError: the input cannot be scored.

    Example:
        >>> linear_probe([[0.0], [0.2], [1.0], [1.2]], [0, 0, 1, 1]).value
        1.0
    """
    subject = read_samples(features, labels)
    targets = np.eye(subject.classes)[subject.labels]
    centred_targets = targets - targets.mean(axis=0)
    left, eigenvalues = _left_vectors(subject)
    penalties = _PENALTIES * float(eigenvalues.sum()) / subject.samples
    shrinking = eigenvalues[:, None] / (eigenvalues[:, None] + penalties)
    leverages = np.minimum((left**2) @ shrinking + 1 / subject.samples, _LARGEST_LEVERAGE)
    projected = left.T @ centred_targets
    best_error, best, accuracy = np.inf, 0, 0.0
    for number in range(len(penalties)):
        fitted = left @ (shrinking[:, number, None] * projected)
        residuals = (centred_targets - fitted) / (1 - leverages[:, number, None])
        error = float(np.einsum("nk,nk->", residuals, residuals)) / subject.samples
        if error < best_error:
            predicted = (targets - residuals).argmax(axis=1)
            best_error, best, accuracy = error, number, float((predicted == subject.labels).mean())
    return subject.score(
        "linear_probe",
        accuracy,
        low=0,
        high=1,
        details={"squared_error": best_error, "penalty": float(_PENALTIES[best])},
    )


def _left_vectors(subject: Samples) -> tuple[Array, NDArray[np.float64]]:
    """Left singular vectors of the centred rows, (N, r), and their squared singular values, (r,)."""
    rows, mean = subject.spanned, subject.statistics.mean
    if subject.samples <= rows.shape[1]:
        centred = rows - mean
        values, vectors = eigh(centred @ centred.T, check_finite=False)
        rank = rank_of(values, subject.samples)
        return vectors[:, len(values) - rank :], values[len(values) - rank :]
    values, directions = eigh(subject.statistics.scatter, check_finite=False)
    rank = rank_of(values, subject.samples)
    kept = slice(len(values) - rank, None)
    left = (rows @ directions[:, kept] - mean @ directions[:, kept]) / np.sqrt(values[kept])
    return left, values[kept]
