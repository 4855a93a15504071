"""Principal components of features, exact and the same at every call."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from ..spectrum import rank_of
from ..subject import Samples

Array = NDArray[np.float64]

_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """Features expressed in the directions of their largest variance.

    Attributes:
        coordinates: shape (N, q), centred, float64; column by column of falling variance. The largest entry
            of each column by absolute value is positive, so that signs do not depend on the solver.
        variance_kept: share of the total variance that is in them, 0..1.
    """

    coordinates: Array = field(repr=False)
    variance_kept: float

    @property
    def count(self) -> int:
        """q; fewer than asked for where the features have a lower rank."""
        return self.coordinates.shape[1]


def principal_components(
    rows: NDArray[np.floating] | Samples, *, most: int | None = None, variance: float = 1.0
) -> PrincipalComponents:
    """Principal components by the eigenvalues of the smaller of the d x d scatter and the N x N Gram matrix.

    Costs O(N d min(N, d)); directions whose variance is rounding only are left out.

    Args:
        rows: features of shape (N, d), not all of them the same; never written to. Of samples the scatter
            is taken that all scores share.
        most: no more components than this.
        variance: no more components than are needed to keep this share of the variance.
    """
    subject = rows if isinstance(rows, Samples) else None
    rows = rows.rows if isinstance(rows, Samples) else rows
    mean = rows.mean(axis=0, dtype=np.float64)
    samples, width = rows.shape
    if samples <= width:
        centred = rows - mean
        matrix = centred @ centred.T
    else:
        matrix = _scatter(rows, mean) if subject is None else subject.statistics.scatter
    total = float(np.trace(matrix))
    values, vectors = _largest(matrix, most)
    cumulated = np.cumsum(values) / total
    needed = int(np.searchsorted(cumulated, variance - 1e-12)) + 1
    count = min(needed, rank_of(values[::-1], max(samples, width)))
    values, vectors = values[:count], vectors[:, :count]
    coordinates = vectors * np.sqrt(values) if samples <= width else _projected(rows, mean, vectors)
    largest = np.abs(coordinates).argmax(axis=0)
    coordinates *= np.where(coordinates[largest, np.arange(count)] < 0, -1.0, 1.0)
    return PrincipalComponents(coordinates, float(min(cumulated[count - 1], 1.0)))


def _largest(matrix: Array, most: int | None) -> tuple[Array, Array]:
    """Eigenvalues in falling order, at most so many, and their vectors in columns."""
    size = len(matrix)
    first = 0 if most is None else max(0, size - most)
    values, vectors = eigh(matrix, subset_by_index=(first, size - 1), check_finite=False)
    return values[::-1], vectors[:, ::-1]


def _scatter(rows: NDArray[np.floating], mean: Array) -> Array:
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK] - mean
        scatter += block.T @ block
    return scatter


def _projected(rows: NDArray[np.floating], mean: Array, vectors: Array) -> Array:
    starts = range(0, len(rows), _BLOCK)
    return np.concatenate([(rows[start : start + _BLOCK] - mean) @ vectors for start in starts])
