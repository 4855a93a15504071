"""OSBORN: a hand case of the choice, its submodularity, and terms that are known."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltapatch.selection import SelectionError, osborn
from deltapatch.selection.scores.osborn import (
    EnsembleCandidate,
    choose_best,
    choose_greedily,
    ensemble_cost,
)

UNARY = np.array([1.0, 1.2, 1.3])
PAIRS = np.array([[0.0, 2.0, 0.1], [2.0, 0.0, 0.1], [0.1, 0.1, 0.0]])
LABELS = np.arange(60) % 3


def random_costs(candidates: int, seed: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    pairs = rng.uniform(size=(candidates, candidates))
    pairs += pairs.T
    np.fill_diagonal(pairs, 0)
    return rng.uniform(size=candidates), pairs


def test_the_worked_example() -> None:
    assert choose_greedily(UNARY, PAIRS, 2) == (0, 2)
    assert choose_best(UNARY, PAIRS, 2) == (0, 2)
    costs = {pair: ensemble_cost(UNARY, PAIRS, pair) for pair in combinations(range(3), 2)}
    assert costs == pytest.approx({(0, 1): 4.2, (0, 2): 2.4, (1, 2): 2.6})


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 8), st.integers(0, 1000), st.data())
def test_what_a_model_adds_to_the_value_falls_with_the_ensemble(
    count: int, seed: int, data: st.DataObject
) -> None:
    """f = -cost: f(A + v) - f(A) is at least f(B + v) - f(B) where A is in B."""
    unary, pairs = random_costs(count, seed)
    order = data.draw(st.permutations(range(count)))
    new, rest = order[0], order[1:]
    larger = rest[: data.draw(st.integers(0, len(rest)))]
    smaller = larger[: data.draw(st.integers(0, len(larger)))]

    def adds(members: list[int]) -> float:
        return ensemble_cost(unary, pairs, members) - ensemble_cost(unary, pairs, [*members, new])

    assert adds(smaller) >= adds(larger) - 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 1000))
def test_trying_all_is_never_worse_and_greedy_takes_the_least_step(count: int, size: int, seed: int) -> None:
    size = min(size, count)
    unary, pairs = random_costs(count, seed)
    greedy, best = choose_greedily(unary, pairs, size), choose_best(unary, pairs, size)
    costs = [ensemble_cost(unary, pairs, members) for members in combinations(range(count), size)]
    assert ensemble_cost(unary, pairs, best) == min(costs) <= ensemble_cost(unary, pairs, greedy) + 1e-12
    for step in range(size):
        before = greedy[:step]
        left = [index for index in range(count) if index not in before]
        expected = min(ensemble_cost(unary, pairs, [*before, index]) for index in left)
        assert ensemble_cost(unary, pairs, greedy[: step + 1]) == pytest.approx(expected)


def candidate(shift: float, predictions: NDArray | None, seed: int = 0, width: int = 4) -> EnsembleCandidate:
    rng = np.random.default_rng(seed)
    source = rng.standard_normal((60, width))
    return EnsembleCandidate(source, source + np.eye(width)[0] * shift, predictions)


def test_the_terms_are_transport_and_conditional_entropies() -> None:
    halves = LABELS // 2  # classes 0 and 1 -> 0, class 2 -> 1
    fine = np.arange(60) % 6  # two source classes for each target class
    found = osborn([candidate(1.0, halves), candidate(2.0, fine)], LABELS, size=2, scaled=False)
    np.testing.assert_allclose(found.domain_differences, [1.0, 4.0])
    np.testing.assert_allclose(found.task_differences, [0.0, np.log(2)], atol=1e-12)
    # From six classes the halves follow; from the halves four or two of six are left.
    disagreement = 2 / 3 * np.log(4) + 1 / 3 * np.log(2)
    np.testing.assert_allclose(found.disagreements, [[0, disagreement], [disagreement, 0]], atol=1e-12)
    assert found.chosen == (0, 1)
    assert found.costs == pytest.approx((1.0, 5.0 + np.log(2) + disagreement))
    assert found.cost == found.costs[-1]
    assert found.marginal_error == 0


def test_agreement_decides_between_equals() -> None:
    turned = np.random.default_rng(0).permutation(LABELS)
    same = [candidate(1.0, LABELS, seed) for seed in (0, 1)]
    other = candidate(1.0, turned, 2)
    found = osborn([same[0], other, same[1]], LABELS, size=2)
    assert found.chosen == osborn([same[0], other, same[1]], LABELS, size=2, exhaustive=True).chosen == (0, 2)


def test_width_and_scale_of_a_models_features_do_not_matter() -> None:
    one = candidate(1.0, LABELS)
    wide = EnsembleCandidate(
        np.tile(9 * np.asarray(one.source_features), 5),
        np.tile(9 * np.asarray(one.target_features), 5),
        LABELS,
    )
    found = osborn([one, wide], LABELS, size=2)
    assert found.domain_differences[1] == pytest.approx(found.domain_differences[0])
    plain = osborn([one, wide], LABELS, size=2, scaled=False)
    assert plain.domain_differences[1] == pytest.approx(81 * 5 * plain.domain_differences[0])


def test_standardized_terms_weigh_the_same() -> None:
    rng = np.random.default_rng(0)
    heads = [rng.integers(0, 4, 60) for _ in range(4)]
    pool = [candidate(float(shift), head, shift) for shift, head in enumerate(heads)]
    plain = osborn(pool, LABELS, scaled=False)
    found = osborn(pool, LABELS, scaled=False, standardized=True)
    domain, task = plain.domain_differences, plain.task_differences
    unary = domain / domain.std() + task / task.std()
    pairs = plain.disagreements / plain.disagreements[np.triu_indices(4, 1)].std()
    assert found.cost == pytest.approx(ensemble_cost(unary, pairs, found.chosen))
    np.testing.assert_array_equal(found.disagreements, plain.disagreements)


def test_one_candidate_is_an_ensemble() -> None:
    found = osborn([candidate(1.0, LABELS)], LABELS, size=1, standardized=True)
    assert found.chosen == (0,)


def test_features_of_a_model_without_head_are_clustered() -> None:
    rng = np.random.default_rng(0)
    target = 20 * np.eye(3)[LABELS] + rng.standard_normal((60, 3))
    found = osborn([EnsembleCandidate(rng.standard_normal((60, 3)), target)], LABELS, size=1)
    # Three clusters that are the classes: the class tells the group.
    assert found.task_differences[0] == pytest.approx(0, abs=1e-12)
    more = osborn([EnsembleCandidate(rng.standard_normal((60, 3)), target)], LABELS, size=1, groups=6)
    assert more.task_differences[0] > 0.3


def test_a_class_of_one_sample_is_left_out_of_features_and_predictions() -> None:
    one = candidate(1.0, LABELS)
    target, predictions = np.asarray(one.target_features), np.append(LABELS, 9)
    longer = EnsembleCandidate(one.source_features, np.vstack([target, np.full((1, 4), 99.0)]), predictions)
    expected = osborn([one], LABELS, size=1)
    found = osborn([longer], np.append(LABELS, 5), size=1)
    assert found.cost == expected.cost
    assert found.warnings == ("candidate 0: 1 classes with fewer than 2 samples are left out: 5",)


def test_exact_and_blurred_transport_side_by_side_are_said() -> None:
    other = candidate(1.0, LABELS, 1)
    fewer = EnsembleCandidate(np.asarray(other.source_features)[:50], other.target_features, LABELS)
    found = osborn([candidate(1.0, LABELS), fewer], LABELS, size=2)
    assert "give all as many source images" in found.warnings[-1]
    assert 0 < found.marginal_error <= 1e-6


def test_large_sets_are_drawn_from() -> None:
    one = candidate(1.0, LABELS)
    found, other = (osborn([one], LABELS, size=1, samples=30, seed=seed) for seed in (0, 1))
    assert found.domain_differences[0] != other.domain_differences[0]


def test_nothing_is_written_to() -> None:
    one = candidate(1.0, LABELS.copy())
    before = [np.array(array) for array in (one.source_features, one.target_features, one.predictions)]
    osborn([one, one], LABELS, size=2)
    for array, old in zip((one.source_features, one.target_features, one.predictions), before, strict=True):
        assert np.array_equal(array, old)  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_chosen_is_refused() -> None:
    one = candidate(1.0, LABELS)
    with pytest.raises(SelectionError, match="an ensemble of 3 cannot be chosen from 2 candidates"):
        osborn([one, one], LABELS)
    with pytest.raises(SelectionError, match="an ensemble of 1 cannot be chosen from 0 candidates"):
        osborn([], LABELS, size=1)
    with pytest.raises(SelectionError, match=r"too many to try.* choose greedily"):
        osborn([one] * 26, LABELS, exhaustive=True)
    with pytest.raises(SelectionError, match="too many to try"):
        choose_best(*random_costs(5, 0), size=4)
    with pytest.raises(SelectionError, match="candidate 1: 59 predictions and 60 labels"):
        osborn([one, candidate(1.0, LABELS[1:])], LABELS, size=1)
    bad = EnsembleCandidate(np.full((5, 4), np.nan), one.target_features, LABELS)
    with pytest.raises(SelectionError, match="candidate 0: source features hold NaN"):
        osborn([bad], LABELS, size=1)
    with pytest.raises(SelectionError, match="candidate 0: 60 samples cannot be clustered into 61 groups"):
        osborn([candidate(1.0, None)], LABELS, size=1, groups=61)
    with pytest.raises(SelectionError, match="groups is 1"):
        osborn([one], LABELS, size=1, groups=1)
