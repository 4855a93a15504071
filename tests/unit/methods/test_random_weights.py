"""A few random weights of each channel: how many, which, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import OwnNet, copied_state, disturb, enliven, toy_base

from deltapatch.base import Base
from deltapatch.errors import AnatomyError, DeltapatchError, PatchFileError
from deltapatch.loading import load_base
from deltapatch.methods.norm import Norm
from deltapatch.methods.random_weights import RandomWeights, SparseDifference
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    return load_base(module, size=32)


@torch.no_grad()
def _patched(base: Base, patch: Patch) -> Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    return model(base.example(), patch="task")


def test_it_has_as_many_parameters_as_the_norms_where_a_norm_follows_each_convolution() -> None:
    module = load_base("timm/resnet18", weights="random", size=64)
    assert RandomWeights().build(module).num_parameters() == Norm().build(module).num_parameters() == 9_600


@pytest.mark.parametrize("per_channel", [1, 2, 5])
def test_parameters_are_counted_in_closed_form(base: Base, per_channel: int) -> None:
    """So many for each output channel of stem, units and projection."""
    channels = 16 + 4 * 16 + 6 * 32 + 32
    assert RandomWeights(per_channel=per_channel).build(base).num_parameters() == per_channel * channels
    last_stage = 6 * 32 + 32
    patch = RandomWeights(modules=1, per_channel=per_channel).build(base)
    assert patch.num_parameters() == per_channel * last_stage


def test_a_channel_with_fewer_weights_trains_them_all() -> None:
    part = SparseDifference((6, 1, 3, 3), 20, "depthwise")
    assert part.positions.sort(1).values.tolist() == [list(range(9))] * 6


def test_no_weight_is_chosen_twice_and_every_one_can_be() -> None:
    torch.manual_seed(0)
    part = SparseDifference((1000, 5, 1, 1), 2, "layer")
    assert (part.positions[:, 0] != part.positions[:, 1]).all()
    shares = part.positions.flatten().bincount(minlength=5) / part.positions.numel()
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.03, rtol=0)


def test_a_patch_starts_bit_exactly_at_the_base(base: Base) -> None:
    with torch.no_grad():
        expected = base.module(base.example())
    patch = RandomWeights().build(base, seed=0)
    assert torch.equal(_patched(base, patch), expected)
    assert not torch.equal(_patched(base, disturb(patch)), expected)


def test_only_the_chosen_weights_differ() -> None:
    layer = nn.Conv2d(4, 6, 3)
    part = SparseDifference((6, 4, 3, 3), 2, "layer")
    nn.init.uniform_(part.difference, 1.0, 2.0)
    changed = (part.tensors(layer)["weight"] - layer.weight).flatten(1)
    torch.testing.assert_close(changed.gather(1, part.positions), part.difference)
    assert ((changed != 0).sum(1) == 2).all()


def test_a_patched_base_answers_as_one_with_the_changed_weights(base: Base) -> None:
    patch = disturb(RandomWeights().build(base, seed=0))
    copy = OwnNet().eval()
    copy.load_state_dict(copied_state(base.module))
    with torch.no_grad():
        for site, part in zip(patch.sites, patch.parts, strict=True):
            layer = copy.get_submodule(site.path)
            layer.weight.copy_(part.tensors(layer)["weight"])
        assert torch.equal(_patched(base, patch), copy(base.example()))


def test_linear_layers_have_their_share_where_it_is_asked_for() -> None:
    base = load_base("timm/vit_tiny_patch16_224", weights="random", size=224)
    (patch_embedding,) = RandomWeights().build(base).sites
    assert patch_embedding.kind == "convolution"
    linear = [site for site in RandomWeights(layers="all").build(base).sites if site.kind == "linear"]
    assert len(linear) == 12 * 4
    with pytest.raises(AnatomyError, match="layers='all'"):
        RandomWeights(modules=1).build(base)


def test_a_file_with_positions_outside_of_a_layer_is_refused(tmp_path: Path) -> None:
    patch = RandomWeights().build(toy_base(), seed=0)
    part = patch.parts[0]
    assert isinstance(part, SparseDifference)
    part.positions[0, 0] = part.columns
    path = patch.save(tmp_path / "patch.safetensors")
    with pytest.raises(PatchFileError, match="layer 'stem' must be from 0 to 26"):
        Patch.load(path)


@pytest.mark.parametrize(("options", "message"), [({"modules": 0}, "modules"), ({"per_channel": 0}, "1 or")])
def test_a_configuration_that_makes_no_sense_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        RandomWeights(**options)
