"""Invariant 4: how a patch is reached (swapped, beside others, from a stored trunk) does not change its
answer.
"""

import pytest
import torch
from subjects import Subject
from torch import Tensor

from deltapatch.method import Method
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.split import split_before
from deltapatch.trace import record

# A convolution may choose another algorithm for another batch size.
TOLERANCE = 1e-4


@torch.no_grad()
def test_a_patch_answers_the_same_twice(subject: Subject, patch: Patch) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    assert torch.equal(model(subject.images, patch="task"), model(subject.images, patch="task"))


@torch.no_grad()
def test_two_patches_answer_in_turn_as_each_does_alone(
    subject: Subject, method: Method, patch: Patch
) -> None:
    """They have different numbers of classes: each answers with its own head."""
    other = subject.new_patch(method, seed=1, classes=("one", "two"))
    model = PatchedModel(subject.base)
    model.add_patch("first", patch)
    model.add_patch("second", other)
    alone = {"first": subject.answer(patch), "second": subject.answer(other), None: subject.answers}
    assert alone["first"].shape[1] != alone["second"].shape[1]
    for name in ("first", "second", None, "first", None, "second", "second"):
        assert torch.equal(model(subject.images, patch=name), alone[name])


@torch.no_grad()
def test_a_patch_that_is_deleted_and_added_again_answers_the_same(subject: Subject, patch: Patch) -> None:
    model = PatchedModel(subject.base)
    for _ in range(2):
        model.add_patch("task", patch)
        assert torch.equal(model(subject.images, patch="task"), subject.answer(patch))
        model.delete_patch("task")


@torch.no_grad()
def test_an_inner_selection_wins_and_the_outer_one_comes_back(
    resnet18: Subject, method: Method, resnet18_patch: Patch
) -> None:
    other = resnet18.new_patch(method, seed=1)
    model = PatchedModel(resnet18.base)
    model.add_patch("outer", resnet18_patch)
    model.add_patch("inner", other)

    def plain_call() -> Tensor:
        return resnet18.base.module(resnet18.images)

    with model.active("outer"):
        with model.active("inner"):
            assert torch.equal(plain_call(), resnet18.answer(other))
            with model.disable_patches():
                assert torch.equal(plain_call(), resnet18.answers)
        assert torch.equal(plain_call(), resnet18.answer(resnet18_patch))
        assert torch.equal(model(resnet18.images, patch="inner"), resnet18.answer(other))
    resnet18.assert_untouched()


@torch.no_grad()
def test_a_batch_is_answered_as_its_images_are_one_by_one(subject: Subject, patch: Patch) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    together = model(subject.images, patch="task")
    single = torch.cat([model(image[None], patch="task") for image in subject.images])
    torch.testing.assert_close(single, together, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_the_tail_on_stored_trunk_activations_answers_as_the_whole_model(
    subject: Subject, patch: Patch
) -> None:
    split = split_before(subject.base, _divergence(subject, patch))
    if split is None:
        pytest.skip(f"{subject.base.name} cannot be split; it runs whole")
    assert torch.equal(split.tail(split.trunk(subject.images)), subject.answers)
    assert torch.equal(split.tail(split.trunk(subject.images), patch), subject.answer(patch))
    subject.assert_untouched()


@torch.no_grad()
def test_two_patches_share_one_trunk(subject: Subject, method: Method, patch: Patch) -> None:
    split = split_before(subject.base, _divergence(subject, patch))
    if split is None:
        pytest.skip(f"{subject.base.name} cannot be split; it runs whole")
    other = subject.new_patch(method, seed=1)
    activations = split.trunk(subject.images)
    for each in (patch, other, patch):
        assert torch.equal(split.tail(activations, each), subject.answer(each))


def _divergence(subject: Subject, patch: Patch) -> str:
    """The first module in the order of the forward pass that the patch touches."""
    touched = {*patch.touches(), subject.base.anatomy.head.path}
    trace, _ = record(subject.base.module, subject.images)
    return next(call.path for call in trace.calls if call.path in touched)
