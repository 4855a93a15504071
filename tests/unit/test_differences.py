"""Weights as differences: what storage loses, and what a layer computes."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toys import NormUnit, toy_base

from deltapatch.differences import DifferencePart, patch_of_copy, storage_error
from deltapatch.errors import DeltapatchError
from deltapatch.layers import Layer
from deltapatch.methods.full import Full
from deltapatch.patched import PatchedModel
from deltapatch.touching import touched


@pytest.fixture
def layer() -> Layer:
    """The first convolution of a toy: a weight of shape (4, 3, 3, 3) and a bias."""
    return next(layer for layer in toy_base().anatomy.layers if layer.path == "stem")


def _noise(layer: Layer, name: str) -> torch.Tensor:
    own = layer.tensor(name)
    assert own is not None
    return torch.randn(own.shape, generator=torch.Generator().manual_seed(1))


def test_integers_lose_at_most_half_a_step_of_each_channel(layer: Layer) -> None:
    part = DifferencePart(layer, "int8")
    difference = _noise(layer, "weight")
    part.put("weight", difference)
    step = difference.flatten(1).abs().amax(1) / 127
    lost = (part.difference("weight") - difference).abs().flatten(1).amax(1)
    assert (lost <= step / 2 * (1 + 1e-5)).all()
    assert lost.max() > 0
    assert part.weight.dtype == torch.int8
    assert list(dict(part.named_parameters())) == ["bias"]


def test_bf16_is_the_rounded_difference_and_vectors_stay_whole(layer: Layer) -> None:
    part = DifferencePart(layer, "bf16")
    for name in ("weight", "bias"):
        part.put(name, _noise(layer, name))
    assert torch.equal(part.difference("weight"), _noise(layer, "weight").bfloat16().float())
    assert torch.equal(part.difference("bias"), _noise(layer, "bias"))


def test_a_channel_without_a_difference_is_stored_as_none(layer: Layer) -> None:
    part = DifferencePart(layer, "int8")
    difference = _noise(layer, "weight")
    difference[2] = 0
    part.put("weight", difference)
    assert torch.equal(part.difference("weight")[2], torch.zeros(3, 3, 3))
    assert part.difference("weight").isfinite().all()


def test_the_error_of_a_storage_is_the_relative_length_of_what_is_lost(layer: Layer) -> None:
    whole, stored = DifferencePart(layer), DifferencePart(layer)
    whole.put("weight", torch.full((4, 3, 3, 3), 3.0))
    stored.put("weight", torch.full((4, 3, 3, 3), 2.0))
    assert storage_error([whole], [stored]) == pytest.approx(1 / 3)
    assert storage_error([stored], [stored]) == 0
    assert storage_error([DifferencePart(layer)], [DifferencePart(layer)]) == 0


@torch.no_grad()
def test_alpha_scales_the_difference_from_4_to_8() -> None:
    """The closed form: a quarter of the way from 4 to 8 is 5."""
    base = toy_base()
    layer = base.submodule("fc")
    assert isinstance(layer, nn.Linear)
    site = next(layer for layer in base.anatomy.layers if layer.path == "fc")
    part = DifferencePart(site)
    layer.weight.fill_(4)
    layer.bias.fill_(0)
    part.put("weight", torch.full(layer.weight.shape, 4.0))
    one = torch.zeros(1, layer.in_features)
    one[0, 0] = 1
    for alpha, expected in ((0.0, 4.0), (0.25, 5.0), (1.0, 8.0)):
        with touched({layer: part.touch(alpha)}):
            assert torch.equal(layer(one), torch.full((1, 5), expected))


def test_a_patch_in_other_storage_keeps_head_norms_and_names_its_error() -> None:
    base = toy_base()
    patch = Full().build(base, ("a", "b"), seed=0)
    for part in patch.parts:
        for name, tensor in part.named_parameters():
            torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(len(name)))
    for storage, largest in (("bf16", 4e-3), ("int8", 1e-2)):
        stored = Full(storage=storage).finished(patch, base, bench=None)
        assert 0 < stored.info.figures["storage/relative_error"] < largest
        assert torch.equal(stored.head.weight, patch.head.weight)
        assert stored.info.method.config["storage"] == storage


@torch.no_grad()
def test_a_fine_tuned_copy_becomes_a_patch_that_answers_as_it_does(tmp_path: Path) -> None:
    base = toy_base([NormUnit(4, 4), NormUnit(4, 4)])
    copy = deepcopy(base.module)
    generator = torch.Generator().manual_seed(0)
    for tensor in copy.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    path = tmp_path / "copy.safetensors"
    save_file(copy.state_dict(), path)
    classes = ("a", "b", "c", "d", "e")
    model = PatchedModel(base)
    model.add_patch("copy", patch_of_copy(Full(), base, path, classes))
    torch.testing.assert_close(model(base.example(), patch="copy"), copy(base.example()))
    rounded = patch_of_copy(Full(storage="int8"), base, path, classes)
    assert 0 < rounded.info.figures["storage/relative_error"] < 0.01
    assert model.patches["copy"].info.figures["storage/relative_error"] == 0
    with pytest.raises(DeltapatchError, match=r"'fc.weight' has shape \(5, 4\)"):
        patch_of_copy(Full(), base, path, ("a", "b"))


def test_a_file_that_is_no_copy_of_the_base_is_told(tmp_path: Path) -> None:
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DeltapatchError, match=r"has no tensor 'stem\.weight', so it is no copy"):
        patch_of_copy(Full(), toy_base(), tmp_path / "other.safetensors")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    for name in ("broken.safetensors", "missing.safetensors"):
        with pytest.raises(DeltapatchError, match=f"{name}: not a safetensors file"):
            patch_of_copy(Full(), toy_base(), tmp_path / name)
