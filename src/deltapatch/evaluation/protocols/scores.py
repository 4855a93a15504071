"""One number for the accuracies on several tasks, and the table of all accuracies after each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import DeltapatchError
from ..wording import markdown_cell

Score = Literal["harmonic", "mean"]

BASE_ROW = "base"


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """The harmonic mean, ``n / (1/a_1 + ... + 1/a_n)``: high only where no accuracy is low.

    It is 0 where an accuracy is 0, and NaN where one was not measured. The unit stays what it was.

    Raises:
        DeltapatchError: there is no accuracy, or one is negative.

    Example:
        >>> round(harmonic_mean([68.87, 94.14]), 2)
        79.55
    """
    values = _checked(accuracies)
    if np.isnan(values).any():
        return float("nan")
    return 0.0 if (values == 0).any() else float(len(values) / (1 / values).sum())


def mean(accuracies: Sequence[float]) -> float:
    """The arithmetic mean; NaN where an accuracy was not measured.

    Raises:
        DeltapatchError: there is no accuracy, or one is negative.
    """
    return float(_checked(accuracies).mean())


def score_of(accuracies: Sequence[float], score: Score) -> float:
    """`harmonic_mean` or `mean`, by name."""
    return harmonic_mean(accuracies) if score == "harmonic" else mean(accuracies)


def distance_to_optimal(
    fine_tuned: float, base: float, patched: Sequence[float], supporting: Sequence[float]
) -> float:
    """How far one model for both tasks stays behind two models, one for each; lower is better.

    That is the mean of the fine-tuned model's accuracy on the patching task and the base's on the
    supporting task, minus the best such mean that one model reaches.

    Args:
        fine_tuned: accuracy of the fine-tuned model on the patching task.
        base: accuracy of the base on the supporting task.
        patched: accuracies of the candidates, such as one for each mixing coefficient, on the patching task.
        supporting: accuracies of the same candidates on the supporting task.

    Raises:
        DeltapatchError: there is no candidate, or not one pair of accuracies for each.
    """
    if len(patched) != len(supporting) or not len(patched):
        raise DeltapatchError(
            f"{len(patched)} accuracies on the patching task and {len(supporting)} on the supporting task"
            " were given; give one pair for each candidate, and at least one."
        )
    best = max(mean(pair) for pair in zip(patched, supporting, strict=True))
    return mean((fine_tuned, base)) - best


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """The accuracy on every task after every step of a protocol.

    Attributes:
        columns: names of the tasks: the supporting task first if there is one, then the patching tasks.
        rows: "base", then one name for each step.
        values: accuracies from 0 to 1, float64 of shape (rows, columns); NaN where nothing was measured. In
            the row "base" only the supporting task has a value: that of the base alone.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.rows), len(self.columns)):
            raise DeltapatchError(
                f"the accuracies have shape {self.values.shape}, but {len(self.rows)} rows and"
                f" {len(self.columns)} columns are named; name each of them."
            )
        if self.rows[:1] != (BASE_ROW,) or not self.columns:
            raise DeltapatchError(
                f"the first of the rows {self.rows} has to be '{BASE_ROW}', and there has to be a column."
            )
        measured = self.values[np.isfinite(self.values)]
        if np.isinf(self.values).any() or (measured < 0).any() or (measured > 1).any():
            raise DeltapatchError(
                "an accuracy of the matrix is not between 0 and 1; give parts, not percent."
            )

    @property
    def has_supporting(self) -> bool:
        """Whether the first column is the supporting task."""
        return bool(np.isfinite(self.values[0, 0]))

    def forgetting(self) -> NDArray[np.float64]:
        """What was lost: the best earlier accuracy on a task minus the present one, shape (rows, columns).

        Negative where a task was answered better than ever before; NaN where it was not measured now or
        never before.
        """
        earlier = np.fmax.accumulate(self.values, axis=0)[:-1]
        first = np.full((1, len(self.columns)), np.nan)
        return np.concatenate([first, earlier - self.values[1:]])

    def final(self) -> dict[str, float]:
        """Task -> accuracy after the last step."""
        return dict(zip(self.columns, self.values[-1].tolist(), strict=True))

    def score(self, score: Score) -> float:
        """One number for the last row, the supporting task among the others where there is one.

        "harmonic" is what the paper reports for single-task and joint patching, "mean" for sequential.
        """
        return score_of(self.values[-1].tolist(), score)

    def as_markdown(self) -> str:
        """A table of accuracies in percent, a dash where nothing was measured."""
        header = ["after", *self.columns]
        lines = [_line(header), _line(["---", *("---:" for _ in self.columns)])]
        for name, row in zip(self.rows, self.values, strict=True):
            lines.append(_line([name, *("–" if np.isnan(value) else f"{100 * value:.2f}" for value in row)]))
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_cell, cells))} |"


def _checked(accuracies: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(accuracies, np.float64)
    if not len(values) or (values < 0).any():
        raise DeltapatchError(
            f"one or more accuracies from 0 on are expected to take the mean of, but {list(accuracies)}"
            " was given."
        )
    return values
