"""How orders are compared: small cases by hand, and publications' figures from the shipped tables."""

from itertools import combinations, permutations
from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltapatch.selection import SelectionError
from deltapatch.selection.history.carried import read_table
from deltapatch.selection.ranking.agreement import (
    VARIANTS,
    Variant,
    agreement,
    bootstrap_over_models,
    leave_one_model_out,
    mean_agreement,
    weighted_tau,
)

ACCURACIES = (1.0, 2.0, 3.0, 4.0)


def by_definition(ranked_by: list[float], other: list[float]) -> float:
    """Weighted tau without ties: pairs in the same order minus pairs in the other, over all."""
    rank = {value: place for place, value in enumerate(sorted(ranked_by, reverse=True))}
    total = agreed = 0.0
    for i, j in combinations(range(len(ranked_by)), 2):
        weight = 1 / (rank[ranked_by[i]] + 1) + 1 / (rank[ranked_by[j]] + 1)
        total += weight
        agreed += weight * np.sign((ranked_by[i] - ranked_by[j]) * (other[i] - other[j]))
    return agreed / total


def table_figures(table: str, target: str, score: str) -> tuple[list[float], list[float]]:
    rows = [row for row in read_table(table) if row["dataset"] == target]
    return [float(row[score]) for row in rows], [float(row["finetune_accuracy"]) for row in rows]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("scores", "expected"),
    [((1, 3, 2, 4), 0.73333), ((2, 1, 3, 4), 0.81333), ((1, 2, 4, 3), 0.52), ((1, 2, 3, 4), 1.0)],
)
def test_a_mistake_among_the_best_weighs_more_than_among_the_worst(
    scores: tuple[int, ...], expected: float, variant: Variant
) -> None:
    assert weighted_tau(scores, ACCURACIES, variant) == pytest.approx(expected, abs=5e-6)


@given(st.permutations([0.5, 1.0, 2.0, 3.5, 4.0, 7.0]), st.permutations([10.0, 20.0, 30.0, 45.0, 50.0, 60.0]))
def test_each_variant_is_what_its_name_says(scores: list[float], accuracies: list[float]) -> None:
    by_accuracy, by_score = by_definition(accuracies, scores), by_definition(scores, accuracies)
    assert weighted_tau(scores, accuracies, "by-accuracy") == pytest.approx(by_accuracy)
    assert weighted_tau(scores, accuracies, "by-score") == pytest.approx(by_score)
    assert weighted_tau(scores, accuracies) == pytest.approx((by_accuracy + by_score) / 2)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_only_the_order_of_scores_counts_also_with_ties(pairs: list[tuple[int, int]]) -> None:
    scores, accuracies = (list(column) for column in zip(*pairs, strict=True))
    for variant in VARIANTS:
        found = weighted_tau(scores, accuracies, variant)
        assert -1 <= found <= 1
        assert weighted_tau(np.exp(scores), accuracies, variant) == found


@pytest.mark.parametrize(
    ("target", "score", "printed"),
    [
        ("Caltech101", "hscore", 0.721),
        ("Caltech101", "nce", 0.810),
        ("CIFAR10", "hscore", 0.800),
        ("CIFAR10", "leep", 0.638),
        ("CIFAR10", "logme", 0.785),
        ("CIFAR10", "nce", 0.714),
        ("StanfordCars", "hscore", 0.638),
        ("StanfordCars", "leep", 0.703),
        ("StanfordCars", "logme", 0.654),
        ("StanfordCars", "nce", 0.750),
        ("SUN397", "hscore", 0.918),
        ("SUN397", "leep", 0.581),
        ("SUN397", "logme", 0.748),
        ("SUN397", "nce", 0.873),
    ],
)
def test_the_default_is_what_the_transfer_learning_library_printed(
    target: str, score: str, printed: float
) -> None:
    scores, accuracies = table_figures("tllib_scores_10models_8datasets.csv", target, score)
    assert weighted_tau(scores, accuracies) == pytest.approx(printed, abs=5e-4)


@pytest.mark.parametrize(
    ("score", "method"),
    [
        ("hscore", "H-Score"),
        ("nce", "NCE"),
        ("pactrandirichlet", "PACTran"),
        ("otce", "OTCE"),
        ("lfc", "LFC"),
        ("gbc", "GBC"),
    ],
)
def test_ranks_by_accuracy_are_what_model_spider_printed(score: str, method: str) -> None:
    table = "modelspider_scores_10models_8datasets.csv"
    printed = {
        row["target_dataset"].replace("Pets", "Pet"): float(row["weighted_tau"])
        for row in read_table("published_weighted_tau.csv")
        if row["publication"].startswith("Model Spider") and row["method"] == method
    }
    assert len(printed) == 8
    for target, value in printed.items():
        assert weighted_tau(*table_figures(table, target, score), "by-accuracy") == pytest.approx(
            value, abs=6e-4
        )


def test_the_variants_name_different_winners_on_the_same_numbers() -> None:
    table = "modelspider_scores_10models_8datasets.csv"
    targets = sorted({row["dataset"] for row in read_table(table)})

    def mean(score: str, variant: Variant) -> float:
        return float(
            np.mean([weighted_tau(*table_figures(table, target, score), variant) for target in targets])
        )

    assert (mean("hscore", "average"), mean("nce", "average")) == pytest.approx((0.657, 0.655), abs=5e-4)
    assert (mean("hscore", "by-accuracy"), mean("nce", "by-accuracy")) == pytest.approx(
        (0.648, 0.666), abs=5e-4
    )
    found = mean("pactrandirichlet", "average"), mean("pactrandirichlet", "by-accuracy")
    assert found == pytest.approx((0.495, 0.397), abs=5e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_constant_score_says_nothing_which_is_zero(variant: Variant) -> None:
    found = agreement([2.0, 2.0, 2.0, 2.0], ACCURACIES, variant)
    assert (found.weighted_tau, found.kendall_tau, found.pearson, found.tied) == (0.0, 0.0, 0.0, 4)
    # As good as drawing a model by chance.
    assert found.regret == pytest.approx(4 - 2.5)
    assert found.recall == {1: 0.25, 3: 0.75}


def test_constant_accuracies_give_zero_too() -> None:
    found = agreement(ACCURACIES, [5.0] * 4)
    assert (found.weighted_tau, found.kendall_tau, found.pearson, found.regret) == (0.0, 0.0, 0.0, 0.0)
    assert found.recall[1] == 1.0


def test_models_without_a_score_rank_last_and_are_listed() -> None:
    found = agreement([np.nan, 3.0, 2.0, np.nan], [1.0, 4.0, 3.0, 2.0])
    assert found.unscored == (0, 3)
    assert found.tied == 2
    low = agreement([-np.inf, 3.0, 2.0, -np.inf], [1.0, 4.0, 3.0, 2.0])
    assert (found.weighted_tau, found.kendall_tau) == (low.weighted_tau, low.kendall_tau)
    assert low.unscored == ()
    assert found.pearson == pytest.approx(1.0)
    assert agreement([np.nan, np.nan, 1.0], [1.0, 2.0, 3.0]).pearson == 0.0


def test_relative_accuracy_recall_and_regret_of_the_models_chosen() -> None:
    found = agreement([5, 4, 3, 2, 1], [60.0, 80.0, 70.0, 75.0, 50.0])
    assert found.relative_accuracy == pytest.approx({1: 0.75, 3: 1.0, 5: 1.0})
    assert found.recall == {1: 0.0, 3: 0.0, 5: 1.0}
    assert found.regret == pytest.approx(20.0)
    assert found.models == 5


def test_tied_scores_choose_each_of_the_tied_models_as_often() -> None:
    accuracies = [70.0, 90.0, 60.0, 80.0, 50.0]
    scores = [9, 5, 5, 5, 1]
    chosen = [max(accuracies[0], *drawn[:2]) for drawn in permutations([90.0, 60.0, 80.0])]
    found = agreement(scores, accuracies)
    assert found.relative_accuracy[3] == pytest.approx(np.mean(chosen) / 90)
    assert found.relative_accuracy[1] == pytest.approx(70 / 90)


def test_relative_accuracy_of_negated_errors_is_no_number() -> None:
    found = agreement([1, 2], [-0.5, -0.25])
    assert isnan(found.relative_accuracy[1])
    assert found.regret == 0.0


def test_pearson_and_kendall_have_their_closed_forms() -> None:
    found = agreement([0.0, 1.0, 3.0], [0.0, 2.0, 1.0])
    assert found.pearson == pytest.approx(1 / np.sqrt(14 / 3 * 2))
    assert found.kendall_tau == pytest.approx(1 / 3)


def test_one_poor_model_that_carries_a_figure_is_seen_without_it() -> None:
    # Right about the last model alone.
    scores, accuracies = [1.0, 2.0, 3.0, 0.0], [3.0, 2.0, 1.0, 0.0]
    whole = weighted_tau(scores, accuracies)
    without = leave_one_model_out(scores, accuracies)
    assert without.argmin() == 3
    assert without[3] == pytest.approx(-1.0)
    assert whole > -0.5


def test_intervals_over_models_hold_the_value_and_follow_the_seed() -> None:
    rng = np.random.default_rng(0)
    accuracies = rng.standard_normal(12)
    scores = accuracies + 0.5 * rng.standard_normal(12)
    found = bootstrap_over_models(scores, accuracies, draws=200, seed=3)
    assert found.low < found.value < found.high <= 1
    assert found.value == weighted_tau(scores, accuracies)
    assert bootstrap_over_models(scores, accuracies, draws=200, seed=3) == found
    assert bootstrap_over_models(scores, accuracies, draws=200, seed=4) != found
    assert bootstrap_over_models(ACCURACIES, ACCURACIES, draws=50).high == 1.0


def test_the_inputs_are_not_written_to() -> None:
    scores, accuracies = np.array([3.0, np.nan, 1.0]), np.array([1.0, 2.0, 3.0])
    before = scores.copy(), accuracies.copy()
    agreement(scores, accuracies)
    bootstrap_over_models(scores, accuracies, draws=5)
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(accuracies, before[1])


def test_the_mean_over_targets_names_the_worst_one() -> None:
    one, other = agreement([1, 2, 3], [1, 2, 3]), agreement([1, 2, 3], [3, 2, 1])
    found = mean_agreement({"birds": one, "cars": other})
    assert (found.targets, found.weighted_tau, found.worst_target) == (2, pytest.approx(0.0), "cars")
    assert found.lowest_weighted_tau == pytest.approx(-1.0)
    assert found.regret == pytest.approx(1.0)


def test_figures_of_different_variants_are_never_put_together() -> None:
    one = agreement([1, 2], [1, 2])
    other = agreement([1, 2], [1, 2], "by-accuracy")
    with pytest.raises(SelectionError, match="variants average and by-accuracy were put together"):
        mean_agreement({"birds": one, "cars": other})
    with pytest.raises(SelectionError, match="there is no target to average over"):
        mean_agreement({})


@pytest.mark.parametrize(
    ("scores", "accuracies", "variant", "message"),
    [
        ([1, 2], [1, 2, 3], "average", r"scores have shape \(2,\) and accuracies \(3,\)"),
        ([[1, 2]], [[1, 2]], "average", "give one of each for every model"),
        ([1], [1], "average", "1 models cannot be ranked here; give 2 or more"),
        ([1, 2], [1, np.nan], "average", "the accuracy of model 1 is nan"),
        ([1, 2], [1, 2], "scipy", "there is no weighted tau 'scipy'; choose one of average, by-accuracy"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    scores: list[float], accuracies: list[float], variant: Variant, message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        agreement(scores, accuracies, variant)


def test_too_few_models_or_draws_are_refused() -> None:
    with pytest.raises(SelectionError, match="give 3 or more"):
        leave_one_model_out([1, 2], [1, 2])
    with pytest.raises(SelectionError, match="0 draws of models cannot be"):
        bootstrap_over_models([1, 2], [1, 2], draws=0)
