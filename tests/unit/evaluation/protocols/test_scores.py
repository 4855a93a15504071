"""Closed forms of the scores, with figures as they were published."""

import numpy as np
import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.protocols import AccuracyMatrix, distance_to_optimal, harmonic_mean, mean

NAN = float("nan")


def one_step(*percent: float) -> AccuracyMatrix:
    """A matrix whose last row is the given one; its first column is the supporting task."""
    names = tuple("abcdef"[: len(percent)])
    base = [percent[0], *[NAN] * (len(percent) - 1)]
    return AccuracyMatrix(names, ("base", "only"), np.array([base, percent]) / 100)


# --- means ------------------------------------------------------------------------------------------------


def test_the_harmonic_mean_of_base_and_patch_is_the_published_one() -> None:
    assert round(harmonic_mean([68.87, 94.14]), 2) == 79.55


def test_the_harmonic_mean_of_any_number_of_equal_accuracies_is_that_accuracy() -> None:
    assert [harmonic_mean([0.3] * count) for count in (1, 2, 5)] == pytest.approx([0.3] * 3)
    assert harmonic_mean([1, 1 / 2, 1 / 3]) == pytest.approx(0.5)


def test_one_accuracy_of_zero_makes_the_harmonic_mean_zero_and_one_unknown_makes_both_unknown() -> None:
    assert harmonic_mean([0.9, 0.0]) == 0
    assert mean([0.9, 0.0]) == pytest.approx(0.45)
    assert np.isnan(harmonic_mean([0.9, NAN, 0.0]))
    assert np.isnan(mean([0.9, NAN]))


@pytest.mark.parametrize("wrong", [[], [0.5, -0.1]])
@pytest.mark.parametrize("score", [harmonic_mean, mean])
def test_no_accuracy_or_a_negative_one_has_no_mean(score, wrong) -> None:
    with pytest.raises(DeltapatchError, match="one or more accuracies from 0 on"):
        score(wrong)


def test_the_two_means_choose_different_mixtures_of_base_and_fine_tuned_weights() -> None:
    pairs = list(zip((80, 60, 20), (30, 50, 95), strict=True))
    harmonic = [harmonic_mean(pair) for pair in pairs]
    assert [round(score, 1) for score in harmonic] == [43.6, 54.5, 33.0]
    assert int(np.argmax(harmonic)) == 1
    assert [mean(pair) for pair in pairs] == [55, 55, 57.5]


# --- distance to optimal ----------------------------------------------------------------------------------


def test_the_distance_to_optimal_is_what_the_best_mixture_lacks() -> None:
    # Two models reach (95 + 80) / 2 = 87.5, the best mixture (95 + 20) / 2 = 57.5.
    assert distance_to_optimal(95, 80, patched=(30, 50, 95), supporting=(80, 60, 20)) == 30


def test_a_patch_that_leaves_the_base_as_it_is_lacks_half_of_what_fine_tuning_gains() -> None:
    assert distance_to_optimal(0.95, 0.8, patched=[0.90], supporting=[0.8]) == pytest.approx(0.025)


@pytest.mark.parametrize(("patched", "supporting"), [([], []), ([0.5], [0.5, 0.6])])
def test_the_distance_to_optimal_needs_a_pair_for_each_candidate(patched, supporting) -> None:
    with pytest.raises(DeltapatchError, match="give one pair for each candidate"):
        distance_to_optimal(0.9, 0.8, patched, supporting)


# --- the matrix -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "published"),
    [
        ((68.87, 35.16, 83.9, 94.14), 70.52),
        ((68.87, 71.62, 35.42, 83.9), 64.95),
        ((68.87, 94.14, 35.42, 71.62), 67.51),
        ((82.47, 60.19, 93.15, 98.29), 83.52),
        ((0.12, 1.02, 1.73, 77.20), 20.02),
    ],
)
def test_the_mean_of_the_last_row_is_the_published_score_of_sequential_patching(
    accuracies, published
) -> None:
    """Which shows that the supporting task is one of those that are averaged."""
    assert 100 * one_step(*accuracies).score("mean") == pytest.approx(published, abs=0.0051)


def test_the_harmonic_mean_of_the_last_row_is_the_published_score_of_single_task_patching() -> None:
    assert round(100 * one_step(68.87, 94.14).score("harmonic"), 2) == 79.55


def make_matrix() -> AccuracyMatrix:
    values = [[0.8, NAN, NAN], [0.6, 0.9, NAN], [0.7, 0.5, 0.4], [0.5, 0.6, 0.6]]
    return AccuracyMatrix(("own", "a", "b"), ("base", "a", "b", "a again"), np.array(values))


def test_forgetting_is_the_best_earlier_accuracy_minus_the_present_one() -> None:
    expected = [[NAN, NAN, NAN], [0.2, NAN, NAN], [0.1, 0.4, NAN], [0.3, 0.3, -0.2]]
    np.testing.assert_allclose(make_matrix().forgetting(), expected, atol=1e-12)


def test_the_final_accuracies_are_the_last_row_by_name() -> None:
    assert make_matrix().final() == {"own": 0.5, "a": 0.6, "b": 0.6}


def test_a_matrix_knows_whether_its_first_column_is_the_supporting_task() -> None:
    assert make_matrix().has_supporting
    assert not AccuracyMatrix(("a",), ("base", "a"), np.array([[NAN], [0.5]])).has_supporting


def test_a_matrix_is_written_in_percent_with_a_dash_where_nothing_was_measured() -> None:
    assert one_step(68.87, 94.14).as_markdown() == (
        "| after | a | b |\n| --- | ---: | ---: |\n| base | 68.87 | – |\n| only | 68.87 | 94.14 |\n"
    )


def test_a_name_cannot_end_its_cell_or_its_row() -> None:
    matrix = AccuracyMatrix(("a|b",), ("base", "one\ntwo"), np.array([[NAN], [0.5]]))
    header, _, _, last = matrix.as_markdown().splitlines()
    assert header == r"| after | a\|b |"
    assert last == "| one two | 50.00 |"


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        (("base",), [[0.5], [0.5]], "have shape"),
        (("first", "a"), [[0.5], [0.5]], "has to be 'base'"),
        (("base", "a"), [[NAN], [68.87]], "parts, not percent"),
        (("base", "a"), [[NAN], [float("inf")]], "not between 0 and 1"),
        (("base", "a"), [[NAN], [-0.1]], "not between 0 and 1"),
    ],
)
def test_a_matrix_that_cannot_be_is_refused(rows, values, message) -> None:
    with pytest.raises(DeltapatchError, match=message):
        AccuracyMatrix(("task",), rows, np.array(values))
