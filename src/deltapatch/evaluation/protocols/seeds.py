"""What several seeds say: the spread of a figure, and whether one method beats another beyond it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test, t

from ...errors import DeltapatchError
from ..metrics import SIGNIFICANCE, Interval, Verdict
from ..wording import percent, with_interval

MOST_FLIPS = 2**16
"""Sign flips that are tried: all there are for up to 16 units, a random choice for more."""


@dataclass(frozen=True)
class Spread:
    """The mean of a figure over several seeds, and how much it varies.

    Attributes:
        mean: arithmetic mean.
        standard_deviation: of the sample, with n - 1 in the denominator; NaN for one value.
        low: lower end of the 95 % t-interval of the mean; NaN for one value.
        high: its upper end.
        n: how many values there are.
    """

    mean: float
    standard_deviation: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more finite values.

        Raises:
            DeltapatchError: there is no value, or one is not finite.

        Example:
            >>> Spread.of([1.0, 2.0, 3.0])
            Spread(mean=2.0, standard_deviation=1.0, low=-0.484..., high=4.484..., n=3)
        """
        given = np.asarray(values, np.float64)
        if not len(given) or not np.isfinite(given).all():
            raise DeltapatchError(f"one or more finite figures are expected, but {list(values)} was given.")
        interval = _t_interval(given)
        deviation = float(given.std(ddof=1)) if len(given) > 1 else float("nan")
        return cls(interval.value, deviation, interval.low, interval.high, len(given))

    def __str__(self) -> str:
        """An accuracy from 0 to 1 in words: "79.6 % (78.1–81.0), standard deviation 1.2 over 5 seeds"."""
        if self.n == 1:
            return f"{percent(self.mean)} (one seed: its spread is not known)"
        mean = with_interval(Interval(self.mean, self.low, self.high))
        return f"{mean}, standard deviation {100 * self.standard_deviation:.1f} over {self.n} seeds"


@dataclass(frozen=True)
class SeedComparison:
    """How a figure of one method differs from another's over tasks and seeds.

    Attributes:
        difference: mean of the first method's figure minus the second's, with its 95 % t-interval; the
            interval is NaN for a single unit.
        p_value: of the sign-flip permutation test, two-sided; exact for up to 16 units.
        unit: what the units are that vary independently.
        units: how many there are.
    """

    difference: Interval
    p_value: float
    unit: Literal["task", "seed"]
    units: int

    @property
    def verdict(self) -> Verdict:
        """Whether the first method is better or worse than the second; a tie where that can be chance.

        A difference counts where zero is outside the interval and p < 0.05. With fewer than six units no
        difference, however large, has so small a p (the smallest is 2 / 2^units); then the interval decides.
        A single unit says nothing about chance, so it is a tie.

        This is about chance between tasks or seeds. Whether few test images are the reason for a difference
        is what `deltapatch.evaluation.metrics.paired_difference` says.
        """
        low, high = self.difference.low, self.difference.high
        testable = 2 / 2**self.units < SIGNIFICANCE
        if not (low > 0 or high < 0) or (testable and self.p_value >= SIGNIFICANCE):
            return "tie"
        return "better" if low > 0 else "worse"


def compare_over_seeds(
    first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float]
) -> SeedComparison:
    """Compares two methods whose figures are paired by task and seed.

    Over several tasks a task is one unit: its difference is the mean over its seeds. Seeds of one task share
    its images and whatever makes it easy for one of the methods, so they are no independent evidence that a
    method is better on tasks in general, and counting them as such gives intervals that are too narrow.
    With one task the question is about that task, and its seeds are the units (a paired t-interval).

    The test flips the sign of each unit's difference, in all ways: if the methods were the same, each
    would be as probable. It supposes no normal distribution, as the interval does.

    Args:
        first: (task, seed) -> the first method's figure, such as its accuracy.
        second: the second method's, for the same tasks and seeds.

    Raises:
        DeltapatchError: they are not for the same tasks and seeds, there are none, or one is not finite.

    Example:
        >>> compare_over_seeds({("cars", 0): 0.70, ("cars", 1): 0.72}, {("cars", 0): 0.60, ("cars", 1): 0.61})
        SeedComparison(difference=Interval(value=0.105, low=0.0414..., high=0.1685...), p_value=0.5, ...)
    """
    _check_pairs(first, second)
    differences: dict[str, list[float]] = {}
    for task, seed in sorted(first):
        differences.setdefault(task, []).append(first[task, seed] - second[task, seed])
    means = [sum(of_task) / len(of_task) for of_task in differences.values()]
    units = means if len(means) > 1 else next(iter(differences.values()))
    # Without rounding, equal differences such as 0.7 - 0.6 and 0.3 - 0.2 are not equal.
    values = np.array(units, np.float64).round(12)
    unit = "task" if len(means) > 1 else "seed"
    return SeedComparison(_t_interval(values), _sign_flip_p_value(values), unit, len(values))


def _check_pairs(first: Mapping[tuple[str, int], float], second: Mapping[tuple[str, int], float]) -> None:
    alone = sorted(first.keys() ^ second.keys())
    if alone:
        task, seed = alone[0]
        raise DeltapatchError(
            f"only one of the two methods has a figure for task '{task}' and seed {seed}; compare them on"
            " the same tasks and seeds."
        )
    if not first:
        raise DeltapatchError("there is no figure to compare; run both methods with at least one seed.")
    for figures in (first, second):
        bad = next((key for key, figure in figures.items() if not np.isfinite(figure)), None)
        if bad is not None:
            raise DeltapatchError(
                f"the figure for task '{bad[0]}' and seed {bad[1]} is {figures[bad]}, but a finite number is"
                " expected; leave the pair out or run it again."
            )


def _t_interval(values: NDArray[np.float64]) -> Interval:
    """The mean with Student's interval; NaN ends for one value. Equal values have an interval of no width."""
    centre, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(centre, float("nan"), float("nan"))
    margin = float(t.ppf(1 - SIGNIFICANCE / 2, n - 1)) * float(values.std(ddof=1)) / n**0.5
    return Interval(centre, centre - margin, centre + margin)


def _sign_flip_p_value(values: NDArray[np.float64]) -> float:
    if len(values) == 1:
        return 1.0

    def statistic(flipped: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return flipped.mean(axis=axis)

    found = permutation_test(
        (values,),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=MOST_FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
