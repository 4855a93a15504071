import math

import numpy as np
import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.metrics import Evaluation, Interval, compare_answers, paired_difference


def evaluation(labels, probabilities, classes="abc"):
    return Evaluation(tuple(classes), np.asarray(labels, np.int64), np.asarray(probabilities, np.float32))


@pytest.fixture
def nine(answers):
    """Nine images of a, b and c; a is right 3 of 4 times, b 2 of 3, c 1 of 2."""
    return answers([0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 0])


@pytest.fixture
def with_an_absent_class(answers):
    return answers([0, 0, 1, 1], [0, 0, 1, 2])


def test_the_wilson_interval_of_8_in_10_is_the_published_one():
    interval = Interval.of_proportion(8, 10)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.8, 0.490, 0.943), abs=5e-4)


def test_the_wilson_interval_stays_inside_zero_and_one():
    assert Interval.of_proportion(5, 5).high == 1
    assert Interval.of_proportion(0, 5).low == 0
    assert 0 < Interval.of_proportion(5, 5).low < 1


def test_the_confusion_matrix_has_the_truth_in_its_rows(nine):
    assert nine.confusion.tolist() == [[3, 1, 0], [0, 2, 1], [1, 0, 1]]


def test_the_figures_of_nine_images_are_those_computed_by_hand(nine):
    assert nine.accuracy.value == pytest.approx(6 / 9)
    assert nine.balanced_accuracy == pytest.approx((3 / 4 + 2 / 3 + 1 / 2) / 3)
    assert nine.macro_f1 == pytest.approx((6 / 8 + 4 / 6 + 2 / 4) / 3)


def test_each_class_has_its_count_recall_and_precision(nine):
    a, b, c = nine.per_class
    assert [(result.name, result.count) for result in (a, b, c)] == [("a", 4), ("b", 3), ("c", 2)]
    assert a.recall == Interval.of_proportion(3, 4)
    assert (a.precision, b.precision, c.precision) == pytest.approx((3 / 4, 2 / 3, 1 / 2))


def test_a_class_without_images_has_no_recall_and_no_part_in_the_means(with_an_absent_class):
    absent = with_an_absent_class.per_class[2]
    assert (absent.count, absent.recall, absent.precision) == (0, None, 0)
    assert with_an_absent_class.balanced_accuracy == pytest.approx((1 + 1 / 2) / 2)
    assert with_an_absent_class.macro_f1 == pytest.approx((1 + 2 / 3) / 2)


def test_a_class_that_was_never_answered_has_no_precision(answers):
    assert answers([0, 2], [0, 0]).per_class[2].precision is None


def test_top5_counts_the_images_with_the_truth_among_five(answers):
    ranked = np.array([6, 5, 4, 3, 2, 1]) / 21
    found = evaluation([4, 5, 0, 5], [ranked] * 4, "abcdef").top5
    assert found == Interval.of_proportion(2, 4)
    assert answers([0, 1], [0, 1], "abcde").top5 is None


def test_the_log_loss_is_the_mean_negative_log_probability_of_the_truth():
    two = evaluation([0, 1], [[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    assert two.log_loss == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_a_certain_wrong_answer_has_a_finite_log_loss():
    assert 10 < evaluation([1], [[1, 0, 0]]).log_loss < 40


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy(answers):
    assert answers([0, 0, 0, 0], [0, 0, 1, 2], confidence=0.8).calibration_error == pytest.approx(0.3)


def test_the_calibration_error_does_not_mix_confidences_of_different_bins():
    found = evaluation([0, 1], [[0.62, 0.19, 0.19], [0.68, 0.16, 0.16]])
    assert found.calibration_error == pytest.approx(((1 - 0.62) + 0.68) / 2)


def test_the_calibration_error_of_confident_and_right_answers_is_zero(answers):
    assert answers([0, 1, 2], [0, 1, 2], confidence=1.0).calibration_error == pytest.approx(0)


def test_the_most_confused_images_are_the_wrong_ones_by_confidence():
    rows = [[0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.0, 0.1, 0.9], [0.98, 0.01, 0.01]]
    found = evaluation([1, 0, 0, 0], rows)
    assert found.most_confused(5) == [2, 1, 0]
    assert found.most_confused(2) == [2, 1]


def test_nothing_is_most_confused_where_everything_is_right(answers):
    right = answers([0, 1], [0, 1])
    assert right.most_confused(3) == []
    assert right.most_confused_pairs(3) == []


def test_the_most_confused_pairs_name_truth_answer_and_counts(answers):
    found = answers([0, 0, 0, 1, 1, 2], [1, 1, 2, 0, 1, 2]).most_confused_pairs(2)
    assert [(pair.truth, pair.prediction, pair.count, pair.total) for pair in found] == [
        ("a", "b", 2, 3),
        ("a", "c", 1, 3),
    ]


def test_the_figures_carry_the_prefix_and_are_finite(with_an_absent_class):
    figures = with_an_absent_class.figures("test")
    assert figures["test/accuracy"] == 0.75
    assert figures["test/images"] == 4
    assert "test/top5_accuracy" not in figures
    assert all(math.isfinite(value) for value in figures.values())


def test_the_figures_have_top5_from_six_classes_on(answers):
    assert answers([0, 1], [0, 1], "abcdef").figures("validation")["validation/top5_accuracy"] == 1


def test_an_empty_split_is_refused():
    with pytest.raises(DeltapatchError, match="no readable image"):
        evaluation([], np.zeros((0, 3)))


def test_probabilities_that_are_not_finite_are_refused_with_the_first_image():
    with pytest.raises(DeltapatchError, match=r"1 of 2 images are not finite \(first: image 1\)"):
        evaluation([0, 0], [[1, 0, 0], [np.nan, 0, 0]])


@pytest.mark.parametrize("row", [[2.5, -1.0, 0.3], [2.0, -0.5, -0.5]])
def test_logits_are_not_taken_for_probabilities(row):
    with pytest.raises(DeltapatchError, match="softmax"):
        evaluation([0], [row])


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_refused(label):
    with pytest.raises(DeltapatchError, match="number them 0 to 2"):
        evaluation([0, label], [[1, 0, 0], [1, 0, 0]])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DeltapatchError, match=r"give shapes \(N,\) and \(N, 3\)"):
        evaluation([0, 0], [[1, 0, 0]])


def test_a_single_class_is_refused():
    with pytest.raises(DeltapatchError, match="two or more classes"):
        evaluation([0], [[1]], "a")


def disagreeing(answers, both, only_first, only_second):
    """Two evaluations of label 0 that are right together, alone, and never both wrong."""
    labels = [0] * (both + only_first + only_second)
    first = answers(labels, [0] * (both + only_first) + [1] * only_second)
    second = answers(labels, [0] * both + [1] * only_first + [0] * only_second)
    return paired_difference(first, second)


@pytest.mark.parametrize(("only_first", "only_second", "verdict"), [(9, 1, "better"), (1, 9, "worse")])
def test_nine_to_one_is_a_difference_with_the_exact_mcnemar_p_value(
    answers, only_first, only_second, verdict
):
    found = disagreeing(answers, 10, only_first, only_second)
    assert found.p_value == pytest.approx(0.0215, abs=5e-5)
    assert found.verdict == verdict
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.difference.value == pytest.approx((only_first - only_second) / 20)


def test_the_interval_of_a_paired_difference_is_bonett_and_price(answers):
    found = disagreeing(answers, 90, 9, 1).difference
    margin = 1.959964 * math.sqrt((12 / 102 - (8 / 102) ** 2) / 102)
    assert found.value == pytest.approx(0.08)
    assert (found.low, found.high) == pytest.approx((8 / 102 - margin, 8 / 102 + margin), abs=1e-6)


def test_a_difference_with_p_above_5_percent_is_a_tie(answers):
    found = disagreeing(answers, 10, 7, 1)
    assert found.p_value == pytest.approx(18 / 256)
    assert found.verdict == "tie"


def test_the_interval_of_a_small_difference_holds_zero(answers):
    found = disagreeing(answers, 10, 5, 2)
    assert found.difference.low < 0 < found.difference.high


def test_equal_answers_are_a_tie_with_some_room_for_chance(answers):
    found = disagreeing(answers, 10, 0, 0)
    assert (found.p_value, found.verdict, found.difference.value) == (1, "tie", 0)
    assert found.difference.low < 0 < found.difference.high


def test_the_interval_of_a_difference_stays_inside_minus_one_and_one(answers):
    assert disagreeing(answers, 0, 1, 0).difference.high == 1
    assert disagreeing(answers, 0, 0, 1).difference.low == -1


def test_answers_of_several_seeds_count_each_image_once_for_the_model_that_is_right_more_often():
    first = np.array([1.0] * 8 + [0.5] * 4 + [0.0] * 8)
    second = np.array([0.5] * 8 + [1.0] * 2 + [0.5] * 2 + [0.0] * 8)
    found = compare_answers(first, second)
    assert (found.only_first, found.only_second) == (8, 2)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert found.difference.value == pytest.approx((8 - 2) * 0.5 / 20)
    # Two more images, with the differences 1 and -1.
    centre, variance = 3 / 22, (10 * 0.25 + 2) / 22 - (3 / 22) ** 2
    assert found.difference.high == pytest.approx(centre + 1.959964 * math.sqrt(variance / 22), abs=1e-6)


def test_evaluations_of_other_images_are_not_compared(answers):
    with pytest.raises(DeltapatchError, match="same split in the same order"):
        paired_difference(answers([0, 1], [0, 1]), answers([1, 0], [0, 1]))


def test_evaluations_of_other_classes_are_not_compared(answers):
    with pytest.raises(DeltapatchError, match="same split in the same order"):
        paired_difference(answers([0, 1], [0, 1]), answers([0, 1], [0, 1], "abd"))
