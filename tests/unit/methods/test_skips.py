"""Skips with fixed and learned weights: the base as a special case, the formula by hand, the variances."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import Net, Unit, copied_state, disturb, toy_base

from deltapatch.base import Base
from deltapatch.errors import AnatomyError, DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods.skips import Skips
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel


def _patched(base: Base, patch: Patch, images: Tensor) -> Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    with torch.no_grad():
        return model(images, patch="task")


def _set_weights(patch: Patch, values: Sequence[float]) -> None:
    (part,) = patch.parts
    with torch.no_grad():
        part.weights.copy_(torch.tensor(values))


class Branch(Unit):
    """``relu(W x)``: a unit without a skip."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.branch(x))


# --- the base as a special case ---------------------------------------------------------------------------

RESIDUAL = ["resnet18", "resnet50", "convnext_atto", "mobilenetv2_100", "efficientnet_b0", "regnetx_002"]


@pytest.mark.parametrize("name", RESIDUAL)
def test_learned_weights_start_bit_exactly_at_the_base(name: str) -> None:
    torch.manual_seed(0)
    base = load_base(f"timm/{name}", weights="random", size=64)
    with torch.no_grad():
        expected = base.module(base.example())
    for method in (Skips(which="existing"), Skips()):
        patch = method.build(base, seed=0)
        assert torch.equal(_patched(base, patch, base.example()), expected)
        assert not torch.equal(_patched(base, disturb(patch), base.example()), expected)


def test_new_skips_of_a_base_without_any_start_bit_exactly_at_it() -> None:
    torch.manual_seed(0)
    base = load_base("timm/densenet121", weights="random", size=64)
    with torch.no_grad():
        expected = base.module(base.example())
    assert torch.equal(_patched(base, Skips().build(base), base.example()), expected)


def test_a_transformer_starts_at_the_base_up_to_rounding() -> None:
    """A block with two additions is told from its input by a subtraction, which rounds."""
    torch.manual_seed(0)
    base = load_base("timm/vit_tiny_patch16_224", weights="random", size=224)
    with torch.no_grad():
        expected = base.module(base.example())
    patched = _patched(base, Skips().build(base), base.example())
    torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_where_the_base_has_no_skip_there_is_no_existing_one() -> None:
    base = toy_base([Unit(4), Branch(4), Unit(4)])
    patch = Skips(which="existing").build(base)
    assert patch.num_parameters() == 2
    assert torch.equal(_patched(base, patch, base.example()), base.module(base.example()))
    _set_weights(patch, [1.0, 0.0])
    f2 = base.module.stage[:2](base.module.stem(base.example()))
    f3 = functional.relu(base.module.stage[2].branch(f2))
    torch.testing.assert_close(_patched(base, patch, base.example()), base.module.fc(f3.mean((2, 3))))


def test_a_base_without_skips_has_nothing_to_weigh_but_may_get_new_ones() -> None:
    base = toy_base([Branch(4), Branch(4)])
    with pytest.raises(AnatomyError, match="which='all' introduces new ones"):
        Skips(which="existing").build(base)
    patch = Skips().build(base)
    assert patch.parts[0].weights.tolist() == [0, 0, 0]


# --- the formula by hand ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("outputs", [4, 6])
def test_the_weighted_sum_of_all_states_takes_the_place_of_the_shortcut(outputs: int) -> None:
    first, second = Unit(4, outputs), Unit(outputs)
    base = toy_base([first, second], features=outputs)
    patch = Skips().build(base)
    _set_weights(patch, [0.5, -1.0, 2.0])
    images = base.example(3)
    x = base.module.stem(images)
    f0 = x if first.projection is None else first.projection(x)
    f1 = functional.relu(first.branch(x) + 0.5 * f0)
    f2 = functional.relu(second.branch(f1) - 1.0 * f0 + 2.0 * f1)
    torch.testing.assert_close(_patched(base, patch, images), base.module.fc(f2.mean((2, 3))))


@torch.no_grad()
def test_existing_skips_have_one_weight_each_and_no_other_state_enters() -> None:
    first, second = Unit(4), Unit(4)
    base = toy_base([first, second])
    patch = Skips(which="existing").build(base)
    _set_weights(patch, [0.5, 2.0])
    images = base.example(3)
    f0 = base.module.stem(images)
    f1 = functional.relu(first.branch(f0) + 0.5 * f0)
    f2 = functional.relu(second.branch(f1) + 2.0 * f1)
    torch.testing.assert_close(_patched(base, patch, images), base.module.fc(f2.mean((2, 3))))


@torch.no_grad()
def test_each_sum_has_a_normalisation_of_its_own() -> None:
    first, second = Unit(4), Unit(4)
    base = toy_base([first, second])
    patch = disturb(Skips(weights="one", norm=True).build(base))
    norms = patch.parts[0].sum_norms
    images = base.example(3)
    f0 = base.module.stem(images)
    f1 = functional.relu(first.branch(f0) + norms[0](f0))
    f2 = functional.relu(second.branch(f1) + norms[1](f0 + f1))
    torch.testing.assert_close(_patched(base, patch, images), base.module.fc(f2.mean((2, 3))))


# --- all skips with weight 1 ------------------------------------------------------------------------------


class Line(nn.Module):
    """``W x + x`` without an activation; W is 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(width, width, 1, bias=False))
        nn.init.zeros_(self.branch[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


def _states(base: Base, patch: Patch, images: Tensor) -> list[Tensor]:
    """h_1 ... h_n as the patched stage gives them."""
    found: list[Tensor] = []
    handles = [unit.register_forward_hook(lambda *args: found.append(args[2])) for unit in base.module.stage]
    _patched(base, patch, images)
    for handle in handles:
        handle.remove()
    return found


def test_with_branches_of_zero_each_state_is_twice_the_one_before() -> None:
    """h_n = Σ_{i<n} h_i, so that h_1 = h_0 and h_n = 2^(n-1) h_0; with one skip each, h_n = h_0."""
    base = toy_base([Line(4) for _ in range(5)])
    images = base.example()
    with torch.no_grad():
        start = base.module.stem(images)
    everything = _states(base, Skips(weights="one").build(base), images)
    assert all(torch.equal(state, 2.0**step * start) for step, state in enumerate(everything))
    only_its_own = _states(base, Skips(which="existing").build(base), images)
    assert all(torch.equal(state, start) for state in only_its_own)


class Shuffled(Line):
    """``P (Q x + x)`` with an orthonormal Q and, in place of an activation, a P that shuffles channels and
    turns the signs of half of them: no two terms of any sum are correlated.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.orthogonal_(self.branch[0].weight.view(width, width))
        self.order = torch.randperm(width).tolist()
        self.register_buffer("signs", torch.randn(width, 1, 1).sign())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order] * self.signs


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Skips(which="existing"), [2.0, 4.0, 8.0, 16.0, 32.0]),
        (Skips(weights="one"), [2.0, 5.0, 13.0, 34.0, 89.0]),
    ],
    ids=["one skip: powers of two", "all skips: every second Fibonacci number"],
)
def test_the_variance_grows_with_the_skips(method: Skips, expected: list[float]) -> None:
    torch.manual_seed(0)
    width = 512
    net = Net([Shuffled(width) for _ in range(5)], width)
    net.stem = nn.Conv2d(width, width, 1, bias=False)
    nn.init.dirac_(net.stem.weight)
    base = Base(net.eval(), name="orthonormal", source="", preprocessing=toy_base().preprocessing)
    base.example = lambda images=2: torch.randn(images, width, 2, 2)
    states = _states(base, method.build(base), torch.randn(16, width, 2, 2))
    variances = torch.stack([state.var() for state in states])
    torch.testing.assert_close(variances, torch.tensor(expected), rtol=0.08, atol=0)


# --- what trains and what does not ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (Skips(which="existing"), 4 * 2),
        (Skips(), 4 * 3),
        (Skips(modules=1), 3),
        (Skips(norm=True), 4 * 3 + 2 * 2 * (64 + 128 + 256 + 512)),
        (Skips(weights="one", norm=True), 2 * 2 * (64 + 128 + 256 + 512)),
        (Skips(weights="one"), 0),
        (Skips(weights="random"), 0),
        (Skips(weights="redrawn"), 0),
        (Skips(weights="untrained-module"), 0),
    ],
)
def test_parameters_are_counted_in_closed_form(resnet18: Base, method: Skips, count: int) -> None:
    """n a stage, or n (n + 1) / 2, and a scale and a shift for each channel of each normalised sum."""
    assert method.build(resnet18).num_parameters() == count


@pytest.fixture(scope="module")
def resnet18() -> Base:
    torch.manual_seed(0)
    return load_base("timm/resnet18", weights="random", size=64)


def test_random_weights_are_drawn_once_and_are_in_the_file(tmp_path: Path) -> None:
    base = toy_base([Unit(4) for _ in range(8)])
    patch = Skips(weights="random").build(base, seed=0)
    weights = patch.parts[0].weights
    assert weights.shape == (36,)
    assert ((weights >= 0) & (weights < 1)).all()
    assert weights.mean().item() == pytest.approx(0.5, abs=0.15)
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    assert torch.equal(loaded.parts[0].weights, weights)
    assert not torch.equal(Skips(weights="random").build(base, seed=1).parts[0].weights, weights)
    assert torch.equal(_patched(base, patch.train(), base.example()), _patched(base, loaded, base.example()))


def test_redrawn_weights_differ_from_batch_to_batch_in_train_mode_and_are_a_half_in_eval_mode() -> None:
    base = toy_base()
    model = PatchedModel(base)
    model.add_patch("redrawn", Skips(weights="redrawn").build(base, seed=0))
    halves = Skips().build(base)
    _set_weights(halves, [0.5, 0.5, 0.5])
    images = base.example()
    with torch.no_grad():
        assert torch.equal(model(images, patch="redrawn"), _patched(base, halves, images))
        model.train()
        torch.manual_seed(0)
        first, second = (model(images, patch="redrawn") for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(model(images, patch="redrawn"), first)


def test_an_untrained_module_weighs_each_image_for_itself_and_is_in_the_file(tmp_path: Path) -> None:
    base = toy_base([Unit(16) for _ in range(3)], width=16)
    patch = Skips(weights="untrained-module").build(base, seed=0)
    (part,) = patch.parts
    assert list(part.parameters()) == []
    weights = part.skip_weights(torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert weights.shape == (2, 6)
    assert ((weights > 0) & (weights < 1)).all()
    assert weights.std(1).min() > 0.05
    assert (weights[0] - weights[1]).abs().min() > 1e-5
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    assert torch.equal(_patched(base, loaded, base.example()), _patched(base, patch, base.example()))


@pytest.mark.parametrize("weights", ["random", "redrawn", "untrained-module"])
def test_a_step_of_training_changes_the_head_alone_where_weights_do_not_train(weights: str) -> None:
    base = toy_base()
    model = PatchedModel(base)
    model.add_patch("task", Skips(weights=weights).build(base, ("a", "b"), seed=0))  # pyright: ignore
    patch = model.patches["task"]
    before = copied_state(patch)
    model.train()
    optimizer = torch.optim.SGD(patch.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(base.example(), patch="task"), torch.tensor([0, 1])).backward()
    optimizer.step()
    moved = {name for name, tensor in patch.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": 0}, "modules must be 1 or more stages or 'all', not 0"),
        ({"weights": "one", "start": "one"}, "weights='one' are not learned"),
        ({"which": "existing", "weights": "one"}, "are the base itself"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        Skips(**options)  # pyright: ignore
