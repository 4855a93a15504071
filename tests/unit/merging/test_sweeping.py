"""A sweep over one option of a merge."""

from pathlib import Path

import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.merging.contests import Contest, LabelledImages
from deltapatch.merging.merges.task_arithmetic import TaskArithmetic
from deltapatch.merging.rules import Merge
from deltapatch.merging.sweeping import Sweep, Swept, draw_sweep, run_sweep


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("scale=0:1:0.25", (0, 0.25, 0.5, 0.75, 1)),
        ("scale=0:1:0.1", tuple(round(0.1 * step, 12) for step in range(11))),
        ("scale=1:0:-0.5", (1, 0.5, 0)),
        ("scale=0:1:0.4", (0, 0.4, 0.8)),
        ("scale=0.3", (0.3,)),
        ("scale=0.3,0.5", (0.3, 0.5)),
    ],
)
def test_the_ends_are_among_the_values(text: str, values: tuple[float, ...]) -> None:
    assert Sweep.parse(text) == Sweep("scale", values)


@pytest.mark.parametrize("text", ["scale", "=0:1:0.1", "scale=0:1", "scale=0:1:0", "scale=a", "scale=0:1:-1"])
def test_what_is_no_sweep_is_told(text: str) -> None:
    with pytest.raises(DeltapatchError, match=f"as in scale=0:1:0.1, not '{text}'"):
        Sweep.parse(text)
    with pytest.raises(DeltapatchError, match="at most 1000 values"):
        Sweep.parse("scale=0:1:1e-9")


def test_other_options_stay_and_unknown_ones_are_refused() -> None:
    how = TaskArithmetic(signs=(1.0, -1.0))
    assert Sweep("scale", (0.5,)).at(how, 0.5) == TaskArithmetic(0.5, (1.0, -1.0))
    with pytest.raises(
        DeltapatchError, match="task_arithmetic has no option 'keep' to sweep; it has scale, si"
    ):
        Sweep("keep", (0.5,)).at(how, 0.5)


class Parabola(Contest):
    """Of two tasks, whose accuracies are best at 0.2 and 0.6."""

    inputs = {}  # noqa: RUF012

    def merged(self, how: Merge) -> float:
        assert isinstance(how, TaskArithmetic)
        return how.scale

    def accuracy(self, model: float, task: int, data: LabelledImages) -> float:
        return 1 - (model - (0.2, 0.6)[task]) ** 2

    def check_tasks(self, count: int) -> None:
        pass


def test_the_best_mean_is_found_and_drawn(tmp_path: Path) -> None:
    tasks = [LabelledImages(name, ("a", "b"), None) for name in ("birds", "cars $x$")]  # type: ignore[arg-type]
    steps: list[int] = []
    sweep = Sweep.parse("scale=0:1:0.1")
    found = run_sweep(Parabola(), TaskArithmetic(), sweep, tasks, lambda: steps.append(1))
    assert found.best == 0.4
    assert len(steps) == len(found.accuracies) == 11
    assert found.accuracies[0] == pytest.approx((0.96, 0.64))
    draw_sweep(found, "a $title$", tmp_path / "sweep.svg")
    assert "cars" in (tmp_path / "sweep.svg").read_text()
    with pytest.raises(DeltapatchError, match="the picture cannot be written"):
        draw_sweep(found, "a title", tmp_path / "missing" / "sweep.png")


def test_of_equals_the_first_is_taken() -> None:
    assert Swept(Sweep("scale", (0.1, 0.2)), ("a",), ((0.5,), (0.5,))).best == 0.1
