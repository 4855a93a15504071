"""Patches in one run: what is shared, what is refused, and what happens where a fold is impossible."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import OwnNet, copied_state, disturb, enliven, same_state

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patched import PatchedModel
from deltapatch.trees import tensors_in


def _base(build: Callable[[], nn.Module] = OwnNet) -> Base:
    torch.manual_seed(0)
    module = build().eval()
    enliven(module)
    return load_base(module, size=16)


def _model(base: Base, *methods: Delta | Head, each: int = 2) -> PatchedModel:
    model = PatchedModel(base)
    for kind, method in enumerate(methods):
        for number in range(each):
            patch = method.build(base, [f"c{i}" for i in range(3 + number)], seed=number)
            model.add_patch(f"{method.name}{kind}-{number}", disturb(patch, seed=kind * 10 + number))
    return model


def _agree(model: PatchedModel, images: Tensor) -> None:
    for name, answer in model.all(images).items():
        alone = model(images, patch=name)
        torch.testing.assert_close(answer, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def _count(base: Base, path: str) -> list[int]:
    """How many rows each run of a module has, from now on."""
    rows: list[int] = []
    base.submodule(path).register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows


CONFIGURATIONS = [
    Delta(modules=modules, norm=norm, start=start)
    for modules in (1, "all")
    for norm, start in (
        ("both", "zero-gain"),
        ("sum", "plain"),
        ("module", "plain"),
        ("module", "identity"),
        ("both", "identity"),
    )
]


@torch.no_grad()
@pytest.mark.parametrize("method", CONFIGURATIONS, ids=str)
def test_every_configuration_of_delta_folds(method: Delta) -> None:
    base = _base()
    model = _model(base, method, each=5)
    images = base.example(3)
    _agree(model, images)
    assert all(fold is not None and not fold.repeats_first for fold in model._joint._folds.values())
    mixed = model(images, patch=["delta0-1", "delta0-0", "delta0-1"])
    for place, name in enumerate(["delta0-1", "delta0-0", "delta0-1"]):
        torch.testing.assert_close(mixed[place], model(images, patch=name)[place], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_patches_of_several_kinds_go_separate_ways_from_one_walk_of_the_base() -> None:
    base = _base()
    model = _model(base, Delta(modules=1), Delta(modules=2), Head(), each=3)
    images = base.example(3)
    _agree(model, images)
    trunk, last = _count(base, "narrow.0.conv1"), _count(base, "wide.2.conv1")
    answers = model.all(images)
    assert len(answers) == 9
    # Once for the base, once for the three patches that begin before `narrow`.
    assert trunk == [3, 3]
    # Once for the base (the heads need its features), then three patches of each kind as one batch.
    assert sorted(last) == [3, 9, 9]


@torch.no_grad()
def test_the_trunk_runs_once_and_the_base_no_further_than_it_is_followed() -> None:
    base = _base()
    model = _model(base, Delta(modules=1), each=4)
    images = base.example(3)
    model.all(images)
    trunk, first, last = (_count(base, path) for path in ("narrow.1.conv1", "wide.0.conv1", "wide.2.conv1"))
    model.all(images)
    assert (trunk, first, last) == ([3], [3], [12])


class AddsInPlace(OwnNet):
    """Its units add in place and go on with the tensor that they had: a batch cannot grow there."""

    def __init__(self) -> None:
        super().__init__()
        for stage in (self.narrow, self.wide):
            for unit in stage:
                unit.forward = _add_in_place.__get__(unit)


def _add_in_place(unit: nn.Module, x: Tensor) -> Tensor:
    residual = unit.norm2(unit.conv2(torch.relu(unit.norm1(unit.conv1(x)))))
    residual.add_(unit.project(x))
    return torch.relu(residual)


@torch.no_grad()
def test_where_a_batch_cannot_grow_inside_a_sub_block_it_is_longer_from_the_start() -> None:
    base = _base(AddsInPlace)
    model = _model(base, Delta(modules=1), each=3)
    _agree(model, base.example(3))
    (fold,) = model._joint._folds.values()
    assert fold is not None
    assert fold.repeats_first


class ComparesItsBatch(OwnNet):
    """Its features depend on the other images of the batch, so that a longer batch is another question."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.wide(self.narrow(self.stem(x))).mean((2, 3))
        return self.classifier(features - features.mean(0))


@torch.no_grad()
def test_where_no_fold_is_right_patches_run_one_after_the_other() -> None:
    base = _base(ComparesItsBatch)
    model = _model(base, Delta(modules=1), each=3)
    images = base.example(3)
    _agree(model, images)
    assert list(model._joint._folds.values()) == [None]


@torch.no_grad()
def test_patches_in_train_mode_are_answered_as_alone() -> None:
    base = _base()
    model = _model(base, Delta(modules=1), each=2)
    images = base.example(4)
    model.train()
    found = model.all(images)
    state = copied_state(base.module)
    for name in model.patches:
        torch.testing.assert_close(found[name], model(images, patch=name))
    assert same_state(base.module, state)


@torch.no_grad()
def test_little_room_makes_small_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    base = _base()
    model = _model(base, Delta(modules=1), each=5)
    images = base.example(2)
    expected = model.all(images)
    split = next(iter(model._joint._splits.values()))
    assert split is not None
    monkeypatch.setattr("deltapatch.many._ROOM_ON_PROCESSOR", 2 * (2 * split.widest * 4 * 8))
    rows = _count(base, "wide.2.conv1")
    found = model.all(images)
    assert rows == [4, 4, 2]
    for name, answer in expected.items():
        torch.testing.assert_close(found[name], answer)


@torch.no_grad()
def test_what_is_wrong_with_a_request_is_said() -> None:
    base = _base()
    model = _model(base, Head())
    with pytest.raises(DeltapatchError, match="there is no patch named 'birds'"):
        model.all(base.example(), ["birds"])
    with pytest.raises(DeltapatchError, match="there is no patch named 'birds'"):
        model(base.example(), patch=[None, "birds"])
    with pytest.raises(DeltapatchError, match="names 1 patches, but the batch has 2 images"):
        model(base.example(), patch=["head0-0"])
    assert model.all(base.example(), []) == {}


def test_no_gradient_flows_and_none_is_asked_for() -> None:
    base = _base()
    model = _model(base, Delta(modules=1), Head())
    assert not any(answer.requires_grad for answer in model.all(base.example()).values())
    assert not any(answer.requires_grad for answer in model(base.example(), patch=["head1-0", "delta0-1"]))


@torch.no_grad()
def test_patches_follow_the_model_to_another_type() -> None:
    """What was noted about the base in the old type must not be used with the new one."""
    model = _model(_base(), Delta(modules=1), Head())
    images = model.base.example(3)
    before = model.all(images)
    model.double()
    after = model.all(images.double())
    (split,) = model._joint._splits.values()
    held = [tensor for template in split.placeholders.values() for tensor in tensors_in(template)]
    assert {tensor.dtype for tensor in held} == {torch.float64}
    assert {answer.dtype for answer in after.values()} == {torch.float64}
    for name, answer in before.items():
        torch.testing.assert_close(after[name].float(), answer, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_patch_without_a_head_returns_what_the_base_returns() -> None:
    base = _base()
    model = PatchedModel(base)
    for seed in range(3):
        model.add_patch(f"p{seed}", disturb(Delta(modules=1).build(base, seed=seed), seed))
    _agree(model, base.example(3))
