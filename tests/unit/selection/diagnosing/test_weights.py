"""How far a patch moves weights: which methods change which tensors, closed forms, and the random start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toys import OwnNet, copied_state, disturb, enliven, same_state

from deltapatch.base import Base
from deltapatch.differences import DifferencePart
from deltapatch.errors import DeltapatchError
from deltapatch.loading import load_base
from deltapatch.method import make_method, registered_methods
from deltapatch.methods.full import Full
from deltapatch.methods.interpolate import Interpolate
from deltapatch.patch import Patch
from deltapatch.selection.diagnosing.parameter_distance import ESTIMATED
from deltapatch.selection.diagnosing.weights import changed_tensors, weight_changes

CHANGING = {"full", "interpolate", "lora", "norm", "dua", "random-weights", "compose", "series-adapter"}


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    module = OwnNet()
    enliven(module)
    return load_base(module.eval(), size=16)


def build(base: Base, name: str, **options: Any) -> Patch:
    return make_method(name, options).build(base, ("a", "b"), seed=0)


@torch.no_grad()
def doubled(base: Base, patch: Patch) -> Patch:
    """The patch with every difference as large as the base's own weight."""
    for site, part in zip(patch.sites, patch.parts, strict=True):
        if isinstance(part, DifferencePart):
            for name in part.names:
                part.put(name, getattr(base.submodule(site.path), name).detach())
    return patch


@pytest.mark.parametrize("name", sorted(registered_methods()))
def test_what_is_found_is_what_the_layers_compute_with(base: Base, name: str) -> None:
    patch = disturb(build(base, name))
    changes = weight_changes(base, patch)
    if name in ("delta", "skips", "head"):
        assert changes is None
        return
    if changes is None:
        assert name not in CHANGING
        return
    assert all(layer.relative > 0 for layer in changes.layers)
    assert len(changes.layers) + changes.unchanged == len(base.anatomy.layers_from("all"))
    moved = {l.path for l in changes.layers if l.kind in ("convolution", "linear")}  # noqa: E741
    assert {l.path for l in changes.layers if l.transferability is not None} == moved  # noqa: E741
    assert (changes.transferability is not None) == bool(moved)


def test_a_copy_of_twice_the_weights_is_as_far_as_the_weights_are_large(base: Base) -> None:
    changes = weight_changes(base, doubled(base, build(base, "full", statistics="kept")))
    assert changes is not None
    convolutions = [layer.relative for layer in changes.layers if layer.kind == "convolution"]
    assert convolutions == pytest.approx([1.0] * 12)
    assert {layer.relative for layer in changes.layers if layer.kind == "normalisation"} == {0}


def test_interpolation_goes_a_part_of_the_way(base: Base) -> None:
    changes = weight_changes(base, doubled(base, Interpolate(alpha=0.25).build(base, ("a",))))
    assert changes is not None
    assert changes.layers[0].path == "stem"
    assert changes.layers[0].relative == pytest.approx(0.25)


def test_with_a_given_start_t_is_in_closed_form(base: Base, tmp_path: Path) -> None:
    """θ_r = -θ_A and θ_B = 2 θ_A: every layer is three times as far from the start."""
    file = tmp_path / "start.safetensors"
    save_file({name: -tensor for name, tensor in base.module.state_dict().items()}, file)
    changes = weight_changes(base, doubled(base, build(base, "full")), file)
    assert changes is not None
    assert changes.transferability == pytest.approx(3)
    found = [layer.transferability for layer in changes.layers if layer.kind == "convolution"]
    assert found == pytest.approx([3.0] * 12)
    assert changes.notes == ()


def test_without_one_it_is_estimated_and_said_so(base: Base) -> None:
    changes = weight_changes(base, disturb(build(base, "lora")))
    assert changes is not None
    assert changes.notes == (ESTIMATED,)
    assert changes == weight_changes(base, disturb(build(base, "lora")))


def test_of_a_librarys_model_the_start_is_drawn_as_the_library_does(tmp_path: Path) -> None:
    """ResNets initialise convolutions 2.4 times as wide as the layers themselves do."""
    base = load_base("torchvision/resnet18", weights="random", size=32, name="toy")
    patch = Full(modules=1, statistics="kept").build(base, ("a",), seed=0)
    changes = weight_changes(base, doubled(base, patch))
    plain = Base(base.module, base.name, "", base.preprocessing)
    own = weight_changes(plain, patch)
    assert changes is not None
    assert own is not None
    assert changes.notes == own.notes == (ESTIMATED,)
    # For normal numbers E|r - 2A| / E|A| = √5 where both have one width.
    found = next(layer for layer in changes.layers if layer.path == "layer4.1.conv2").transferability
    assert found == pytest.approx(5**0.5, rel=0.01)
    other = next(layer for layer in own.layers if layer.path == "layer4.1.conv2").transferability
    assert other is not None
    assert other < 2.15


def test_a_patch_that_moves_only_norms_has_no_t(base: Base) -> None:
    changes = weight_changes(base, disturb(build(base, "norm")))
    assert changes is not None
    assert changes.transferability is None
    assert {layer.kind for layer in changes.layers} == {"normalisation"}
    assert changes.notes == ()
    assert all(layer.tensors == ("weight", "bias") for layer in changes.layers)


def test_an_unfitted_copy_is_at_distance_0(base: Base) -> None:
    changes = weight_changes(base, build(base, "full"))
    assert changes is not None
    assert {layer.relative for layer in changes.layers} == {0}
    assert changes.transferability is None


def test_torchs_attention_is_one_layer(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, 4)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    torch.manual_seed(0)
    base = load_base(Tokens().eval(), size=8)
    changes = weight_changes(base, disturb(build(base, "full")))
    assert changes is not None
    inner = [layer for layer in changes.layers if any("in_proj_weight" in name for name in layer.tensors)]
    assert len(inner) == 1
    assert inner[0].transferability is not None


def test_the_base_is_left_as_it_is_and_counters_are_no_weights(base: Base) -> None:
    before = copied_state(base.module)
    patch = disturb(build(base, "full"))
    weight_changes(base, patch)
    assert same_state(base.module, before)
    norm = changed_tensors(base, patch)["narrow.0.norm1"]
    assert set(norm) == {"weight", "bias", "running_mean", "running_var"}


def test_a_start_of_another_model_is_refused(base: Base, tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    save_file({"stem.weight": torch.zeros(1)}, file)
    with pytest.raises(DeltapatchError, match=r"'stem.weight' has shape \(1,\) in the random weights"):
        weight_changes(base, disturb(build(base, "lora")), file)
