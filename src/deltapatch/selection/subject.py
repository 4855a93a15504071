"""What a score is computed from, checked: rows with labels, or their statistics."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import read_labels, read_probabilities, read_rows
from .score import Diagnostics, Score, SelectionError
from .statistics import Statistics, in_own_span

# What rounding may add to a value that has a hard bound.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Subject:
    """Checked input of a score, and the making of its result.

    Attributes:
        samples: N after small classes were dropped.
        width: columns.
        counts: samples of each class that is used, shape (K,).
        dropped: labels of classes that are not.
        warnings: what is known to speak against any score of this input.
        started: when reading began, so that a score's seconds include it.
    """

    samples: int
    width: int
    counts: NDArray[np.int64]
    dropped: tuple[int, ...]
    warnings: tuple[str, ...]
    started: float

    @property
    def classes(self) -> int:
        """K."""
        return len(self.counts)

    def score(
        self,
        name: str,
        value: float,
        *,
        low: float = -np.inf,
        high: float = np.inf,
        warnings: tuple[str, ...] = (),
        details: Mapping[str, float] | None = None,
    ) -> Score:
        """The result.

        Args:
            name: of the score.
            value: as computed.
            low: the value cannot be lower.
            high: the value cannot be higher.
            warnings: the score's own.
            details: the score's own figures.

        Raises:
            SelectionError: the value is not a number, or outside of its bounds by more than rounding.
        """
        slack = _ROUNDING * max(1.0, *(abs(bound) for bound in (low, high) if np.isfinite(bound)), 1.0)
        if not (low - slack <= value <= high + slack):
            raise SelectionError(
                f"{name} came out as {value:g}, but can only be {low:g} to {high:g}; the features are too"
                " badly scaled for it"
            )
        diagnostics = Diagnostics(
            self.samples,
            self.width,
            self.classes,
            self.dropped,
            self.warnings + warnings,
            time.perf_counter() - self.started,
            dict(details or {}),
        )
        return Score(name, float(min(max(value, low), high)), diagnostics)


@dataclass(frozen=True, eq=False)
class Samples(Subject):
    """Rows with labels.

    Attributes:
        rows: shape (N, width), floating, never to be written to: they may be the caller's.
        labels: shape (N,), numbered 0..K-1 without gaps.
    """

    rows: NDArray[np.floating] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)

    @cached_property
    def spanned(self) -> NDArray[np.floating]:
        """The rows; where they are fewer than the columns, in an orthonormal basis of their span, (N, N)."""
        return in_own_span(self.rows) if len(self.rows) < self.width else self.rows

    @cached_property
    def statistics(self) -> Statistics:
        """Of ``spanned``."""
        return replace(Statistics.of(self.spanned, self.labels, self.classes), width=self.width)


@dataclass(frozen=True, eq=False)
class Accumulated(Subject):
    """Statistics of rows with labels.

    Attributes:
        statistics: of the classes that are used.
    """

    statistics: Statistics = field(repr=False)


def read_samples(
    rows: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    min_count: int = 2,
    probabilities: bool = False,
) -> Samples:
    """Features (or probabilities) with labels, without classes of fewer than ``min_count`` samples.

    What was read before is taken as it is, so that several scores share the reading and the statistics.

    Raises:
        SelectionError: they cannot be read or do not belong together, or fewer than two classes are left.
    """
    started = time.perf_counter()
    if isinstance(rows, Samples):
        return _again(rows, labels, min_count, started)
    if labels is None:
        raise SelectionError("rows were given without labels; give one label for each row")
    array = read_probabilities(rows) if probabilities else read_rows(rows)
    numbers = read_labels(labels)
    if len(array) != len(numbers):
        raise SelectionError(f"{len(array)} rows and {len(numbers)} labels were given; give as many")
    counts = np.bincount(numbers)
    small = (counts > 0) & (counts < min_count)
    if small.any():
        kept = ~small[numbers]
        array, numbers = array[kept], numbers[kept]
    _check_classes(counts, min_count)
    used, numbers = np.unique(numbers, return_inverse=True)
    dropped = tuple(np.flatnonzero(small).tolist())
    warnings = _warn_dropped(dropped, min_count)
    if not probabilities:
        warnings += _warn_constant(np.ptp(array, axis=0))
    return Samples(
        len(array), array.shape[1], counts[used].astype(np.int64), dropped, warnings, started, array, numbers
    )


def read_statistics(
    features: ArrayLike | Statistics | Samples, labels: ArrayLike | None = None, *, min_count: int = 2
) -> Samples | Accumulated:
    """Features with labels, or statistics in their place; both have ``.statistics``.

    Raises:
        SelectionError: see `read_samples`.
    """
    if not isinstance(features, Statistics):
        return read_samples(features, labels, min_count=min_count)
    if labels is not None:
        raise SelectionError("statistics know their labels; leave labels out")
    started = time.perf_counter()
    counts = features.counts
    _check_classes(counts, min_count)
    kept = features if counts.min() >= min_count else features.without_small_classes(min_count)
    dropped = tuple(np.flatnonzero((counts > 0) & (counts < min_count)).tolist())
    warnings = _warn_dropped(dropped, min_count)
    # Sums of N equal numbers are off by rounding, and so is what is left around their mean.
    noise = 1e-12 * np.sqrt(kept.samples) * np.abs(kept.mean)
    warnings += _warn_constant(np.sqrt(np.maximum(np.diag(kept.scatter), 0)), noise)
    return Accumulated(kept.samples, features.width, kept.counts, dropped, warnings, started, kept)


def _again(samples: Samples, labels: ArrayLike | None, min_count: int, started: float) -> Samples:
    """The same samples for another score, whose seconds begin now."""
    if labels is not None:
        raise SelectionError("samples that were read know their labels; leave labels out")
    if samples.counts.min() < min_count:
        return read_samples(samples.rows, samples.labels, min_count=min_count)
    object.__setattr__(samples, "started", started)
    return samples


def _check_classes(counts: NDArray[np.int64], min_count: int) -> None:
    large = np.flatnonzero(counts >= min_count)
    if len(large) >= 2:
        return
    present = np.flatnonzero(counts)
    if len(present) < 2:
        found = f"one class ({present[0]})" if len(present) else "no class"
        raise SelectionError(
            f"the labels hold {found}; a score compares classes, so give images of two or more"
        )
    raise SelectionError(
        f"{len(large)} of {len(present)} classes have {min_count} samples or more; a score needs two such"
        " classes, so give more images of each"
    )


def _warn_dropped(dropped: tuple[int, ...], min_count: int) -> tuple[str, ...]:
    if not dropped:
        return ()
    named = ", ".join(map(str, dropped[:5])) + (" …" if len(dropped) > 5 else "")
    return (f"{len(dropped)} classes with fewer than {min_count} samples are left out: {named}",)


def _warn_constant(
    spread: NDArray[np.floating], noise: NDArray[np.floating] | float = 0.0
) -> tuple[str, ...]:
    """What is to be said of features that vary by no more than rounding; shapes (d,)."""
    constant = int((spread <= noise).sum())
    if constant == len(spread):
        raise SelectionError(
            "all features are constant: this model gives the same for every image, so nothing can be told"
            " apart; check its weights and its preprocessing"
        )
    return (f"{constant} of {len(spread)} features are constant",) if constant else ()
