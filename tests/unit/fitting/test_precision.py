"""bf16 is chosen where the device has it and the base's features stay; the choice is said."""

import pytest
import torch
from torch import Tensor, nn
from toys import OwnNet, copied_state, enliven, same_state

from deltapatch.base import Base
from deltapatch.fitting import precision
from deltapatch.fitting.precision import Precision, choose_precision
from deltapatch.loading import load_base


class Cancelling(OwnNet):
    """Its features are small differences of large numbers, which bf16 does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.wide(self.narrow(self.stem(x))).mean((2, 3))
        large = nn.functional.linear(features, 1000 * torch.eye(32))
        return self.classifier(large - 999 * features)


def _base(kind: type[nn.Module] = OwnNet) -> Base:
    torch.manual_seed(0)
    module = kind().eval()
    enliven(module)
    return load_base(module, size=16)


@pytest.fixture(autouse=True)
def device_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)


def test_what_is_asked_for_is_done() -> None:
    base = _base(Cancelling)
    for wanted, mixed in (("bf16", True), ("fp32", False)):
        assert choose_precision(wanted, base, base.example()).mixed == mixed


def test_a_base_that_bears_it_is_computed_in_bf16_and_one_that_does_not_is_not() -> None:
    good, bad = _base(), _base(Cancelling)
    chosen = choose_precision("auto", good, good.example())
    assert chosen.mixed
    assert chosen.why.startswith("the base's features are off by 0.")
    refused = choose_precision("auto", bad, bad.example())
    assert not refused.mixed
    assert "in bf16 the base's features would be off by" in refused.why


def test_without_the_arithmetic_it_stays_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    base = _base()
    assert choose_precision("auto", base, base.example()) == Precision(
        False, "cpu", "this cpu has no bf16 arithmetic"
    )


def test_a_base_of_another_type_is_left_alone() -> None:
    base = _base()
    base.module.double()
    assert choose_precision("auto", base, base.example()).why == "the base itself is in float64"


def test_the_context_computes_products_in_bf16() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with Precision(True, "cpu", "").context():
        assert layer(x).dtype == torch.bfloat16
    with Precision(False, "cpu", "").context():
        assert layer(x).dtype == torch.float32


def test_maps_are_arranged_for_bf16_and_left_as_they_are_otherwise() -> None:
    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
    mixed, exact = Precision(True, "cpu", ""), Precision(False, "cpu", "")
    assert mixed.arranged(maps).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mixed.arranged(maps), maps)
    assert mixed.arranged(tokens) is tokens
    assert exact.arranged(maps) is maps


@torch.no_grad()
def test_a_prepared_base_is_a_copy_that_answers_as_mixed_precision_does() -> None:
    base, mixed = _base(), Precision(True, "cpu", "")
    state = copied_state(base.module)
    prepared = mixed.prepared(base)
    assert {m.weight.dtype for m in prepared.module.modules() if isinstance(m, nn.Conv2d)} == {torch.bfloat16}
    assert (prepared.fingerprint, prepared.anatomy) == (base.fingerprint, base.anatomy)
    with mixed.context():
        expected = base.module(base.example())
        found = prepared.module(base.example())
    assert torch.equal(found, expected)
    assert same_state(base.module, state)
    assert Precision(False, "cpu", "").prepared(base) is base


def test_weights_that_a_layer_computes_with_stay_as_they_are() -> None:
    class Standardised(nn.Conv2d):
        """As `timm.layers.StdConv2d`: its weights are standardised at every call."""

    base = _base()
    base.module.stem = Standardised(3, 16, 3, stride=2, padding=1)
    prepared = Precision(True, "cpu", "").prepared(load_base(base.module, size=16))
    assert prepared.module.stem.weight.dtype == torch.float32
