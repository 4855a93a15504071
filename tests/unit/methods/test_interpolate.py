"""PAINT: the ends are exact, and α is chosen as the specification's examples say."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from toys import NormUnit, disturb, toy_base

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError
from deltapatch.method import Judgement
from deltapatch.methods.interpolate import Interpolate, best_of, interpolated_linear
from deltapatch.normalising import Gathering
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

CLASSES = ("a", "b", "c", "d", "e")


@dataclass
class Bench:
    """Judges by α as a table says, and notes for which α statistics were gathered."""

    table: dict[float, tuple[float, float | None]]
    gathered: list[float] = field(default_factory=list)

    def judge(self, patch: Patch) -> Judgement | None:
        assert isinstance(patch.method, Interpolate)
        found = self.table.get(patch.method.alpha)
        return None if found is None else Judgement(*found)

    def gather(self, patch: Patch, gathering: Gathering) -> None:
        self.gathered.append(patch.method.alpha)


@pytest.fixture(scope="module")
def base() -> Base:
    return toy_base([NormUnit(4, 4), NormUnit(4, 4)])


@pytest.fixture
def fitted(base: Base) -> Patch:
    return disturb(Interpolate(alpha=1.0).build(base, CLASSES, seed=0))


@torch.no_grad()
def _answers(base: Base, patch: Patch) -> torch.Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    return model(base.example(), patch="task")


def test_at_0_the_base_answers_and_at_1_the_fine_tuned_copy_bit_for_bit(base: Base, fitted: Patch) -> None:
    headless = fitted.without_head()
    at_1 = headless.as_method(Interpolate(alpha=1.0))
    at_0 = headless.as_method(Interpolate(alpha=0.0))
    assert torch.equal(_answers(base, at_1), _answers(base, headless))
    with torch.no_grad():
        assert torch.equal(_answers(base, at_0), base.module(base.example()))
    assert not torch.equal(_answers(base, at_1), _answers(base, at_0))


@torch.no_grad()
def test_half_way_every_weight_and_statistic_is_the_mean_of_both_ends(base: Base, fitted: Patch) -> None:
    half = fitted.as_method(Interpolate(alpha=0.5))
    for site, part in zip(half.sites, half.parts, strict=True):
        (touch,) = half.method.touches(site, part).values()
        module = base.submodule(site.path)
        for name, tensor in touch.tensors(module).items():
            if name == "num_batches_tracked":
                continue
            own = getattr(module, name)
            end = getattr(part, name) if site.kind == "normalisation" else own + getattr(part, name)
            torch.testing.assert_close(tensor, (own + end) / 2)


def test_the_harmonic_mean_and_the_mean_choose_as_in_the_specification() -> None:
    rows = [Judgement(0.30, 0.80), Judgement(0.50, 0.60), Judgement(0.95, 0.20)]
    assert best_of(rows, "harmonic") == 1
    assert best_of(rows, "mean") == 2


def test_of_equals_the_one_nearest_the_base_is_chosen_and_0_is_no_division_by_zero() -> None:
    assert best_of([Judgement(0.0, 0.5), Judgement(0.5, 0.4), Judgement(0.4, 0.5)], "harmonic") == 1
    assert best_of([Judgement(0.5, None), Judgement(0.5, None)], "mean") == 0


def test_the_search_keeps_what_each_alpha_reached_and_the_chosen_configuration(
    base: Base, fitted: Patch
) -> None:
    bench = Bench({0.0: (0.3, 0.8), 0.5: (0.5, 0.6), 1.0: (0.95, 0.2)})
    found = Interpolate(steps=3).finished(fitted, base, bench)
    assert found.method == Interpolate(alpha=0.5, steps=3)
    assert found.info.method.config["alpha"] == 0.5
    figures = found.info.figures
    assert figures["interpolation/alpha"] == 0.5
    assert figures["interpolation/1.00/task"] == 0.95
    assert figures["interpolation/1.00/supporting"] == 0.2
    assert bench.gathered == []


def test_statistics_are_re_estimated_for_every_alpha_and_last_for_the_chosen_one(
    base: Base, fitted: Patch
) -> None:
    bench = Bench({0.0: (0.9, None), 0.5: (0.5, None), 1.0: (0.2, None)})
    method = Interpolate(steps=3, statistics="re-estimated")
    found = method.finished(fitted.as_method(method.fitted_as()), base, bench)
    assert bench.gathered == [0.0, 0.5, 1.0, 0.0]
    assert found.method.alpha == 0.0


def test_without_validation_images_alpha_is_the_sources_default(base: Base, fitted: Patch) -> None:
    assert Interpolate().finished(fitted, base, Bench({})).method.alpha == 0.5


def test_the_head_is_interpolated_from_the_bases_classifier(base: Base, fitted: Patch) -> None:
    method = Interpolate(head=True, alpha=0.0)
    at_0 = method.finished(fitted.as_method(method.fitted_as()), base, Bench({}))
    with torch.no_grad():
        assert torch.equal(_answers(base, at_0), base.module(base.example()))
    start = method.starting_head(base, CLASSES)
    assert torch.equal(start.weight, base.module.fc.weight)
    with pytest.raises(DeltapatchError, match="2 outputs, but it has 5"):
        method.starting_head(base, ("a", "b"))


def test_a_linear_layer_on_the_way_is_exact_at_both_ends() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert torch.equal(interpolated_linear(first, second, 0.0).weight, first.weight)
    assert torch.equal(interpolated_linear(first, second, 1.0).bias, second.bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 1.5}, "between 0"), ({"steps": 1}, "2 or more"), ({"modules": 0}, "stages")],
)
def test_options_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        Interpolate(**options)
