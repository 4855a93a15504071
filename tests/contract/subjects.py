"""A base under test: what it was before anything ran on it, and the claim that it still is."""

from dataclasses import dataclass

import pytest
import torch
from families import SIZE
from torch import Tensor, nn
from toys import copied_state, disturb, same_state

from deltapatch.base import Base
from deltapatch.errors import AnatomyError
from deltapatch.method import Method
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

CLASSES = ("ant", "bee", "cat")


@dataclass(frozen=True)
class Subject:
    """A base, and what it was before anything of ours ran on it."""

    base: Base
    images: Tensor
    state: dict[str, Tensor]
    answers: Tensor
    attributes: dict[str, list[str]]
    gradients: list[bool]

    @classmethod
    def of(cls, base: Base) -> "Subject":
        images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        module = base.module
        with torch.no_grad():
            answers = module(images)
        return cls(base, images, copied_state(module), answers, _attributes(module), _gradients(module))

    @torch.no_grad()
    def assert_untouched(self) -> None:
        """The base's weights, buffers, names, flags, attributes and answers are bit for bit what they
        were.
        """
        module = self.base.module
        assert same_state(module, self.state)
        assert _attributes(module) == self.attributes
        assert _gradients(module) == self.gradients
        assert not any(part.training for part in module.modules())
        assert all(parameter.grad is None for parameter in module.parameters())
        assert torch.equal(module(self.images), self.answers)

    def new_patch(self, method: Method, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Patch:
        """A patch whose every tensor has moved away from its start."""
        return disturb(method.build(self.base, classes, seed=seed), seed)

    @torch.no_grad()
    def answer(self, patch: Patch) -> Tensor:
        """The patch's logits where nothing else is attached."""
        model = PatchedModel(self.base)
        model.add_patch("alone", patch)
        return model(self.images, patch="alone")


def _attributes(module: nn.Module) -> dict[str, list[str]]:
    """What hangs on each module's instance: a shadowed forward or a leftover of ours would show."""
    return {name: sorted(part.__dict__) for name, part in module.named_modules()}


def _gradients(module: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters()]


def patch_or_skip(subject: Subject, method: Method) -> Patch:
    try:
        return subject.new_patch(method)
    except AnatomyError as refusal:
        # A method may refuse a family; what it must not do is to leave something behind.
        subject.assert_untouched()
        pytest.skip(f"{method.name} refuses {subject.base.name}: {refusal}")
