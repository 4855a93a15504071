"""A layer computes with other tensors for a call, and is what it was."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn
from toys import copied_state, same_state

from deltapatch.errors import AnatomyError
from deltapatch.exchange import Exchange, chained, merged, stand_in
from deltapatch.touching import touched

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, padding_mode="circular"),
        StdConv2d(8, 8, 3),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
    ],
)
@torch.no_grad()
def test_a_layer_with_an_exchanged_weight_is_a_copy_with_that_weight(layer: nn.Module) -> None:
    state = copied_state(layer)
    weight = torch.randn_like(layer.weight)
    with touched({layer: Exchange(lambda module: {"weight": weight})}):
        found = layer(X)
    assert same_state(layer, state)
    before = layer(X)
    layer.weight.copy_(weight)
    assert torch.equal(found, layer(X))
    assert not torch.equal(found, before)


def test_gradients_reach_the_exchanged_tensor_alone() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    weight = torch.zeros(2, 3, requires_grad=True)
    with touched({layer: Exchange(lambda module: {"weight": module.weight + weight})}):
        layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 3))
    assert layer.weight.grad is None


@torch.no_grad()
def test_a_tensor_of_a_module_inside_is_exchanged_by_its_dotted_name() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    tokens = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    before = attention(tokens, tokens, tokens)[0]
    with touched({attention: Exchange(lambda _: {"out_proj.weight": torch.zeros(4, 4)})}):
        found = attention(tokens, tokens, tokens)[0]
    assert torch.equal(found, attention.out_proj.bias.expand(1, 3, 4))
    assert torch.equal(attention(tokens, tokens, tokens)[0], before)


def test_a_stand_in_shares_everything_else() -> None:
    norm = nn.BatchNorm2d(8).eval()
    copy = stand_in(norm, {"weight": torch.full((8,), 2.0)})
    assert type(copy) is nn.BatchNorm2d
    assert copy.bias is norm.bias
    assert copy.running_mean is norm.running_mean
    assert torch.equal(norm.weight, torch.ones(8))


@torch.no_grad()
def test_a_norm_in_train_mode_writes_to_the_exchanged_statistics_only() -> None:
    norm = nn.BatchNorm2d(8).eval()
    mean, variance, counter = torch.zeros(8), torch.ones(8), torch.zeros((), dtype=torch.long)
    given = {"running_mean": mean, "running_var": variance, "num_batches_tracked": counter}
    state = copied_state(norm)
    with touched({norm: Exchange(lambda _: given, training=True, momentum=1.0)}):
        norm(X)
    torch.testing.assert_close(mean, X.mean((0, 2, 3)))
    torch.testing.assert_close(variance, X.var((0, 2, 3)))
    assert same_state(norm, state)
    assert not norm.training


@torch.no_grad()
def test_threads_with_different_weights_do_not_see_each_other() -> None:
    layer = nn.Linear(3, 3, bias=False)

    def answer(value: float) -> Tensor:
        with touched({layer: Exchange(lambda _: {"weight": torch.full((3, 3), value)})}):
            return torch.stack([layer(torch.ones(3)) for _ in range(50)])

    with ThreadPoolExecutor(4) as pool:
        for value, found in zip(range(8), pool.map(answer, map(float, range(8))), strict=True):
            assert torch.equal(found, torch.full((50, 3), 3.0 * value))


@torch.no_grad()
def test_an_exchange_is_always_the_inner_one_of_two_touches() -> None:
    layer = nn.Linear(1, 1, bias=False)
    exchange = Exchange(lambda _: {"weight": torch.full((1, 1), 3.0)})

    def plus_one(forward, x):
        return forward(x) + 1

    for both in (chained(exchange, plus_one), chained(plus_one, exchange)):
        with touched({layer: both}):
            assert layer(torch.ones(1)).item() == 4
    with touched(merged({layer: plus_one}, {layer: exchange})):
        assert layer(torch.ones(1)).item() == 4


def test_two_exchanges_of_one_layer_are_refused() -> None:
    exchange = Exchange(lambda _: {})
    with pytest.raises(AnatomyError, match="change the weights of one layer"):
        chained(exchange, exchange)


def test_a_layer_with_a_forward_of_its_own_on_the_instance_is_refused() -> None:
    layer = nn.Linear(1, 1)
    layer.forward = lambda x: x
    with (
        touched({layer: Exchange(lambda _: {"weight": torch.zeros(1, 1)})}),
        pytest.raises(AnatomyError, match="forward of its own"),
    ):
        layer(torch.ones(1))
