"""PAINT on one task and on several: what α is chosen for, and whose weights a step starts from."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from deltapatch.base import Base
from deltapatch.data import TaskData
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.fit import fit_task
from deltapatch.fitting.interpolating import parallel_steps, sequential_steps
from deltapatch.fitting.judging import score
from deltapatch.methods.full import Full
from deltapatch.methods.interpolate import Interpolate
from deltapatch.methods.norm import Norm

CONFIG = FitConfig(epochs=1, precision="fp32", cache="off")


@pytest.fixture(scope="module")
def supporting(task: TaskData) -> Any:
    """Images that the base is asked to tell apart as well; any will do, since labels are numbers."""
    return task.val


def _renamed(task: TaskData, name: str) -> TaskData:
    return replace(task, name=name)


def test_one_task_is_judged_on_its_own_and_on_the_supporting_images(
    base: Base, task: TaskData, supporting: Any
) -> None:
    result = fit_task(base, task, Interpolate(steps=3), CONFIG, progress=False, supporting=supporting)
    figures = result.patch.info.figures
    for alpha in (0.0, 0.5, 1.0):
        patch = result.patch.as_method(Interpolate(alpha=alpha, steps=3))
        assert figures[f"interpolation/{alpha:.2f}/task"] == score(base, patch, task.val).accuracy
        own = score(base, patch, supporting, headless=True).accuracy
        assert figures[f"interpolation/{alpha:.2f}/supporting"] == own
    assert figures["validation/accuracy"] == score(base, result.patch, task.val).accuracy


def test_the_fine_tuned_end_is_the_full_methods_patch(base: Base, task: TaskData) -> None:
    full = fit_task(base, task, Full(), CONFIG, progress=False).patch
    end = fit_task(base, task, Interpolate(alpha=1.0), CONFIG, progress=False).patch
    assert all(map(torch.equal, full.state_dict().values(), end.state_dict().values()))


def test_sequential_steps_share_their_weights_and_keep_each_tasks_head(
    base: Base, task: TaskData, supporting: Any
) -> None:
    tasks = [task, _renamed(task, "again")]
    steps = list(sequential_steps(base, tasks, Interpolate(steps=3), CONFIG, supporting))
    assert [name for name, *_ in steps] == [task.name, "again"]
    _, patches, own = steps[-1]
    first, second = patches[task.name], patches["again"]
    assert all(map(torch.equal, first.parts.state_dict().values(), second.parts.state_dict().values()))
    assert torch.equal(first.head.weight, steps[0][1][task.name].head.weight)
    assert own.head is None
    assert second.info.figures["validation/accuracy"] == score(base, second, task.val).accuracy


def test_a_sequence_that_does_not_move_is_the_base(base: Base, task: TaskData) -> None:
    tasks = [task, _renamed(task, "again")]
    *_, (_, patches, own) = sequential_steps(base, tasks, Interpolate(alpha=0.0), CONFIG, None)
    untouched = score(base, Full().build(base), task.val, headless=True)
    assert score(base, own, task.val, headless=True) == untouched
    assert patches["again"].info.figures["interpolation/alpha"] == 0


def test_a_fit_starts_from_the_weights_that_it_is_given(base: Base, task: TaskData) -> None:
    """With next to no learning rate it ends there, too."""
    still = FitConfig(epochs=1, precision="fp32", cache="off", learning_rate=1e-12)
    first = fit_task(base, task, Full(), CONFIG, progress=False).patch
    again = fit_task(base, task, Full(), still, progress=False, start=first).patch
    for mine, its in zip(again.parts.parameters(), first.parts.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-7)


def test_parallel_patching_of_one_task_is_its_single_patch(
    base: Base, task: TaskData, supporting: Any
) -> None:
    ((_, patches, _),) = parallel_steps(base, [task], Interpolate(steps=3), CONFIG, supporting)
    single = fit_task(base, task, Interpolate(steps=3), CONFIG, progress=False, supporting=supporting).patch
    alpha = single.info.figures["interpolation/alpha"]
    figures = patches[task.name].info.figures
    assert figures[f"interpolation/alpha/{task.name}"] == alpha
    assert "interpolation/alpha" not in figures
    found, expected = (score(base, patch, task.val) for patch in (patches[task.name], single))
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_parallel_patches_add_up(base: Base, task: TaskData) -> None:
    tasks = [task, _renamed(task, "again")]
    ((_, patches, _),) = parallel_steps(base, tasks, Interpolate(alpha=0.5), CONFIG, None)
    end = fit_task(base, task, Full(), CONFIG, progress=False).patch
    for name, tensor in patches["again"].parts.named_parameters():
        if "weight" in name and tensor.ndim > 1:
            # Twice half of one difference, since both tasks are the same.
            torch.testing.assert_close(tensor, end.parts.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_statistics_are_re_estimated_on_all_tasks(base: Base, task: TaskData) -> None:
    tasks = [task, _renamed(task, "again")]
    method = Interpolate(alpha=0.5, statistics="re-estimated")
    *_, (_, patches, _) = sequential_steps(base, tasks, method, CONFIG, None)
    assert all(buffer.isfinite().all() for buffer in patches["again"].buffers())


def test_re_estimated_statistics_are_those_of_the_supporting_images_too(
    base: Base, task: TaskData, supporting: Any
) -> None:
    method = Interpolate(alpha=0.0, statistics="re-estimated")
    found = [
        fit_task(base, task, method, CONFIG, progress=False, supporting=images).patch.parts.state_dict()
        for images in (None, supporting)
    ]
    means = [name for name in found[0] if name.endswith("running_mean")]
    assert means
    assert not any(torch.equal(found[0][name], found[1][name]) for name in means)


def test_a_task_without_validation_images_is_told(base: Base, task: TaskData) -> None:
    with pytest.raises(DataError, match="no validation images"):
        list(sequential_steps(base, [replace(task, val=None)], Interpolate(), CONFIG, None))


def test_a_start_of_another_method_is_refused(base: Base, task: TaskData) -> None:
    with pytest.raises(DeltapatchError, match="cannot be the start"):
        fit_task(base, task, Full(), CONFIG, progress=False, start=Norm().build(base))
