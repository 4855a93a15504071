"""Successive halving finds a planted winner, and takes the head where nothing is better."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn
from toys import toy_base

from deltapatch.base import Base
from deltapatch.data import TaskData
from deltapatch.errors import AnatomyError, DataError
from deltapatch.evaluation.comparing import halving
from deltapatch.evaluation.comparing.budget import Budget
from deltapatch.evaluation.comparing.halving import Choice, choose_method, default_candidates
from deltapatch.evaluation.metrics import Evaluation
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.fit import FitResult
from deltapatch.method import Method, registered_methods
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.methods.lora import Lora
from deltapatch.methods.norm import Norm
from deltapatch.patch import Patch

IMAGES = 200


@dataclass(frozen=True)
class Place:
    """Where a planted method has its parameters."""

    parameters: int


@dataclass(frozen=True)
class Planted(Method):
    """A method of so many parameters that gets a known number of the validation images right."""

    name: ClassVar[str] = "head"  # known to patches, so that one can be built
    site_type: ClassVar[type] = Place

    right: int = 0
    parameters: int = 1

    def sites(self, anatomy: Any) -> tuple[Any, ...]:
        if self.right < 0:
            raise AnatomyError("there is no such place")
        return (Place(self.parameters),)

    def part(self, site: Any) -> nn.Module:
        return nn.Linear(site.parameters, 1, bias=False)

    def touches(self, site: Any, part: nn.Module) -> dict[str, Any]:
        return {}

    def configuration(self) -> dict[str, Any]:
        return {}


HEAD_RIGHT = 100
Choose = Callable[..., Choice]


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Method, int]]:
    """Replaces fits by what was planted; holds the method and the epochs of each."""
    fits: list[tuple[Method, int]] = []

    def fit_task(base: Base, task: TaskData, method: Method, config: FitConfig, progress: bool) -> FitResult:
        fits.append((method, config.epochs))
        patch = Patch(method, method.sites(None), Head().build(base, ("a", "b")).info)  # pyright: ignore[reportArgumentType]
        return FitResult(patch, patch, (), 0, False, False, (), (), seconds=60.0 * config.epochs)

    def evaluate(base: Base, images: object, patch: Patch, workers: int) -> Evaluation:
        method = patch.method
        right = method.right if isinstance(method, Planted) else HEAD_RIGHT
        correct: NDArray[np.bool_] = np.arange(IMAGES) < right
        probabilities = np.stack([correct, ~correct], 1).astype(np.float32)
        return Evaluation(("a", "b"), np.zeros(IMAGES, np.int64), probabilities)

    monkeypatch.setattr(halving, "describe", str)
    monkeypatch.setattr(halving, "fit_task", fit_task)
    monkeypatch.setattr(halving, "evaluate", evaluate)
    return fits


@pytest.fixture
def choose(fitted: list[tuple[Method, int]], task: TaskData) -> Choose:
    base = toy_base()

    def run(*candidates: Method, epochs: int = 9, **limits: Any) -> Choice:
        return choose_method(base, task, FitConfig(epochs=epochs), Budget(**limits), candidates)

    return run


def test_the_planted_winner_is_chosen_and_the_weak_ones_are_fitted_for_a_ninth_only(
    choose: Choose, fitted: list[tuple[Method, int]]
) -> None:
    winner = Planted(right=180, parameters=50)
    weak = [Planted(right=right, parameters=10) for right in (90, 95, 105, 110, 115)]
    choice = choose(*weak[:3], winner, *weak[3:])
    assert choice.method == winner
    epochs = {method: [count for fit, count in fitted if fit == method] for method in (winner, *weak)}
    # Two of six go on, and one of those.
    assert epochs[winner] == [1, 3, 9]
    assert epochs[weak[4]] == [1, 3]
    assert all(epochs[method] == [1] for method in weak[:4])


def test_by_how_much_it_won_is_paired_on_the_validation_images(choose: Choose) -> None:
    choice = choose(Planted(right=180), Planted(right=140))
    assert choice.over_head is not None
    assert choice.over_head.difference.value == pytest.approx(0.4)
    assert choice.over_head.verdict == "better"
    assert choice.over_runner_up is not None
    assert "90.0 % of 200 validation images" in choice.by.replace("\u00a0", " ")
    assert "against a head alone, better by 40.0 points" in choice.by


@pytest.mark.parametrize("right", [60, 100])
def test_the_head_is_chosen_when_nothing_is_better(choose: Choose, right: int) -> None:
    choice = choose(Planted(right=right), Planted(right=right - 1))
    assert choice.method == Head()
    assert choice.over_head is None
    assert choice.by.endswith("Nothing was better than a head alone.")


def test_of_equals_the_smaller_patch_is_chosen_and_a_lead_inside_the_noise_is_called_a_tie(
    choose: Choose, fitted: list[tuple[Method, int]]
) -> None:
    large, small = Planted(right=160, parameters=1000), Planted(right=160, parameters=10)
    assert choose(large, small).method == small
    ahead = choose(Planted(right=162, parameters=1000), small, epochs=1)
    assert ahead.method == Planted(right=162, parameters=1000)
    assert ahead.over_runner_up is not None
    assert ahead.over_runner_up.verdict == "tie"


def test_candidates_over_the_budget_or_refused_are_not_fitted_and_named(
    choose: Choose, fitted: list[tuple[Method, int]]
) -> None:
    large, lost, kept = (
        Planted(right=190, parameters=1000),
        Planted(right=-1),
        Planted(right=150, parameters=10),
    )
    choice = choose(large, lost, kept, parameters=100)
    assert choice.method == kept
    assert {method for method, _ in fitted} == {Head(), kept}
    reasons = dict(choice.left_out)
    assert reasons[str(large)] == "1,000 parameters, and 100 are allowed"
    assert reasons[str(lost)] == "there is no such place"


def test_no_rung_is_opened_that_would_take_longer_than_the_minutes(
    choose: Choose, fitted: list[tuple[Method, int]]
) -> None:
    # An epoch takes a minute: nine for the head, two for the first rung; three for the second are too many.
    choice = choose(Planted(right=180), Planted(right=120), minutes=13)
    assert [epochs for _, epochs in fitted] == [9, 1, 1]
    assert choice.method == Planted(right=180)


def test_when_the_time_is_over_within_the_first_rung_one_candidate_has_been_tried(
    choose: Choose, fitted: list[tuple[Method, int]]
) -> None:
    choice = choose(Planted(right=180), Planted(right=190), minutes=1)
    assert len(fitted) == 2
    assert choice.left_out == ((str(Planted(right=190)), "the time was over"),)


def test_without_a_candidate_the_head_is_left(choose: Choose) -> None:
    choice = choose()
    assert choice.method == Head()
    assert choice.over_runner_up is None


def test_an_interrupted_fit_ends_the_search(
    choose: Choose, monkeypatch: pytest.MonkeyPatch, fitted: list[tuple[Method, int]]
) -> None:
    fit_task = halving.fit_task

    def interrupted(*arguments: Any, **options: Any) -> FitResult:
        return replace(fit_task(*arguments, **options), interrupted=True)

    monkeypatch.setattr(halving, "fit_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose(Planted(right=180))
    assert len(fitted) == 1


def test_without_validation_images_there_is_nothing_to_choose_by(task: TaskData) -> None:
    with pytest.raises(DataError, match="no validation images to choose a method by"):
        choose_method(toy_base(), replace(task, val=None))


def test_candidates_are_every_method_in_each_of_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delta, "sizes", classmethod(lambda cls: (Delta(modules=1), Delta(modules=3))))
    candidates = default_candidates()
    assert {Delta(modules=1), Delta(modules=3)} <= set(candidates)
    wanted = {size for cls in registered_methods().values() for size in cls.sizes() if not cls.shares_weights}
    assert len(candidates) == len(set(candidates))
    assert set(candidates) == wanted - {Head()}
    # The smallest of every method comes before the second of any.
    assert candidates.index(Delta(modules=3)) >= len({method.name for method in candidates})


def test_controls_and_ablations_are_no_candidates() -> None:
    names = {method.name for method in default_candidates()}
    assert names.isdisjoint({"head", "interpolate", "skips", "random-weights"})
    assert {"delta", "norm", "lora", "compose", "full", "parallel-adapter", "series-adapter"} <= names


def test_the_sizes_of_a_method_grow(base: Base) -> None:
    for cls in (Delta, Norm, Lora):
        counts = [size.build(base, ("a", "b")).num_parameters() for size in cls.sizes()]
        assert counts == sorted(counts)
        assert counts[0] < counts[-1]


def test_a_real_search_gives_a_patch_that_was_fitted_in_full(base: Base, task: TaskData) -> None:
    lines: list[str] = []
    config = FitConfig(epochs=2, precision="fp32")
    choice = choose_method(base, task, config, candidates=[Delta(modules=1)], tell=lines.append)
    assert choice.result.patch.classes == task.classes
    assert len(choice.ranking) == 2
    assert any(line.startswith("delta (modules=1), at most 2 epochs") for line in lines)
