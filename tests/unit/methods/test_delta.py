"""Δ-Networks against the published parameter counts, the formula by hand, and the variance argument."""

from collections.abc import Sequence
from typing import Literal

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import Net, NormUnit, Unit, copied_state, disturb, toy_base

from deltapatch.anatomy import Stage
from deltapatch.base import Base
from deltapatch.errors import DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta, DeltaModule
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.skipping import existing_skips

PUBLISHED = Delta(modules="all", norm="module", start="plain", module="published")
START: Sequence[Delta] = (
    PUBLISHED,
    Delta(norm="both", start="plain"),
    Delta(norm="sum", start="identity"),
    Delta(norm="both", start="zero-gain"),
)


def _patched(base: Base, patch: Patch, images: Tensor) -> Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    with torch.no_grad():
        return model(images, patch="task")


def _conv_weights(patch: Patch) -> int:
    return sum(p.numel() for p in patch.parts.parameters() if p.ndim == 4)


# --- parameter counts -------------------------------------------------------------------------------------

# Network -> {modules: (convolution weights, all parameters)}; None where no count of weights was published.
COUNTS = {
    "resnet18": {1: (442_368, 443_267), 2: (552_960, 554_310), 4: (608_256, 610_060)},
    "resnet34": {1: (442_368, 443_654), 2: (552_960, 555_867), 4: (608_256, 611_947)},
    "resnet50": {1: (7_077_888, 7_083_014), 2: (8_847_360, 8_858_907), 4: (9_317_376, 9_331_051)},
    "resnet101": {1: (7_077_888, 7_083_014), 2: (8_847_360, 8_924_442), 4: (9_317_376, 9_396_586)},
    "convnext_tiny": {1: (3_981_312, 3_985_158), 2: (4_976_640, 4_989_939), 4: (5_287_680, 5_302_431)},
    "convnext_large": {1: (15_925_248, 15_932_934), 2: (None, 20_061_312), 4: (None, 21_308_364)},
}


@pytest.fixture(scope="module", params=COUNTS)
def counted(request: pytest.FixtureRequest) -> tuple[tuple[Stage, ...], dict[int, tuple[int | None, int]]]:
    """A network's stages and what its Δ-modules should count."""
    return _stages(request.param), COUNTS[request.param]


def _stages(name: str) -> tuple[Stage, ...]:
    """The stages of a network whose weights are all alike, which is quicker than drawing them."""
    with torch.device("meta"):
        module = timm.create_model(name)
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        nn.init.constant_(tensor, 0.01) if tensor.is_floating_point() else tensor.zero_()
    return load_base(module, size=32).anatomy.stages


def test_parameter_counts_are_the_published_ones(
    counted: tuple[tuple[Stage, ...], dict[int, tuple[int | None, int]]],
) -> None:
    stages, counts = counted
    for modules, (convolutions, everything) in counts.items():
        with torch.device("meta"):
            parts = [PUBLISHED.part(stage) for stage in stages[-modules:]]
        parameters = [parameter for part in parts for parameter in part.parameters()]
        assert sum(p.numel() for p in parameters) == everything
        if convolutions is not None:
            assert sum(p.numel() for p in parameters if p.ndim == 4) == convolutions


def test_modules_counts_stages_from_the_last() -> None:
    base = load_base("timm/resnet18", weights="random", size=32)
    patch = Delta(modules=2, norm="module", start="plain", module="published").build(base)
    assert [site.path for site in patch.sites] == ["layer3", "layer4"]
    assert _conv_weights(patch) == 552_960
    assert patch.num_parameters() == 554_310


# --- the formula by hand ----------------------------------------------------------------------------------


def _force_weights(patch: Patch, logits: Sequence[float]) -> None:
    """Makes Δ(x) the same for every image: the logits of a_10, a_20, a_21, ..."""
    with torch.no_grad():
        for part in patch.parts:
            part.delta.fc.weight.zero_()
            part.delta.fc.bias.copy_(torch.tensor(logits))


def _two_units(method: Delta, outputs: int = 4) -> tuple[Base, Patch, Tensor, list[nn.Module]]:
    units = [Unit(4, outputs), Unit(outputs)]
    base = toy_base(units, features=outputs)
    patch = method.build(base, seed=0)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return base, patch, images, units


@torch.no_grad()
def test_plain_replaces_the_shortcut_by_the_weighted_sum_of_all_states() -> None:
    base, patch, images, (first, second) = _two_units(PUBLISHED)
    _force_weights(patch, [0.5, -1.0, 2.0])
    a10, a20, a21 = torch.sigmoid(torch.tensor([0.5, -1.0, 2.0]))
    f0 = base.module.stem(images)
    f1 = functional.relu(first.branch(f0) + a10 * f0)
    f2 = functional.relu(second.branch(f1) + a20 * f0 + a21 * f1)
    expected = base.module.fc(f2.mean((2, 3)))
    torch.testing.assert_close(_patched(base, patch, images), expected)


@torch.no_grad()
def test_the_stages_input_enters_the_sums_as_its_shortcut_projects_it() -> None:
    base, patch, images, (first, second) = _two_units(PUBLISHED, outputs=6)
    _force_weights(patch, [0.5, -1.0, 2.0])
    a10, a20, a21 = torch.sigmoid(torch.tensor([0.5, -1.0, 2.0]))
    x = base.module.stem(images)
    f0 = first.projection(x)
    f1 = functional.relu(first.branch(x) + a10 * f0)
    f2 = functional.relu(second.branch(f1) + a20 * f0 + a21 * f1)
    torch.testing.assert_close(_patched(base, patch, images), base.module.fc(f2.mean((2, 3))))


@torch.no_grad()
def test_identity_normalises_the_sums_where_it_is_asked_to() -> None:
    base, patch, images, (first, second) = _two_units(Delta(norm="sum", start="identity"))
    disturb(patch)
    _force_weights(patch, [4.0, -4.0, 4.0])
    a10, a20, a21 = torch.sigmoid(torch.tensor([4.0, -4.0, 4.0]))
    norms = patch.parts[0].sum_norms
    f0 = base.module.stem(images)
    f1 = functional.relu(first.branch(f0) + norms[0](a10 * f0))
    f2 = functional.relu(second.branch(f1) + norms[1](a20 * f0 + a21 * f1))
    torch.testing.assert_close(_patched(base, patch, images), base.module.fc(f2.mean((2, 3))))


@torch.no_grad()
def test_zero_gain_adds_the_scaled_sums_to_the_bases_own_join() -> None:
    base, patch, images, (first, second) = _two_units(Delta())
    disturb(patch)
    _force_weights(patch, [0.5, -1.0, 2.0])
    a10, a20, a21 = torch.sigmoid(torch.tensor([0.5, -1.0, 2.0]))
    norms = patch.parts[0].sum_norms
    f0 = base.module.stem(images)
    f1 = functional.relu(first.branch(f0) + f0 + norms[0](a10 * f0))
    f2 = functional.relu(second.branch(f1) + f1 + norms[1](a20 * f0 + a21 * f1))
    torch.testing.assert_close(_patched(base, patch, images), base.module.fc(f2.mean((2, 3))))


@torch.no_grad()
def test_the_delta_module_is_two_convolutions_an_average_and_a_linear_layer() -> None:
    torch.manual_seed(0)
    module = DeltaModule(channels=6, skips=3, layout="NCHW", normalise=True).eval()
    x = torch.randn(2, 6, 5, 5)
    conv1, norm1, _, conv2, norm2, _ = module.layers
    hidden = functional.relu(norm1(functional.conv2d(x, conv1.weight, padding=1)))
    hidden = functional.relu(norm2(functional.conv2d(hidden, conv2.weight, padding=1)))
    expected = hidden.mean((2, 3)) @ module.fc.weight.T + module.fc.bias
    torch.testing.assert_close(module(x), expected)
    assert (conv1.weight.shape, conv2.weight.shape) == ((3, 6, 3, 3), (3, 3, 3, 3))


@torch.no_grad()
def test_channels_last_maps_get_the_answer_of_the_same_maps_with_channels_first() -> None:
    torch.manual_seed(0)
    first = DeltaModule(6, 3, "NCHW", normalise=True).eval()
    last = DeltaModule(6, 3, "NHWC", normalise=True).eval()
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)), first(x))


@torch.no_grad()
def test_tokens_are_answered_whatever_their_order() -> None:
    torch.manual_seed(0)
    module = DeltaModule(6, 3, "NLC", normalise=True).eval()
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(module(x.flip(1)), module(x))
    assert module(x).shape == (2, 3)


# --- starting points --------------------------------------------------------------------------------------


def _weights(patch: Patch, base: Base) -> list[Tensor]:
    """The skip weights a(x) of each stage for the base's example."""
    found: list[Tensor] = []
    handles = [
        part.delta.register_forward_hook(lambda module, args, output: found.append(torch.sigmoid(output)))
        for part in patch.parts
    ]
    _patched(base, patch, base.example())
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def resnet18() -> Base:
    torch.manual_seed(0)
    return load_base("timm/resnet18", weights="random", size=64)


FAMILIES = ["resnet18", "resnet50", "convnext_atto", "mobilenetv2_100", "regnetx_002", "densenet121"]


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_gain_starts_bit_exactly_at_the_base(name: str) -> None:
    torch.manual_seed(0)
    base = load_base(f"timm/{name}", weights="random", size=64)
    patch = Delta().build(base, seed=0)
    with torch.no_grad():
        expected = base.module(base.example())
    assert torch.equal(_patched(base, patch, base.example()), expected)
    assert not torch.equal(_patched(base, disturb(patch), base.example()), expected)


def test_plain_starts_with_all_weights_near_a_half(resnet18: Base) -> None:
    weights = torch.cat([w.flatten() for w in _weights(PUBLISHED.build(resnet18, seed=0), resnet18)])
    assert weights.numel() == 2 * 4 * 3
    assert (weights - 0.5).abs().max() < 0.05


def test_identity_starts_with_the_bases_own_skips_present_and_the_new_ones_absent(resnet18: Base) -> None:
    patch = Delta(norm="module", start="identity").build(resnet18, seed=0)
    for site, weights in zip(patch.sites, _weights(patch, resnet18), strict=True):
        own = existing_skips(site)
        assert own.tolist() == [True, False, True]
        torch.testing.assert_close(weights[:, own], torch.full((2, 2), 0.982), atol=2e-3, rtol=0)
        torch.testing.assert_close(weights[:, ~own], torch.full((2, 1), 0.018), atol=2e-3, rtol=0)


def test_a_base_without_skips_has_no_existing_ones() -> None:
    units = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2)]
    (stage,) = toy_base(units).anatomy.stages
    assert existing_skips(stage).tolist() == [False, False, False]


@pytest.mark.parametrize("method", START)
def test_every_start_changes_with_the_seed_alone(method: Delta) -> None:
    base = toy_base()
    first, again, other = (method.build(base, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(map(torch.equal, first.values(), again.values()))
    assert not all(map(torch.equal, first.values(), other.values()))


# --- the variance argument (appendix 6) -------------------------------------------------------------------


class OrthonormalUnit(nn.Module):
    """``P (Q x + x)`` with random orthonormal maps Q and P, so that no two terms of any sum are correlated.

    P stands where the activation does: it shuffles the channels and turns the signs of half of them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 1, bias=False))
        nn.init.orthogonal_(self.branch[0].weight.view(width, width))
        self.order = torch.randperm(width).tolist()
        self.register_buffer("signs", torch.randn(width, 1, 1).sign())

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + x)[:, self.order] * self.signs


def test_all_skips_with_weight_1_let_the_variance_grow_as_every_second_fibonacci_number() -> None:
    torch.manual_seed(0)
    width = 512
    net = Net([OrthonormalUnit(width) for _ in range(5)], width)
    net.stem = nn.Conv2d(width, width, 1, bias=False)
    nn.init.dirac_(net.stem.weight)
    base = Base(net.eval(), name="orthonormal", source="", preprocessing=toy_base().preprocessing)
    base.example = lambda images=2: torch.randn(images, width, 2, 2)
    patch = PUBLISHED.build(base)
    _force_weights(patch, [100.0] * 15)
    variances = [1.0]
    handles = [
        unit.register_forward_hook(lambda module, args, output: variances.append(output.var().item()))
        for unit in net.stage
    ]
    _patched(base, patch, torch.randn(16, width, 2, 2))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(
        torch.tensor(variances), torch.tensor([1.0, 2.0, 5.0, 13.0, 34.0, 89.0]), rtol=0.08, atol=0
    )


# --- images, calls and modes ------------------------------------------------------------------------------


def _own_base() -> Base:
    units = [NormUnit(4, 8, stride=2), NormUnit(8, 8), NormUnit(8, 8)]
    return toy_base(units, features=8)


def test_two_images_of_a_batch_get_weights_of_their_own() -> None:
    base = _own_base()
    (weights,) = _weights(disturb(PUBLISHED.build(base, seed=0)), base)
    assert (weights[0] - weights[1]).abs().min() > 1e-4


@pytest.mark.parametrize("method", START)
def test_a_batch_is_answered_as_its_images_are_one_by_one(method: Delta) -> None:
    base = _own_base()
    patch = disturb(method.build(base, ("a", "b"), seed=0))
    images = base.example(4)
    single = torch.cat([_patched(base, patch, image[None]) for image in images])
    torch.testing.assert_close(_patched(base, patch, images), single, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_states_are_kept_where_a_unit_overwrites_its_input() -> None:
    class InPlaceUnit(Unit):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.branch(x)).relu_()

    in_place = toy_base([InPlaceUnit(4), InPlaceUnit(4), InPlaceUnit(4)])
    plain = toy_base([Unit(4), Unit(4), Unit(4)])
    plain.module.load_state_dict(in_place.module.state_dict())
    images = plain.example()
    for method in START:
        patch = disturb(method.build(plain, seed=0))
        same = method.build(in_place, seed=0)
        same.load_state_dict(copied_state(patch))
        torch.testing.assert_close(_patched(in_place, same, images), _patched(plain, patch, images))


def test_norm_statistics_of_the_patch_move_in_train_mode_only() -> None:
    base = _own_base()
    patch = Delta().build(base, ("a", "b"), seed=0)
    model = PatchedModel(base)
    model.add_patch("task", patch)
    before = copied_state(patch)
    model(base.example(), patch="task")
    assert all(torch.equal(tensor, before[name]) for name, tensor in patch.state_dict().items())
    model.train()
    model(base.example(), patch="task")
    moved = {name for name, tensor in patch.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)


@pytest.mark.parametrize("norm", ["module", "sum", "both"])
def test_normalisation_stands_where_it_is_asked_for(norm: Literal["module", "sum", "both"]) -> None:
    patch = Delta(norm=norm, start="plain").build(toy_base())
    part = patch.parts[0]
    inside = sum(isinstance(layer, nn.BatchNorm2d) for layer in part.delta.layers)
    assert (inside, len(part.sum_norms)) == {"module": (2, 0), "sum": (0, 2), "both": (2, 2)}[norm]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": 0}, "modules must be 1 or more stages or 'all', not 0"),
        ({"norm": "module"}, "norm must be 'sum' or 'both'"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        Delta(**options)
