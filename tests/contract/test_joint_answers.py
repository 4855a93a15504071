"""Invariant 4 for many patches at once: folded, mixed in one batch, or alone, a patch answers the same."""

from itertools import cycle, islice

import pytest
import torch
from subjects import CLASSES, Subject
from torch import Tensor

from deltapatch.method import Method
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

# Patches of one kind run as one longer batch, for which a convolution may choose another algorithm.
TOLERANCE = 1e-4
NAMES = ("first", "second", "third", "fourth", "fifth")


@pytest.fixture(scope="module")
def model(subject: Subject, method: Method, patch: Patch) -> PatchedModel:
    """Five patches, two of them with a head of another size."""
    model = PatchedModel(subject.base)
    model.add_patch("first", patch)
    for seed, name in enumerate(NAMES[1:], start=1):
        classes = CLASSES if seed % 2 else CLASSES[:2]
        model.add_patch(name, subject.new_patch(method, seed=seed, classes=classes))
    return model


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))


@torch.no_grad()
def test_all_patches_at_once_answer_as_each_does_alone(subject: Subject, model: PatchedModel) -> None:
    answers = model.all(subject.images)
    assert list(answers) == list(NAMES)
    for name in NAMES:
        _close(answers[name], model(subject.images, patch=name))
    subject.assert_untouched()


@torch.no_grad()
def test_the_base_among_them_answers_bit_for_bit(subject: Subject, model: PatchedModel) -> None:
    answers = model.all(subject.images, ["third", None, "first"])
    assert list(answers) == ["third", None, "first"]
    assert torch.equal(answers[None], subject.answers)


@torch.no_grad()
def test_each_image_of_a_mixed_batch_is_answered_by_its_own_patch(
    subject: Subject, model: PatchedModel
) -> None:
    images = torch.cat([subject.images, subject.images.flip(0), subject.images * 0.5])
    names = ["second", "first", None, "second", "fourth", None]
    answers = model(images, patch=names)
    base = subject.base.module(images)
    for place, name in enumerate(names):
        if name is None:
            assert torch.equal(answers[place], base[place])
        else:
            _close(answers[place], model(images[place, None], patch=name)[0])
    subject.assert_untouched()


@torch.no_grad()
def test_a_mixed_batch_with_equal_shares_is_the_same(subject: Subject, model: PatchedModel) -> None:
    names = list(islice(cycle(NAMES), 10))
    images = subject.images.repeat(5, 1, 1, 1)
    for place, answer in enumerate(model(images, patch=names)):
        _close(answer, model(images[place, None], patch=names[place])[0])


@torch.no_grad()
def test_one_patch_for_all_images_of_a_mixed_batch(subject: Subject, model: PatchedModel) -> None:
    answers = model(subject.images, patch=["fifth"] * len(subject.images))
    _close(torch.stack(answers), model(subject.images, patch="fifth"))
