"""Which patch answers for which task after each step."""

from typing import Any

import pytest

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.protocols import Step, Supporting, steps
from deltapatch.evaluation.protocols.steps import count_parameters, take_steps
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.watching import FitWatch
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.methods.interpolate import Interpolate


def test_a_frozen_base_gives_each_task_a_patch_of_its_own_and_keeps_the_earlier_ones(
    base: Base, make_task, config: FitConfig
) -> None:
    tasks = [make_task("pets"), make_task("cars", seed=1)]
    first, second = take_steps("sequential", base, tasks, Delta(modules=1), config, None)
    assert (first.task, second.task) == ("pets", "cars")
    assert list(first.patches) == ["pets"]
    assert list(second.patches) == ["pets", "cars"]
    assert second.patches["pets"] is first.patches["pets"]
    assert first.supporting is second.supporting is None


def test_a_patch_with_a_head_cannot_answer_for_the_base(base: Base) -> None:
    patch = Delta(modules=1).build(base, ["a", "b"], seed=0)
    with pytest.raises(DeltapatchError, match=r"after task 'pets' .* with 2 classes of its own"):
        Step("pets", {"pets": patch}, patch)


def test_ctrl_c_within_a_fit_ends_the_protocol_and_begins_no_later_task(
    base: Base, make_task, config: FitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def press_ctrl_c(self: FitWatch, epoch: int, *figures: float) -> None:
        calls.append(epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(FitWatch, "step", press_ctrl_c)
    tasks = [make_task("pets"), make_task("cars", seed=1)]
    with pytest.raises(KeyboardInterrupt):
        list(take_steps("sequential", base, tasks, Delta(modules=1), config, None))
    assert calls == [1]


def test_every_fit_is_given_the_images_of_the_base_s_own_task(
    base: Base, make_task, config: FitConfig, supporting: Supporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    fit_task = steps.fit_task

    def watched(*arguments: Any, **options: Any) -> Any:
        given.append(options.get("supporting"))
        return fit_task(*arguments, **options)

    monkeypatch.setattr(steps, "fit_task", watched)
    list(take_steps("parallel", base, [make_task("pets")], Head(), config, supporting.validation))
    assert given == [supporting.validation]


def test_shared_weights_are_counted_once_and_every_head_is_counted(base: Base) -> None:
    first, second = (Interpolate().build(base, classes, seed=0) for classes in (["a", "b"], ["c", "d", "e"]))
    own = first.num_parameters(head=False)
    # Four features and a bias for each of five classes.
    assert count_parameters({"pets": first, "cars": second}) == (own, 5 * 5)
    deltas = {name: Delta(modules=1).build(base, ["a", "b"], seed=0) for name in ("pets", "cars")}
    own = deltas["pets"].num_parameters(head=False)
    assert count_parameters(deltas) == (2 * own, 4 * 5)
    assert count_parameters({"pets": deltas["pets"], "cars": deltas["pets"]}) == (own, 2 * 5)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_methods_that_share_weights_take_their_own_steps(
    base: Base, make_task, config: FitConfig, supporting: Supporting, shared_weights, order: Any
) -> None:
    class Sharing(Delta):
        shares_weights = True

    patch = Delta(modules=1).build(base, ["a", "b"], seed=0)
    headless = Delta(modules=1).build(base, seed=0)
    given = shared_weights(("pets", {"pets": patch}, headless))
    task, method = make_task("pets"), Sharing()
    (step,) = take_steps(order, base, [task], method, config, supporting.validation)
    assert given == [(order, base, [task], method, config, supporting.validation)]
    assert (step.task, step.patches, step.supporting) == ("pets", {"pets": patch}, headless)
