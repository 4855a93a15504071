"""Layers are read from what runs: every tensor that is used has one, in the order in which they run."""

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import vit_b_16
from toys import OwnNet, disturb

from deltapatch.base import Base
from deltapatch.errors import AnatomyError
from deltapatch.layers import is_normalisation
from deltapatch.loading import load_base
from deltapatch.methods.full import Full
from deltapatch.patched import PatchedModel


def _base(module: nn.Module, size: int = 32) -> Base:
    return load_base(module.eval(), size=size, name=type(module).__name__)


@pytest.fixture(scope="module")
def own() -> Base:
    torch.manual_seed(0)
    return _base(OwnNet())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv2_100", "densenet121"])
def test_every_parameter_of_a_network_belongs_to_one_layer(name: str) -> None:
    base = _base(timm.create_model(name))
    counted = sum(math.prod(own.shape) for layer in base.anatomy.layers for own in layer.parameters)
    assert counted == sum(parameter.numel() for parameter in base.module.parameters())


def test_layers_stand_in_the_order_in_which_they_run(own: Base) -> None:
    paths = [layer.path for layer in own.anatomy.layers]
    assert paths[:3] == ["stem", "narrow.0.conv1", "narrow.0.norm1"]
    assert paths[-1] == "classifier"
    # The projection is registered last and runs last in its unit.
    assert paths.index("wide.0.conv2") < paths.index("wide.0.project.0") < paths.index("wide.1.conv1")


def test_the_last_stages_and_all_that_follows_without_the_classifier(own: Base) -> None:
    last = [layer.path for layer in own.anatomy.layers_from(1)]
    assert last[0] == "wide.0.conv1"
    assert "classifier" not in last
    assert own.anatomy.layers_from("all")[0].path == "stem"
    with pytest.raises(AnatomyError, match="modules=3"):
        own.anatomy.layers_from(3)


def test_a_tensor_of_a_module_that_is_never_called_belongs_to_the_module_around_it() -> None:
    base = _base(vit_b_16(image_size=32, num_classes=4), size=32)
    attention = next(layer for layer in base.anatomy.layers if layer.path.endswith("self_attention"))
    assert [own.name for own in attention.tensors] == [
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    ]


def test_what_torch_computes_in_one_piece_is_one_layer_and_a_patch_acts_in_it() -> None:
    """Its transformer layers call nothing inside of them in eval mode, and everything when they train."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    base = _base(
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), encoder, nn.Flatten(), nn.Linear(24, 2)), size=8
    )
    layer = base.anatomy.layers[1]
    assert (layer.path, layer.kind) == ("2", "other")
    counted = sum(math.prod(own.shape) for own in layer.parameters)
    assert counted == sum(parameter.numel() for parameter in encoder.parameters())
    patch = disturb(Full(statistics="kept").build(base))
    model = PatchedModel(base)
    model.add_patch("task", patch)
    with torch.no_grad():
        at_once = model(base.example(), patch="task")
        assert not torch.equal(at_once, base.module(base.example()))
    piece_by_piece = model(base.example(), patch="task")
    torch.testing.assert_close(piece_by_piece, at_once)
    piece_by_piece.sum().backward()
    assert all(parameter.grad is not None for parameter in patch.parameters())


class _WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Conv2d(3, 4, 3)
        self.unused = nn.Conv2d(3, 4, 3)
        self.scale = nn.Parameter(torch.ones(4))
        self.forgotten = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.used(x).mean((2, 3)) * self.scale)


def test_what_no_operation_is_given_is_no_layers() -> None:
    layers = _base(_WithUnused(), size=8).anatomy.layers
    assert [(layer.path, [own.name for own in layer.tensors]) for layer in layers] == [
        ("", ["scale"]),
        ("used", ["weight", "bias"]),
        ("fc", ["weight", "bias"]),
    ]


class _OwnNorm(nn.Module):
    """A normalisation that is written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) * self.gain


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.LayerNorm(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.RMSNorm(4), True),
        (_OwnNorm(4), True),
        (nn.Conv2d(4, 4, 1), False),
        (nn.LayerNorm(4, elementwise_affine=False), True),
        (nn.ReLU(), False),
    ],
)
def test_what_normalises(module: nn.Module, expected: bool) -> None:
    assert is_normalisation(module) == expected


def test_what_a_convolution_does_to_positions(own: Base) -> None:
    layers = {layer.path: layer for layer in own.anatomy.layers}
    grid = layers["wide.0.conv1"].grid
    assert grid is not None
    assert (grid.kernel_size, grid.stride, grid.keeps) == ((3, 3), (2, 2), True)
    unpadded = _base(_WithUnused(), size=8).anatomy.layers[1].grid
    assert unpadded is not None
    assert not unpadded.keeps
    assert layers["classifier"].grid is None
