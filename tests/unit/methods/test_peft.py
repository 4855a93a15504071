"""LoRA adapters in PEFT's format: files written by hand, by us, and (where it is installed) by PEFT."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn import functional
from toys import Net, OwnNet, Unit, disturb, enliven, toy_base

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError, DeltapatchWarning, PatchFileError
from deltapatch.loading import load_base
from deltapatch.methods._peft import PeftLayer, difference, from_peft_factors, to_peft_factors
from deltapatch.methods.head import Head
from deltapatch.methods.lora import Lora, from_peft, to_peft
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

CLASSES = ("ant", "bee", "cat")


def _own_net(outputs: int = 7) -> nn.Module:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    if outputs != 7:
        module.classifier = nn.Linear(32, outputs)
    return module


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(_own_net(), size=16)


def _images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _answers(base: Base, patch: Patch, images: Tensor) -> Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    return model(images, patch="task")


def _write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["conv1"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(
        {f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def _factors(path: str, inputs: int, outputs: int, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}.lora_A.weight": torch.randn(rank, inputs, 3, 3, generator=generator) / 10,
        f"{path}.lora_B.weight": torch.randn(outputs, rank, 1, 1, generator=generator) / 10,
    }


# --- what PEFT computes, layer by layer -------------------------------------------------------------------

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(8, 6),
    "convolution": nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "1x1": nn.Conv2d(8, 6, 1, dilation=2),
    "grouped": nn.Conv2d(8, 12, 3, padding=1, groups=2),
    "grouped with few outputs each": nn.Conv2d(8, 4, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "padded as TensorFlow does": Conv2dSame(8, 6, 3, stride=2),
    "one-dimensional": nn.Conv1d(8, 6, 3, padding=1),
}
UNLIKE: dict[str, tuple[nn.Module, str]] = {
    "dilated": (nn.Conv2d(8, 6, 3, padding=2, dilation=2), "without the dilation"),
    "circular": (nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), "pads with zeros"),
    "weight-standardised": (StdConv2d(8, 6, 3), "StdConv2d transforms its weight"),
}


def _as_peft_computes(layer: nn.Module, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """layer(x) + s B(A(x)) with a layer A like the base's, but never grouped, and B 1x1."""
    if isinstance(layer, nn.Linear):
        return layer(x) + scaling * (x @ a.T @ b.T)
    first = type(layer)(layer.in_channels, len(a), layer.kernel_size, layer.stride, layer.padding, bias=False)
    first.weight = nn.Parameter(a)
    second = functional.conv1d if a.ndim == 3 else functional.conv2d
    return layer(x) + scaling * second(first(x), b, groups=layer.groups)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, 2])
@torch.no_grad()
def test_exported_factors_compute_the_changed_weight(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]
    outputs, inputs = layer.weight.flatten(1).shape
    own_a, own_b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    a, b = to_peft_factors(layer, own_a, own_b)
    x = torch.randn(2, 8, *[9] * (layer.weight.ndim - 2))
    found = _as_peft_computes(layer, x, a, b, 0.5)
    before = layer.weight.clone()
    layer.weight += 0.5 * (own_b @ own_a).view(layer.weight.shape)
    expected = layer(x)
    layer.weight.copy_(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert difference(layer) is None


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_factors_come_back_as_the_same_change(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]
    outputs, inputs = layer.weight.flatten(1).shape
    own_a, own_b = torch.randn(2, inputs), torch.randn(outputs, 2)
    a, b = from_peft_factors(layer, "layer", PeftLayer(*to_peft_factors(layer, own_a, own_b), 1.0))
    assert len(a) == 2
    torch.testing.assert_close(b @ a, own_b @ own_a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", UNLIKE)
def test_layers_that_peft_computes_differently_are_told(kind: str) -> None:
    layer, reason = UNLIKE[kind]
    assert reason in (difference(layer) or "")


def test_a_rank_beyond_what_the_weight_can_have_comes_back_smaller() -> None:
    torch.manual_seed(0)
    layer, a, b = nn.Linear(8, 3), torch.randn(20, 8), torch.randn(3, 20)
    own_a, own_b = from_peft_factors(layer, "layer", PeftLayer(a, b, 1.0))
    assert len(own_a) == 3
    torch.testing.assert_close(own_b @ own_a, b @ a, rtol=1e-5, atol=1e-5)


def test_factors_that_mix_groups_are_refused() -> None:
    layer = LAYERS["grouped"]
    with pytest.raises(DeltapatchError, match=r"mixes the channels of different groups of features.conv"):
        from_peft_factors(
            layer, "features.conv", PeftLayer(torch.ones(2, 8, 3, 3), torch.ones(12, 1, 1, 1), 1.0)
        )


# --- import -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_an_adapter_becomes_a_patch_with_its_own_scaling(
    base: Base, tmp_path: Path, rslora: bool, scaling: float
) -> None:
    tensors = _factors("wide.1.conv1", 32, 32) | _factors("narrow.0.conv1", 16, 16, rank=3, seed=1)
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    folder = _write(
        tmp_path / "adapter",
        tensors | head,
        use_rslora=rslora,
        modules_to_save=["classifier"],
        alpha_pattern={"wide.1.conv1": 10},
    )
    patch = from_peft(folder, base, CLASSES)
    other = _own_net(3)
    with torch.no_grad():
        other.classifier.weight.copy_(head["classifier.weight"])
        other.classifier.bias.copy_(head["classifier.bias"])
        for path, factor in (
            ("wide.1.conv1", scaling * 10 / 4),
            ("narrow.0.conv1", 4 / (3**0.5 if rslora else 3)),
        ):
            a, b = (tensors[f"{path}.lora_{name}.weight"].flatten(1) for name in "AB")
            weight = other.get_submodule(path).weight
            weight += factor * (b @ a).view(weight.shape)
    images = _images()
    torch.testing.assert_close(_answers(base, patch, images), other(images), rtol=1e-4, atol=1e-5)
    assert patch.method.targets == ("narrow.0.conv1", "wide.1.conv1")


def test_the_configurations_own_names_are_kept_where_they_say_it_all(base: Base, tmp_path: Path) -> None:
    paths = [name for name, _ in base.module.named_modules() if name.endswith(".conv2")]
    width = {path: len(base.submodule(path).weight) for path in paths}
    tensors = {key: t for path in paths for key, t in _factors(path, width[path], width[path]).items()}
    patch = from_peft(_write(tmp_path / "adapter", tensors, target_modules=["conv2", "qkv"]), base)
    assert patch.method == Lora(rank=2, alpha=4.0, targets=("conv2",))


def test_classes_without_a_saved_classifier_and_the_reverse_are_told(base: Base, tmp_path: Path) -> None:
    tensors = _factors("wide.1.conv1", 32, 32)
    folder = _write(tmp_path / "plain", tensors)
    with pytest.warns(DeltapatchWarning, match="no classifier, so the head is untrained"):
        from_peft(folder, base, CLASSES)
    head = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
    folder = _write(tmp_path / "headed", tensors | head, modules_to_save=["classifier"])
    with pytest.warns(DeltapatchWarning, match="a classifier, which needs classes="):
        assert from_peft(folder, base).head is None
    with pytest.raises(DeltapatchError, match=r"shape \(3, 32\), but 2 classes on this base need \(2, 32\)"):
        from_peft(folder, base, CLASSES[:2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "a LoRA with use_dora computes something else"),
        ({"lora_bias": True}, "a LoRA with lora_bias"),
        ({"bias": "lora_only"}, "bias='lora_only' cannot be imported"),
        ({"peft_type": "LOHA"}, "of type 'LOHA', but only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights too"),
        ({"lora_alpha": "many"}, "should be a number, not 'many'"),
    ],
)
def test_what_a_patch_does_not_carry_is_refused(
    base: Base, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    folder = _write(tmp_path / "adapter", _factors("wide.1.conv1", 32, 32), **config)
    with pytest.raises(PatchFileError, match=message):
        from_peft(folder, base)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA factors"),
        ({"wide.1.conv1.bias": torch.zeros(2)}, r"wide.1.conv1.bias' is no LoRA factor"),
        ({"stem.lora_A.weight": torch.zeros(2, 3, 3, 3)}, "one of the two factors of 'stem' is missing"),
        (_factors("deep.conv1", 32, 32), "'deep.conv1', which is no linear layer or convolution before"),
        (_factors("classifier", 32, 7), "'classifier', which is no linear layer or convolution before"),
        (_factors("wide.1.conv1", 16, 32), "which do not fit its weight"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    base: Base, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message):
        from_peft(_write(tmp_path / "adapter", tensors), base)


def test_damaged_and_missing_files_are_refused(base: Base, tmp_path: Path) -> None:
    with pytest.raises(PatchFileError, match=r"adapter_config.json cannot be read"):
        from_peft(tmp_path / "nowhere", base)
    folder = _write(tmp_path / "adapter", _factors("wide.1.conv1", 32, 32))
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(PatchFileError, match=r"adapter_model.safetensors cannot be read"):
        from_peft(folder, base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(PatchFileError, match=r"adapter_config.json is not JSON"):
        from_peft(folder, base)


# --- export -----------------------------------------------------------------------------------------------


def test_an_exported_patch_comes_back_as_it_was(base: Base, tmp_path: Path) -> None:
    patch = disturb(Lora(rank=20, alpha=3.0).build(base, CLASSES, seed=0))
    back = from_peft(to_peft(patch, base, tmp_path / "adapter"), base, CLASSES)
    assert back.method == patch.method
    assert back.state_dict().keys() == patch.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in patch.state_dict().items())


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_names_that_other_names_end_with_are_written_so_that_they_match_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net([Unit(4), Unit(4)], 4)
    net.stage[0].stem = nn.Conv2d(4, 4, 1)
    base = load_base(net.eval(), size=8)
    folder = to_peft(Lora(rank=2, targets=("stem",)).build(base), base, tmp_path)
    assert _config(folder)["target_modules"] == "stem"
    folder = to_peft(Lora(rank=2, targets=("branch.0",)).build(base), base, tmp_path)
    assert _config(folder)["target_modules"] == ["stage.0.branch.0", "stage.1.branch.0"]


def test_each_layers_rank_and_alpha_are_found_by_its_whole_name(tmp_path: Path) -> None:
    """PEFT takes the first pattern that the end of a name matches."""
    torch.manual_seed(0)
    units = [Unit(4), Unit(4)]
    for unit in units:
        unit.branch = nn.Sequential()
        unit.branch.add_module("stem", nn.Conv2d(4, 8, 3, padding=1))
        unit.branch.add_module("out", nn.Conv2d(8, 4, 1))
    base = load_base(Net(units, 4).eval(), size=8)
    patch = disturb(Lora(rank=8, alpha=4.0, targets=("stem",)).build(base, seed=0))
    folder = to_peft(patch, base, tmp_path)
    config, tensors = _config(folder), load_file(folder / "adapter_model.safetensors")
    for path, rank in (("stem", 4), ("stage.0.branch.stem", 8), ("stage.1.branch.stem", 8)):
        ranks = (r for key, r in config["rank_pattern"].items() if re.match(rf"(.*\.)?({key})$", path))
        assert next(ranks, config["r"]) == rank == len(tensors[f"base_model.model.{path}.lora_A.weight"])
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(_answers(base, from_peft(folder, base), images), _answers(base, patch, images))


def test_a_failed_export_leaves_the_old_adapter(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = to_peft(Lora(rank=2).build(base, CLASSES, seed=0), base, tmp_path / "adapter")
    before = load_file(folder / "adapter_model.safetensors")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltapatch.methods._peft.save_file", full_disk)
    with pytest.raises(PatchFileError, match="No space left"):
        to_peft(Lora(rank=2).build(base, CLASSES, seed=1), base, folder)
    after = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_layers_that_peft_changes_are_named_on_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net([Unit(4), Unit(4)], 4)
    net.stage[1].branch[0] = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
    base = load_base(net.eval(), size=8)
    patch = Lora(rank=2).build(base)
    with pytest.warns(DeltapatchWarning, match=r"stage.1.branch.0: PEFT .* without the dilation"):
        to_peft(patch, base, tmp_path)
    with pytest.warns(DeltapatchWarning, match=r"stage.1.branch.0: here it will answer otherwise"):
        from_peft(tmp_path, base)


def test_grouped_layers_are_exported_with_a_word_on_their_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net([Unit(4), Unit(4)], 4)
    net.stage[1].branch[0] = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    base = load_base(net.eval(), size=8)
    patch = disturb(Lora(rank=2).build(base, seed=0))
    with pytest.warns(DeltapatchWarning, match=r"those of stage.1.branch.0 have up to \d times as many"):
        to_peft(patch, base, tmp_path)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        _answers(base, from_peft(tmp_path, base), images), _answers(base, patch, images)
    )


def test_layers_without_a_lora_in_peft_are_refused_or_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net([Unit(4), Unit(4)], 4)
    net.stage[1].branch[0] = nn.ConvTranspose2d(4, 4, 3, padding=1)
    base = load_base(net.eval(), size=8)
    patch = Lora(rank=2).build(base)
    with pytest.raises(DeltapatchError, match=r"PEFT has no LoRA for stage.1.branch.0"):
        to_peft(patch, base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    folder = to_peft(patch, base, tmp_path / "adapter", skip_unsupported=True)
    assert not any("stage.1" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_head_that_peft_cannot_replace_is_left_out_with_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net([Unit(4), Unit(4)], 4)
    net.fc = nn.Linear(4, 5, bias=False)
    base = load_base(net.eval(), size=8)
    with pytest.warns(DeltapatchWarning, match="the head is left out"):
        folder = to_peft(Lora(rank=2).build(base, CLASSES), base, tmp_path)
    assert _config(folder)["modules_to_save"] is None


def test_only_lora_patches_of_this_base_are_exported(base: Base, tmp_path: Path) -> None:
    with pytest.raises(DeltapatchError, match=r"only lora patches .* this is a head patch"):
        to_peft(Head().build(base, CLASSES), base, tmp_path)
    with pytest.raises(DeltapatchError, match="this patch belongs to base"):
        to_peft(Lora().build(toy_base()), base, tmp_path)


# --- with PEFT itself -------------------------------------------------------------------------------------


def test_peft_computes_the_same_with_what_is_exported(base: Base, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    patch = disturb(Lora(rank=20, alpha=3.0).build(base, CLASSES, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(
            _own_net(3), to_peft(patch, base, tmp_path / "adapter")
        ).eval()
    images = _images()
    torch.testing.assert_close(loaded(images), _answers(base, patch, images), rtol=1e-5, atol=1e-5)


def test_a_patch_computes_the_same_as_the_adapter_that_peft_saved(base: Base, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["conv1", "stem"],
        r=4,
        lora_alpha=6,
        rank_pattern={"wide.0.conv1": 40},
        alpha_pattern={r"wide\.\d\.conv1": 1},
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(_own_net(3), config).eval()
    adapted.save_pretrained(tmp_path)
    images = _images()
    patch = from_peft(tmp_path, base, CLASSES)
    torch.testing.assert_close(_answers(base, patch, images), adapted(images), rtol=1e-5, atol=1e-5)
