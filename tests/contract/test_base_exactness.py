"""Invariant 1: without a patch the base answers as it always did, bit for bit, whatever was attached or
fitted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from subjects import CLASSES, Subject
from torch import Tensor, nn
from toys import disturb

from deltapatch.fitting.answering import WholeModel
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.examples import Step
from deltapatch.fitting.loop import Progress, train
from deltapatch.method import Method
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

FIT = FitConfig(epochs=1, batch_size=2, precision="fp32")


@dataclass(frozen=True)
class TwoSteps:
    """Training examples for two steps on one batch."""

    images: Tensor

    def __len__(self) -> int:
        return 2

    def epoch(self, number: int) -> Iterator[Step]:
        for _ in range(len(self)):
            yield Step([self.images], torch.tensor([0, 1]))


def _raises(error: type[BaseException]) -> Callable[..., None]:
    def raise_it(*_: object) -> None:
        raise error("on purpose")

    return raise_it


def test_a_disturbed_patch_answers_differently_from_the_base(
    subject: Subject, method: Method, patch: Patch
) -> None:
    """Otherwise every other claim here would hold of a patch that does nothing."""
    without_head = subject.new_patch(method, classes=())
    changes = not torch.equal(subject.answer(without_head), subject.answers)
    assert changes == bool(patch.touches())
    assert subject.answers.isfinite().all()
    assert not torch.equal(subject.answers[0], subject.answers[1])
    assert subject.answer(patch).shape == (2, len(CLASSES))


def test_building_and_adding_a_patch_leaves_the_base_untouched(
    subject: Subject, method: Method, patch: Patch
) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("new", subject.new_patch(method))
    subject.assert_untouched()
    assert torch.equal(model(subject.images), subject.answers)


def test_calls_with_a_patch_leave_the_base_untouched(subject: Subject, patch: Patch) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    for _ in range(2):
        model(subject.images, patch="task")
        assert torch.equal(model(subject.images), subject.answers)
        assert torch.equal(model(subject.images, patch=None), subject.answers)
    subject.assert_untouched()


def test_an_active_patch_is_gone_when_its_context_ends(subject: Subject, patch: Patch) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    with torch.no_grad(), model.active("task"):
        inside = subject.base.module(subject.images)
    assert torch.equal(inside, subject.answer(patch))
    subject.assert_untouched()


def test_every_call_while_a_patch_is_active_is_answered_for_its_own_images(
    subject: Subject, patch: Patch
) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    batches = (subject.images, subject.images.flip(0), subject.images.flip(3))
    with torch.no_grad():
        alone = [model(batch, patch="task") for batch in batches]
        with model.active("task"):
            in_a_row = [subject.base.module(batch) for batch in batches]
    assert all(map(torch.equal, in_a_row, alone))
    assert not torch.equal(alone[0], alone[2])
    subject.assert_untouched()


def test_a_default_patch_is_laid_aside_by_disable_patches(subject: Subject, patch: Patch) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    model.set_patch("task")
    assert torch.equal(model(subject.images), subject.answer(patch))
    with model.disable_patches():
        assert torch.equal(model(subject.images), subject.answers)
        assert _trainable(subject.base.module) == []
    subject.assert_untouched()


def test_deleting_a_patch_leaves_the_base_untouched(subject: Subject, patch: Patch) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    model.set_patch("task")
    model(subject.images)
    model.delete_patch("task")
    assert torch.equal(model(subject.images), subject.answers)
    subject.assert_untouched()


def test_two_training_steps_leave_the_base_untouched(subject: Subject, method: Method, patch: Patch) -> None:
    fitted = subject.new_patch(method)
    outcome = train(WholeModel(subject.base, fitted), TwoSteps(subject.images), None, FIT)
    assert not outcome.interrupted
    assert not torch.equal(subject.answer(fitted), subject.answer(patch))
    subject.assert_untouched()


def test_a_plain_optimiser_loop_in_train_mode_leaves_the_base_untouched(
    subject: Subject, method: Method, patch: Patch
) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", subject.new_patch(method))
    optimizer = torch.optim.SGD(model.patches["task"].parameters(), lr=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(subject.images, patch="task"), torch.tensor([0, 1])).backward()
        optimizer.step()
    subject.assert_untouched()
    assert torch.equal(model(subject.images), subject.answers)


def test_a_fit_that_fails_leaves_the_base_untouched(subject: Subject, method: Method, patch: Patch) -> None:
    fitted = subject.new_patch(method)
    last = subject.base.submodule(subject.base.anatomy.head.path or "")
    handle = last.register_forward_hook(_raises(RuntimeError))
    with pytest.raises(RuntimeError, match="on purpose"):
        train(WholeModel(subject.base, fitted), TwoSteps(subject.images), None, FIT)
    handle.remove()
    subject.assert_untouched()


def test_an_interrupted_fit_leaves_the_base_untouched(subject: Subject, method: Method, patch: Patch) -> None:
    fitted = subject.new_patch(method)
    stop_after_a_step = Progress(step=_raises(KeyboardInterrupt))
    outcome = train(
        WholeModel(subject.base, fitted), TwoSteps(subject.images), None, FIT, progress=stop_after_a_step
    )
    assert outcome.interrupted
    subject.assert_untouched()


def test_many_patches_add_no_module_and_no_tensor_to_the_base(resnet18: Subject, method: Method) -> None:
    model = PatchedModel(resnet18.base)
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    for number in range(5):
        model.add_patch(f"task-{number}", disturb(method.build(resnet18.base, CLASSES, seed=number)))
    assert ([name for name, _ in model.named_modules()], list(model.state_dict())) == names
    resnet18.assert_untouched()


def _trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
