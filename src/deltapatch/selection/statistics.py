"""One pass over labelled features: the sums from which most scores and closed-form heads follow."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from .arrays import read_labels, read_rows
from .score import SelectionError

Array = NDArray[np.float64]

_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over N features of width d with labels 0..K-1, all float64, in O(d² + Kd) memory whatever N.

    They are kept around their own mean, so that features far from zero lose no digits. Statistics of parts of
    the data, from whatever machines, add up to those of the whole with ``+``; the classes are those that the
    labels number, so parts may lack some.

    Attributes:
        counts: samples of each class, int64 of shape (K,); 0 for a label that did not occur.
        class_sums: sum of the features of each class, shape (K, d).
        mean: of all features, shape (d,).
        scatter: Σ (f - mean)(f - mean)ᵀ, shape (d, d).
        cubic: Σ ‖f - mean‖² (f - mean), shape (d,).
        quartic: Σ ‖f - mean‖⁴; with ``cubic`` what the Ledoit–Wolf coefficient needs to be merged.
        width: d as models are compared by it; larger than the arrays' where features were turned into a basis
            of their own span (`of`).

    Example:
        >>> shards = [Statistics.of(features, labels) for features, labels in batches]
        >>> h_score(sum_of(shards)).value
    """

    counts: NDArray[np.int64]
    class_sums: Array
    mean: Array
    scatter: Array
    cubic: Array
    quartic: float
    width: int

    @classmethod
    def of(
        cls, features: ArrayLike, labels: ArrayLike, classes: int | None = None, *, compact: bool = False
    ) -> "Statistics":
        """Statistics of features in memory; blocks of them are raised to float64 one after the other.

        Args:
            features: shape (N, d), any floating dtype.
            labels: integers, shape (N,).
            classes: K; one more than the largest label where left out.
            compact: express the features in an orthonormal basis of their span where N < d. All scores that
                take statistics stay the same, and cost O(N³) instead of O(d³). Such statistics have a basis
                of their own and cannot be added.

        Raises:
            SelectionError: there are no rows, the shapes differ, or features are not finite.
        """
        rows, numbers = read_rows(features), read_labels(labels)
        if len(rows) != len(numbers):
            raise SelectionError(f"{len(rows)} rows of features and {len(numbers)} labels; give as many")
        width = rows.shape[1]
        if compact and len(rows) < width:
            rows = in_own_span(rows)
        mean = rows.mean(axis=0, dtype=np.float64)
        size = rows.shape[1]
        class_count = max(int(numbers.max()) + 1, classes or 0)
        class_sums, scatter = np.zeros((class_count, size)), np.zeros((size, size))
        cubic, quartic = np.zeros(size), 0.0
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK].astype(np.float64)
            class_sums += indicator(numbers[start : start + _BLOCK], class_count) @ block
            block -= mean
            scatter += block.T @ block
            lengths = np.einsum("nd,nd->n", block, block)
            cubic += lengths @ block
            quartic += float(lengths @ lengths)
        counts = np.bincount(numbers, minlength=class_count).astype(np.int64)
        return cls(counts, class_sums, mean, scatter, cubic, quartic, width)

    @classmethod
    def streamed(
        cls, batches: Iterable[tuple[ArrayLike, ArrayLike]], classes: int | None = None
    ) -> "Statistics":
        """Statistics of batches (features, labels) of any sizes, gathered into blocks worth a product.

        Raises:
            SelectionError: there is no batch, or one cannot be read.
        """
        total: Statistics | None = None
        waiting: list[tuple[NDArray[np.floating], NDArray[np.int64]]] = []
        for features, labels in batches:
            waiting.append((read_rows(features), read_labels(labels)))
            if sum(len(rows) for rows, _ in waiting) >= _BLOCK:
                total = _joined(total, waiting, classes)
                waiting = []
        if waiting:
            total = _joined(total, waiting, classes)
        if total is None:
            raise SelectionError("there are no features to score; give one batch or more")
        return total

    def __add__(self, other: "Statistics") -> "Statistics":
        return self._combined(other, 1)

    def __sub__(self, other: "Statistics") -> "Statistics":
        """Statistics without a part of the data that is in them."""
        return self._combined(other, -1)

    @cached_property
    def samples(self) -> int:
        """N."""
        return int(self.counts.sum())

    @cached_property
    def class_means(self) -> Array:
        """Shape (K, d); zeros for a class without samples."""
        return self.class_sums / np.maximum(self.counts, 1)[:, None]

    @cached_property
    def class_offsets(self) -> Array:
        """√n_k (μ_k - μ), shape (K, d): the rows whose Gram matrix is the scatter between classes."""
        return np.sqrt(self.counts)[:, None] * (self.class_means - self.mean)

    @cached_property
    def within(self) -> Array:
        """Σ_k Σ_{i in k} (f_i - μ_k)(f_i - μ_k)ᵀ, shape (d, d)."""
        return self.scatter - self.class_offsets.T @ self.class_offsets

    @cached_property
    def gram(self) -> Array:
        """Σ f fᵀ around zero, shape (d, d)."""
        return self.scatter + self.samples * np.outer(self.mean, self.mean)

    def without_small_classes(self, least: int) -> "Statistics":
        """Statistics of those classes alone that have at least so many samples, numbered anew from 0.

        Raises:
            SelectionError: a class has more than one sample but fewer than ``least``: sums do not tell what
                its samples add to the scatter.
        """
        stuck = np.flatnonzero((self.counts > 1) & (self.counts < least))
        if len(stuck):
            raise SelectionError(
                f"class {stuck[0]} has {self.counts[stuck[0]]} samples, and statistics cannot be freed of a"
                f" class with more than one; leave it out of the features, or ask for at least 2 instead of"
                f" {least}"
            )
        kept = self
        lonely = np.flatnonzero(self.counts == 1) if least > 1 else np.empty(0, np.int64)
        if len(lonely):
            kept = self - Statistics.of(self.class_sums[lonely], lonely, len(self.counts))
        there = kept.counts > 0
        return Statistics(
            kept.counts[there],
            kept.class_sums[there],
            kept.mean,
            kept.scatter,
            kept.cubic,
            kept.quartic,
            self.width,
        )

    def _combined(self, other: "Statistics", sign: int) -> "Statistics":
        if self.scatter.shape != other.scatter.shape:
            raise SelectionError(
                f"statistics of {len(self.mean)} and of {len(other.mean)} features cannot be added; they are"
                " of different models or were made with compact=True"
            )
        samples = self.samples + sign * other.samples
        if samples <= 0:
            raise SelectionError("no sample would be left; take away less than there is")
        classes = max(len(self.counts), len(other.counts))
        counts = _padded(self.counts, classes) + sign * _padded(other.counts, classes)
        class_sums = _padded(self.class_sums, classes) + sign * _padded(other.class_sums, classes)
        mean = (self.samples * self.mean + sign * other.samples * other.mean) / samples
        own, others = self._around(mean), other._around(mean)
        scatter, cubic = own[0] + sign * others[0], own[1] + sign * others[1]
        quartic = own[2] + sign * others[2]
        return Statistics(counts, class_sums, mean, scatter, cubic, quartic, self.width)

    def _around(self, point: Array) -> tuple[Array, Array, float]:
        """Scatter, cubic and quartic sums around another point than the mean, by the binomial theorem."""
        shift, samples = self.mean - point, self.samples
        length, trace = float(shift @ shift), float(np.trace(self.scatter))
        turned = self.scatter @ shift
        scatter = self.scatter + samples * np.outer(shift, shift)
        cubic = self.cubic + 2 * turned + (trace + samples * length) * shift
        quartic = (
            self.quartic
            + 4 * float(shift @ turned + self.cubic @ shift)
            + 2 * length * trace
            + samples * length**2
        )
        return scatter, cubic, quartic


def sum_of(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of all parts together; ``sum`` would begin with the number 0.

    Raises:
        SelectionError: there is no part.
    """
    total: Statistics | None = None
    for part in parts:
        total = part if total is None else total + part
    if total is None:
        raise SelectionError("there are no statistics to add; give one or more")
    return total


def indicator(labels: NDArray[np.int64], classes: int, weights: Array | None = None) -> csr_array:
    """The sparse matrix of shape (classes, N) whose product with rows sums them by class, weighted or not."""
    values = np.ones(len(labels)) if weights is None else weights
    return csr_array((values, (labels, np.arange(len(labels)))), shape=(classes, len(labels)))


def in_own_span(rows: NDArray[np.floating]) -> Array:
    """The rows in an orthonormal basis of their span: shape (N, min(N, d)), all inner products kept."""
    tall = rows.T.astype(np.float64)
    return np.ascontiguousarray(np.linalg.qr(tall).R.T) if len(rows) < rows.shape[1] else tall.T


def _joined(
    total: Statistics | None,
    waiting: list[tuple[NDArray[np.floating], NDArray[np.int64]]],
    classes: int | None,
) -> Statistics:
    rows, labels = zip(*waiting, strict=True)
    widths = {part.shape[1] for part in rows}
    if len(widths) > 1:
        raise SelectionError(
            f"batches have features of different widths: {', '.join(map(str, sorted(widths)))}"
        )
    found = Statistics.of(np.concatenate(rows), np.concatenate(labels), classes)
    return found if total is None else total + found


def _padded(array: NDArray, classes: int) -> NDArray:
    return np.concatenate([array, np.zeros((classes - len(array), *array.shape[1:]), array.dtype)])
