"""One option of a merge at many values, and the one that is best."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

from ..errors import DeltapatchError
from .contests import Contest, LabelledImages
from .rules import Merge
from .sources import MergeError

_MOST_VALUES = 1000


@dataclass(frozen=True)
class Sweep:
    """Values of one option, such as λ from 0 to 1."""

    option: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """``scale=0:1:0.1`` -> 0, 0.1, …, 1; ``scale=0.3,0.5`` -> these.

        Raises:
            MergeError: it is neither, or has more than a thousand values.
        """
        option, _, values = text.partition("=")
        try:
            if ":" in values:
                first, last, step = map(float, values.split(":"))
                count = floor((last - first) / step + 1e-6) + 1
                found = [round(first + index * step, 12) for index in range(min(count, _MOST_VALUES + 1))]
            else:
                found = [float(value) for value in values.split(",")]
        except (ValueError, ZeroDivisionError, OverflowError):
            found = []
        if not option or not 1 <= len(found) <= _MOST_VALUES:
            raise MergeError(
                f"a sweep is OPTION=FIRST:LAST:STEP or OPTION=VALUE,VALUE with at most {_MOST_VALUES} values,"
                f" as in scale=0:1:0.1, not '{text}'"
            )
        return cls(option.replace("-", "_"), tuple(found))

    def at(self, how: Merge, value: float) -> Merge:
        """The merge with the option at a value.

        Raises:
            MergeError: the merge has no such option, or the option no such value.
        """
        fields = {one.name for one in dataclasses.fields(how)}  # pyright: ignore[reportArgumentType]
        if self.option not in fields:
            choices = ", ".join(sorted(fields)) or "none"
            raise MergeError(f"{how.name} has no option '{self.option}' to sweep; it has {choices}")
        return dataclasses.replace(how, **{self.option: value})  # pyright: ignore[reportArgumentType, reportCallIssue, reportUnknownVariableType]


@dataclass(frozen=True)
class Swept:
    """What a sweep found on validation images.

    Attributes:
        sweep: the option and its values.
        tasks: their names.
        accuracies: for each value the accuracy on each task.
    """

    sweep: Sweep
    tasks: tuple[str, ...]
    accuracies: tuple[tuple[float, ...], ...]

    @property
    def means(self) -> tuple[float, ...]:
        """For each value the mean over the tasks."""
        return tuple(sum(row) / len(row) for row in self.accuracies)

    @property
    def best(self) -> float:
        """The value with the highest mean; the first of equals."""
        return self.sweep.values[self.means.index(max(self.means))]


def run_sweep(
    contest: Contest,
    how: Merge,
    sweep: Sweep,
    tasks: Sequence[LabelledImages],
    advance: Callable[[], object] = lambda: None,
) -> Swept:
    """Merges at every value, and says how good each is on validation images.

    Args:
        contest: what is merged.
        how: the merge; its other options hold for all values.
        sweep: the option and its values.
        tasks: validation images.
        advance: called after each value.
    """
    merges = [sweep.at(how, value) for value in sweep.values]  # all of them are checked before the work
    rows: list[tuple[float, ...]] = []
    for one in merges:
        rows.append(contest.row(contest.merged(one), tasks))
        advance()
    return Swept(sweep, tuple(task.name for task in tasks), tuple(rows))


def draw_sweep(swept: Swept, title: str, path: Path) -> None:
    """Draws accuracy over the option: a line for each task, and their mean, with the best value marked.

    Raises:
        DeltapatchError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure((6.4, 3.8), layout="constrained", dpi=150)
    axes = figure.subplots()
    values = swept.sweep.values
    for number, name in enumerate(swept.tasks):
        heights = [100 * row[number] for row in swept.accuracies]
        axes.plot(values, heights, "o-", markersize=3, linewidth=1, label=name)
    if len(swept.tasks) > 1:
        axes.plot(values, [100 * mean for mean in swept.means], color="#1c1c1c", linewidth=2, label="mean")
    axes.axvline(swept.best, color="#8a8a8a", linestyle="--", linewidth=0.9)
    axes.set_title(f"best: {swept.sweep.option} = {swept.best:g}", size=9, loc="right", parse_math=False)
    axes.set_xlabel(swept.sweep.option, parse_math=False)
    axes.set_ylabel("accuracy on validation images (%)")
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.suptitle(" ".join(title.split()), size=11, parse_math=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise DeltapatchError(f"{path}: the picture cannot be written ({error.strerror})") from error
