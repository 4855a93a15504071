"""Second moments of layers' inputs are those of exactly the numbers that the layers multiply."""

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn import functional
from toys import OwnNet, copied_state, enliven, same_state

from deltapatch import merging
from deltapatch.merging import MergeError

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "padding": (0, 2), "stride": (2, 1)},
    {"kernel_size": 3, "padding": 2, "dilation": (1, 2), "stride": 2},
    {"kernel_size": (2, 3), "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (1, 3), "padding": (2, 1), "padding_mode": "circular", "groups": 2},
]


def columns_of(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """What enters each product of a convolution: (groups, d, n), picked out by kernels of a single one."""
    width = layer.weight[0].numel()
    picking = type(layer)(
        layer.in_channels,
        width * layer.groups,
        layer.kernel_size,  # pyright: ignore[reportArgumentType]
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
        **({} if layer.padding_mode == "zeros" else {"padding_mode": layer.padding_mode}),
    ).double()
    with torch.no_grad():
        kernels = torch.eye(width, dtype=torch.float64).view(width, *layer.weight.shape[1:])
        picking.weight.copy_(kernels.repeat(layer.groups, 1, 1, 1))
        picked = picking(images.double())
    return picked.transpose(0, 1).reshape(layer.groups, width, -1)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_a_convolution_has_the_moments_of_its_unfolded_inputs(settings: dict[str, Any]) -> None:
    layer, images = nn.Conv2d(4, 8, **settings), drawn(5, 4, 7, 6)
    columns = columns_of(layer, images)
    expected = columns @ columns.mT / columns.shape[2]
    found = merging.layer_grams(nn.Sequential(layer), images.split((2, 3)))["0"]
    assert found.dtype == torch.float64
    assert found.shape == (expected.shape if layer.groups > 1 else expected.shape[1:])
    torch.testing.assert_close(found.view(expected.shape), expected)


def test_a_layer_that_pads_by_itself_is_right() -> None:
    layer, images = Conv2dSame(4, 2, 3, stride=2), drawn(2, 4, 6, 5)
    padded = functional.pad(images, (1, 1, 0, 1))
    columns = columns_of(nn.Conv2d(4, 2, 3, stride=2), padded)[0]
    torch.testing.assert_close(layer(images), nn.Conv2d.forward(layer, padded))  # that it does pad so
    found = merging.layer_grams(nn.Sequential(layer), [images])["0"]
    torch.testing.assert_close(found, columns @ columns.T / columns.shape[1])


def test_a_linear_layer_has_the_moments_of_all_its_tokens() -> None:
    tokens = drawn(6, 5, 4)
    rows = tokens.reshape(-1, 4).double()
    found = merging.layer_grams(nn.Sequential(nn.Linear(4, 2)), tokens.split(4))
    torch.testing.assert_close(found, {"0": rows.T @ rows / 30})


def test_large_inputs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(36, 2))
    images = drawn(7, 3, 8, 8)
    expected = merging.layer_grams(layer, [images])
    monkeypatch.setattr("deltapatch.merging.gathering.grams._ELEMENTS", 100)
    torch.testing.assert_close(merging.layer_grams(layer, [images]), expected)


def test_layers_of_a_network_see_what_it_shows_them_in_eval_mode() -> None:
    torch.manual_seed(0)
    module = OwnNet().train()
    enliven(module)
    state = copied_state(module)
    images = drawn(4, 3, 8, 8)
    found = merging.layer_grams(module, [images])
    assert module.training
    assert same_state(module, state)
    layers = {name for name, one in module.named_modules() if isinstance(one, (nn.Conv2d, nn.Linear))}
    assert set(found) == layers
    module.eval()
    features = module.wide(module.narrow(module.stem(images))).mean((2, 3)).double()
    torch.testing.assert_close(
        found["classifier"], (features.T @ features / 4).detach(), rtol=1e-5, atol=1e-6
    )


def test_a_layer_under_two_names_and_used_twice_has_all_its_inputs_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.same = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.same(self.first(x))

    module, images = Twice(), drawn(3, 2)
    rows = torch.cat([images, module.first(images)]).detach().double()
    found = merging.layer_grams(module, [images])
    torch.testing.assert_close(found["first"], rows.T @ rows / 6)
    assert torch.equal(found["first"], found["same"])


def test_layers_that_do_not_multiply_by_what_is_stored_are_left_out() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    module = nn.Sequential(StdConv2d(3, 4, 1), normed, nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    assert list(merging.layer_grams(module, [drawn(2, 3, 4, 4)])) == ["3"]


def test_no_image_is_refused() -> None:
    with pytest.raises(MergeError, match="give one or more images"):
        merging.layer_grams(nn.Linear(2, 2), [])
