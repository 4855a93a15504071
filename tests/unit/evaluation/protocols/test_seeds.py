"""Spreads against closed forms, and verdicts that chance cannot buy."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.protocols import Spread, compare_over_seeds
from deltapatch.evaluation.protocols.seeds import SeedComparison


def over_seeds(*differences: float) -> SeedComparison:
    """One task; the first method is better by the given differences."""
    second = {("cars", seed): 0.5 for seed in range(len(differences))}
    return compare_over_seeds({key: 0.5 + differences[key[1]] for key in second}, second)


def over_tasks(*differences: float, seeds: int = 1) -> SeedComparison:
    """Many tasks, on each of which the difference is the same for every seed."""
    second = {(f"task {task}", seed): 0.5 for task in range(len(differences)) for seed in range(seeds)}
    return compare_over_seeds({key: 0.5 + differences[int(key[0][5:])] for key in second}, second)


# --- spread -----------------------------------------------------------------------------------------------


def test_the_spread_of_one_two_three_is_known_in_closed_form() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.mean, spread.standard_deviation, spread.n) == (2, 1, 3)
    # Student's quantile for two degrees of freedom at 0.975 is 0.95 * sqrt(2 / (1 - 0.95 ** 2)).
    margin = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 / 3**0.5
    assert (spread.low, spread.high) == pytest.approx((2 - margin, 2 + margin))


def test_the_interval_is_that_of_the_t_test() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.02, 7)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    spread = Spread.of(values.tolist())
    assert (spread.low, spread.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_spread_and_says_so() -> None:
    spread = Spread.of([0.8])
    assert spread.mean == 0.8
    assert np.isnan([spread.standard_deviation, spread.low, spread.high]).all()
    assert str(spread) == "80.0\u00a0% (one seed: its spread is not known)"


def test_a_spread_in_words_has_mean_interval_deviation_and_number_of_seeds() -> None:
    words = str(Spread.of([0.7, 0.8, 0.9]))
    assert words.replace("\u2060", "").replace("\u00a0", " ") == (
        "80.0 % (55.2–104.8), standard deviation 10.0 over 3 seeds"
    )


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_figures_that_are_missing_or_not_finite_have_no_spread(values) -> None:
    with pytest.raises(DeltapatchError, match="one or more finite figures"):
        Spread.of(values)


# --- comparison -------------------------------------------------------------------------------------------


def test_swapping_the_methods_mirrors_the_comparison() -> None:
    first = {("cars", seed): accuracy for seed, accuracy in enumerate((0.71, 0.74, 0.70, 0.75))}
    second = {("cars", seed): accuracy for seed, accuracy in enumerate((0.60, 0.66, 0.61, 0.62))}
    there, back = compare_over_seeds(first, second), compare_over_seeds(second, first)
    assert (there.verdict, back.verdict) == ("better", "worse")
    assert back.difference.value == -there.difference.value
    assert (back.difference.low, back.difference.high) == (-there.difference.high, -there.difference.low)
    assert back.p_value == there.p_value


def test_pairing_by_seed_finds_a_difference_that_is_small_beside_the_spread_of_each_method() -> None:
    noise = np.random.default_rng(0).normal(0.6, 0.1, 8)
    shift = np.random.default_rng(1).normal(0.01, 0.002, 8)
    first = {("cars", seed): float(noise[seed] + shift[seed]) for seed in range(8)}
    second = {("cars", seed): float(noise[seed]) for seed in range(8)}
    assert compare_over_seeds(first, second).verdict == "better"
    assert Spread.of(list(second.values())).high > Spread.of(list(first.values())).low


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [((0.1, 0.2, 0.3), 2 / 8), ((0.1, 0.2, -0.3), 1), ((0.1, 0.2, -0.1), 6 / 8), ((0.1,) * 6, 2 / 64)],
)
def test_the_p_value_is_the_share_of_sign_flips_that_are_as_extreme(differences, p_value) -> None:
    assert over_seeds(*differences).p_value == pytest.approx(p_value)


def test_the_p_value_of_many_units_is_drawn_at_random_and_the_same_every_time() -> None:
    differences = np.random.default_rng(0).normal(0.005, 0.02, 20)
    first = over_seeds(*differences)
    assert first.p_value == over_seeds(*differences).p_value
    # Among all 2 ** 20 sign flips.
    signs = 1 - 2 * ((np.arange(2**20)[:, None] >> np.arange(20)) & 1).astype(np.int8)
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    assert first.p_value == pytest.approx(exact, abs=0.01)


def test_equal_methods_tie_with_certainty() -> None:
    for comparison in (over_seeds(0, 0, 0), over_tasks(0, 0, 0)):
        assert comparison.verdict == "tie"
        assert comparison.p_value == 1
        assert comparison.difference.value == 0


def test_a_difference_inside_the_noise_is_a_tie_however_large() -> None:
    assert over_seeds(0.4, -0.1, 0.3, -0.2).verdict == "tie"


def test_one_seed_is_a_tie_whatever_the_difference() -> None:
    comparison = over_seeds(0.4)
    assert (comparison.verdict, comparison.p_value, comparison.units) == ("tie", 1, 1)
    assert np.isnan(comparison.difference.low)


def test_with_few_units_the_interval_decides_since_no_p_value_could_be_small() -> None:
    comparison = over_seeds(0.10, 0.11, 0.12)
    assert comparison.p_value == pytest.approx(0.25)
    assert comparison.verdict == "better"
    assert over_seeds(-0.10, -0.11, -0.12).verdict == "worse"


def test_with_enough_units_a_difference_has_to_pass_the_exact_test_too() -> None:
    # Student's interval leaves out zero, but 4 of 64 sign flips are as extreme.
    comparison = over_seeds(0.10, 0.10, 0.10, 0.10, 0.10, -0.001)
    assert comparison.difference.low > 0
    assert comparison.p_value == pytest.approx(4 / 64)
    assert comparison.verdict == "tie"


# --- tasks ------------------------------------------------------------------------------------------------


def test_over_several_tasks_more_seeds_are_no_more_evidence() -> None:
    few, many = (over_tasks(0.03, -0.01, 0.05, seeds=seeds) for seeds in (1, 10))
    assert (few.unit, few.units) == (many.unit, many.units) == ("task", 3)
    assert few.difference == many.difference
    assert few.verdict == many.verdict == "tie"


def test_one_task_has_its_seeds_as_units() -> None:
    comparison = over_seeds(0.03, 0.05)
    assert (comparison.unit, comparison.units) == ("seed", 2)


def test_the_interval_over_tasks_is_that_of_their_means_over_seeds() -> None:
    first = {("a", 0): 0.7, ("a", 1): 0.9, ("b", 0): 0.6, ("b", 1): 0.6, ("c", 0): 0.5}
    comparison = compare_over_seeds(first, dict.fromkeys(first, 0.5))
    expected = Spread.of([0.3, 0.1, 0.0])
    found = comparison.difference
    assert (found.value, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_methods_that_ran_on_other_tasks_or_seeds_are_not_compared() -> None:
    with pytest.raises(DeltapatchError, match=r"only one of the two methods .* task 'cars' and seed 1"):
        compare_over_seeds({("cars", 0): 0.5, ("cars", 1): 0.5}, {("cars", 0): 0.5})
    with pytest.raises(DeltapatchError, match="no figure to compare"):
        compare_over_seeds({}, {})
    with pytest.raises(DeltapatchError, match="task 'cars' and seed 0 is nan"):
        compare_over_seeds({("cars", 0): float("nan")}, {("cars", 0): 0.5})
