"""Compiled tails answer as uncompiled ones, and one compilation serves every patch of a kind."""

import pytest
import torch
from torch import Tensor
from toys import OwnNet, copied_state, disturb, enliven, same_state

from deltapatch.compiling import CompiledAnswers
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.patched import PatchedModel


@pytest.fixture
def model() -> PatchedModel:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    base = load_base(module, size=16)
    model = PatchedModel(base, compile=True)
    # Inductor would call a compiler of C++; what is compiled, and how often, is the same without it.
    model._joint.compiled = CompiledAnswers(backend="aot_eager")
    for seed in range(4):
        model.add_patch(f"p{seed}", disturb(Delta(modules=1).build(base, ("a", "b"), seed=seed), seed))
    return model


def _agree(model: PatchedModel, images: Tensor, names: list[str]) -> None:
    for name, answer in model.all(images, names).items():
        torch.testing.assert_close(answer, model(images, patch=name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_compilation_serves_all_patches_of_a_shape(model: PatchedModel) -> None:
    images = model.base.example(3)
    compiled = model._joint.compiled
    assert compiled is not None
    for names in (["p0", "p1"], ["p2", "p3"], ["p3", "p0"]):
        _agree(model, images, names)
        assert compiled.compilations == 1
    _agree(model, images, ["p2"])
    _agree(model, images, ["p1"])
    assert compiled.compilations == 2
    _agree(model, model.base.example(2), ["p0", "p1"])
    assert compiled.compilations == 3


@torch.no_grad()
def test_values_are_not_baked_into_the_graph(model: PatchedModel) -> None:
    images = model.base.example(3)
    before = model.all(images, ["p0"])["p0"]
    model.patches["p0"].head.weight.add_(1.0)
    assert not torch.equal(model.all(images, ["p0"])["p0"], before)
    _agree(model, images, ["p0"])


@torch.no_grad()
def test_mixed_batches_are_compiled_too_and_the_base_is_not(model: PatchedModel) -> None:
    images = model.base.example(4)
    state = copied_state(model.base.module)
    answers = model(images, patch=["p1", None, "p0", "p1"])
    assert torch.equal(answers[1], model.base.module(images)[1])
    for place, name in ((0, "p1"), (2, "p0"), (3, "p1")):
        expected = model(images, patch=name)[place]
        torch.testing.assert_close(answers[place], expected, rtol=1e-4, atol=1e-4)
    assert model._joint.compiled.compilations == 1
    assert same_state(model.base.module, state)
