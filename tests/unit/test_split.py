"""A model cut in two answers as the whole does, or is not cut."""

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn
from toys import Net, OwnNet, Unit, copied_state, disturb, enliven, same_state, toy_base

from deltapatch.base import Base
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.patched import PatchedModel
from deltapatch.split import split_before


def _own_base() -> Base:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    return load_base(module, size=16)


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("divergence", ["narrow.0", "wide", "wide.1", "wide.1.conv2", "classifier"])
def test_the_tail_on_the_trunks_activations_is_the_whole_model(divergence: str, images: int) -> None:
    base = _own_base()
    split = split_before(base, divergence)
    assert split is not None
    batch = base.example(images)
    assert torch.equal(split.tail(split.trunk(batch)), base.module(batch))


def test_activations_have_one_row_an_image() -> None:
    split = split_before(_own_base(), "wide")
    assert split is not None
    (activations,) = split.trunk(_own_base().example(3))
    assert activations.shape == (3, 16, 8, 8)
    assert not activations.requires_grad


@torch.no_grad()
def test_rows_of_activations_can_be_mixed_and_stored_in_any_order() -> None:
    base = _own_base()
    split = split_before(base, "wide")
    assert split is not None
    images = base.example(4)
    (activations,) = split.trunk(images)
    order = torch.tensor([2, 0, 3])
    torch.testing.assert_close(split.tail([activations[order]]), base.module(images[order]))


def test_the_trunk_does_not_run_again_in_the_tail() -> None:
    base = _own_base()
    split = split_before(base, "wide")
    assert split is not None
    activations = split.trunk(base.example())
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in base.module.named_modules()
        if name.endswith("conv1")
    ]
    split.tail(activations)
    for handle in handles:
        handle.remove()
    assert ran == ["wide.0.conv1", "wide.1.conv1", "wide.2.conv1"]


def test_gradients_reach_the_patch_through_the_tail_and_agree_with_the_whole() -> None:
    base = _own_base()
    patch = disturb(Delta(modules=1).build(base, ("a", "b"), seed=0))
    split = split_before(base, patch.sites[0].sub_blocks[0].path)
    assert split is not None
    model = PatchedModel(base)
    model.add_patch("task", patch)
    images = base.example()
    split.tail(split.trunk(images), patch).sum().backward()
    from_tail = {name: parameter.grad.clone() for name, parameter in patch.named_parameters()}
    patch.zero_grad()
    model(images, patch="task").sum().backward()
    for name, parameter in patch.named_parameters():
        torch.testing.assert_close(from_tail[name], parameter.grad)


class LongSkip(nn.Module):
    """The input of the first unit is needed again after the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Module()
        self.body.first, self.body.second = Unit(4), Unit(4)
        self.body.forward = self._run_body
        self.fc = nn.Linear(4, 5)

    def _run_body(self, x: Tensor) -> Tensor:
        return self.body.second(self.body.first(x)) * x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


@torch.no_grad()
def test_a_place_that_cannot_be_cut_is_left_for_the_module_around_it() -> None:
    torch.manual_seed(0)
    base = load_base(LongSkip().eval(), size=8)
    split = split_before(base, "body.second")
    assert split is not None
    assert split.divergence == "body"
    images = base.example(3)
    assert torch.equal(split.tail(split.trunk(images)), base.module(images))


class SkipToTheEnd(nn.Module):
    """What the stem gives is needed at the end: no one module is given all that the tail needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit, self.fc = nn.Conv2d(3, 4, 3, padding=1), Unit(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((self.unit(x) * x).mean((2, 3)))


class Repeated(nn.Module):
    """One unit runs before and after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.other = nn.Conv2d(3, 4, 3, padding=1), Unit(4), Unit(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.shared(self.other(self.shared(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "divergence"),
    [(SkipToTheEnd(), "unit"), (Repeated(), "other"), (Repeated(), "shared")],
)
def test_a_model_that_cannot_be_cut_is_not(module: nn.Module, divergence: str) -> None:
    base = load_base(module.eval(), size=8)
    assert split_before(base, divergence) is None


def test_a_place_that_does_not_exist_is_no_place_to_cut() -> None:
    assert split_before(toy_base(), "nowhere") is None


Maps = namedtuple("Maps", "low high")


class Structured(nn.Module):
    """The trunk returns a named tuple, the divergence is given a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pack, self.unpack = nn.Module(), nn.Module()
        self.pack.forward = lambda x: Maps(x, x[:, :, ::2, ::2])
        self.unpack.forward = lambda maps: maps["low"].mean((2, 3)) + maps["high"].mean((2, 3))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.pack(self.stem(x))
        return self.fc(self.unpack({"low": maps.low, "high": maps.high}))


@torch.no_grad()
def test_structures_of_tensors_are_stored_and_given_back() -> None:
    torch.manual_seed(0)
    base = load_base(Structured().eval(), size=8)
    split = split_before(base, "unpack")
    assert split is not None
    images = base.example(3)
    activations = split.trunk(images)
    assert [tuple(tensor.shape) for tensor in activations] == [(3, 4, 8, 8), (3, 4, 4, 4)]
    assert torch.equal(split.tail(activations), base.module(images))


def test_a_split_leaves_the_base_as_it_was() -> None:
    module = Net([Unit(4), Unit(4)], 4)
    base = load_base(module.train(), size=8)
    state, attributes = copied_state(module), [sorted(part.__dict__) for part in module.modules()]
    split = split_before(base, "stage.1")
    assert split is not None
    split.tail(split.trunk(base.example()))
    assert same_state(module, state)
    assert [sorted(part.__dict__) for part in module.modules()] == attributes
    assert all(part.training for part in module.modules())
