"""LoRA as a changed weight, in layers of every kind, bit for bit."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from toys import Net, OwnNet, Unit, disturb, enliven, toy_base

from deltapatch.base import Base
from deltapatch.errors import AnatomyError, DeltapatchError
from deltapatch.layers import Layer, OwnTensor
from deltapatch.loading import load_base
from deltapatch.methods.lora import Factors, Lora
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.touching import touched

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6),
    "convolution": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(8, 6, 3, padding=2, dilation=2),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "circular": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
    "one-dimensional": lambda: nn.Conv1d(8, 6, 3, padding=1),
    "weight-standardised": lambda: StdConv2d(8, 6, 3, padding=1),
    "padded as TensorFlow does": lambda: Conv2dSame(8, 6, 3, stride=2),
}


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    return load_base(module, size=16)


def _images(size: int = 16) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _answers(base: Base, patch: Patch, images: Tensor) -> Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    return model(images, patch="task")


def _site(module: nn.Module) -> Layer:
    kind = "linear" if isinstance(module, nn.Linear) else "convolution"
    return Layer("layer", kind, (OwnTensor("weight", tuple(module.weight.shape), True),))


def _input(module: nn.Module) -> Tensor:
    positions = 0 if isinstance(module, nn.Linear) else module.weight.ndim - 2
    return torch.randn(2, 8, *[9] * positions)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_layer_computes_with_its_weight_plus_the_factors_product(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    method = Lora(rank=2, alpha=3.0)
    part = method.part(_site(layer))
    part.b.normal_()
    other = deepcopy(layer)
    other.weight += ((1.5 * part.b) @ part.a).view(layer.weight.shape)
    x = _input(layer)
    before = layer.weight.clone()
    with touched({layer: method.touches(_site(layer), part)["layer"]}):
        found = layer(x)
    assert torch.equal(found, other(x))
    assert not torch.allclose(found, layer(x), atol=1e-3)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_rank_is_at_most_what_the_weight_can_have(kind: str) -> None:
    layer = LAYERS[kind]()
    outputs, inputs = layer.weight.flatten(1).shape
    part = Lora(rank=1000).part(_site(layer))
    assert part.a.shape == (min(outputs, inputs), inputs)
    assert part.b.shape == (outputs, min(outputs, inputs))


def test_the_change_is_alpha_over_rank_times_b_a() -> None:
    part = Lora(rank=2, alpha=8.0).part(_site(nn.Linear(3, 2)))
    with torch.no_grad():
        part.a.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]))
        part.b.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
    # 8 / 2 = 4 times [[1, 2, 0], [2, 3, -1]].
    assert part().tolist() == [[4.0, 8.0, 0.0], [8.0, 12.0, -4.0]]


def test_a_new_patch_answers_as_the_base_bit_for_bit(base: Base) -> None:
    images = _images()
    patch = Lora().build(base, seed=0)
    assert torch.equal(_answers(base, patch, images), base.module(images))
    assert not torch.equal(_answers(base, disturb(patch), images), base.module(images))


def test_the_parameters_are_rank_times_the_sides_of_each_weight(base: Base) -> None:
    weights = [m.weight for m in base.module.modules() if isinstance(m, nn.Conv2d)]
    expected = sum(4 * (len(weight) + weight[0].numel()) for weight in weights)
    assert Lora(rank=4).build(base).num_parameters() == expected


def test_every_factor_gets_a_gradient_through_the_layer() -> None:
    layer = StdConv2d(8, 6, 3, padding=1)
    method = Lora(rank=2)
    part = method.part(_site(layer))
    with torch.no_grad():
        part.b.normal_()
    with touched({layer: method.touches(_site(layer), part)["layer"]}):
        layer(_input(layer)).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in part.parameters())


# --- which layers -----------------------------------------------------------------------------------------


def test_targets_and_modules_choose_the_layers(base: Base) -> None:
    def paths(method: Lora) -> list[str]:
        return [site.path for site in method.sites(base.anatomy)]

    assert len(paths(Lora())) == len([m for m in base.module.modules() if isinstance(m, nn.Conv2d)])
    assert paths(Lora(targets="convolution")) == paths(Lora())
    assert paths(Lora(targets=("stem", "wide.1.conv2"))) == ["stem", "wide.1.conv2"]
    assert paths(Lora(targets=("conv1",), modules=1)) == ["wide.0.conv1", "wide.1.conv1", "wide.2.conv1"]
    with pytest.raises(AnatomyError, match="no layer of kind linear there besides its classifier"):
        Lora(targets="linear").sites(base.anatomy)
    with pytest.raises(AnatomyError, match="no linear layer or convolution there is called 'onv1'"):
        Lora(targets=("conv1", "onv1")).sites(base.anatomy)


def test_a_transformers_linear_layers_are_changed_and_its_classifier_is_not() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24).eval()
    patch = Lora(targets="linear").build(load_base(vit, size=32))
    assert [site.path for site in patch.sites] == [
        f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


def test_a_layer_whose_weight_is_computed_from_others_is_left_out() -> None:
    torch.manual_seed(0)
    net = Net([Unit(4), Unit(4)], 4)
    nn.utils.parametrizations.weight_norm(net.stage[0].branch[0])
    paths = [site.path for site in Lora().sites(load_base(net.eval(), size=8).anatomy)]
    assert paths == ["stem", "stage.1.branch.0"]


def test_names_survive_the_patchs_file(base: Base, tmp_path: Path) -> None:
    patch = Lora(rank=2, alpha=1.0, targets=("conv1", "stem")).build(base, ("a", "b"))
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    assert loaded.method == patch.method
    loaded.check_base(base)


# --- number formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weight_keeps_the_layers_number_format(dtype: torch.dtype) -> None:
    base = toy_base()
    base.module.to(dtype)
    images = _images(8).to(dtype)
    patch = Lora(rank=2).build(base)
    assert torch.equal(_answers(base, patch, images), base.module(images))
    assert _answers(base, disturb(patch), images).dtype == dtype


def test_under_autocast_a_weight_in_half_precision_is_changed_and_gets_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.bfloat16(), requires_grad=False)
    method = Lora(rank=2)
    part = _with_a_change(method.part(_site(layer)))
    x = torch.randn(4, 8)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        touched({layer: method.touches(_site(layer), part)["layer"]}),
    ):
        found = layer(x)
        found.float().square().sum().backward()
    expected = x @ (layer.weight.float() + part()).T + layer.bias
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in part.parameters())


def _with_a_change(part: Factors) -> Factors:
    with torch.no_grad():
        part.b.normal_()
    return part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be 1 or more, not 0"),
        ({"alpha": 0.0}, "alpha must be a number above 0"),
        ({"alpha": float("nan")}, "alpha must be a number above 0"),
        ({"modules": 0}, "modules must be 1 or more"),
        ({"targets": ()}, "targets must name a layer"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        Lora(**options)
