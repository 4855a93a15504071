"""OTCE: plans whose terms are known, and coefficients that are found again."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from deltapatch.selection import Score, SelectionError, otce
from deltapatch.selection.scores.otce import OtceCoefficients


def terms(score: Score) -> tuple[float, float]:
    return score.diagnostics.details["W_D"], score.diagnostics.details["W_T"]


def images(samples: int = 60, width: int = 4, seed: int = 0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, width)), np.arange(samples) % 3


def test_a_shift_of_all_features_costs_its_squared_length_and_no_label() -> None:
    source, labels = images()
    found = otce(source, labels, source + np.array([1.0, 2.0, 0.0, 0.0]), labels, scaled=False)
    assert terms(found) == pytest.approx((5.0, 0.0), abs=1e-12)
    assert found.value == pytest.approx(0.0, abs=1e-12)
    assert found.diagnostics.details["marginal_error"] == 0


def test_w_t_is_the_entropy_of_the_target_class_given_the_source_class() -> None:
    """The plan is one to one, so P(a, b) counts pairs: 2, 1 of class 0 and 0, 3 of class 1."""
    source = np.arange(6.0)[:, None]
    found = otce(source, [0, 0, 0, 1, 1, 1], source + 0.1, [0, 0, 1, 1, 1, 1])
    expected = 0.5 * (2 / 3 * np.log(3 / 2) + 1 / 3 * np.log(3))
    assert found.value == pytest.approx(-expected, abs=1e-12)


def test_labels_without_relation_have_the_entropy_of_the_target() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal((2, 400, 2))
    found = otce(source, rng.integers(0, 2, 400), target, np.arange(400) % 4)
    assert found.value == pytest.approx(-np.log(4), abs=0.02)


@pytest.mark.parametrize("target_samples", [60, 45])
def test_the_names_of_classes_scale_and_rotation_change_nothing(target_samples: int) -> None:
    (source, source_labels), (target, target_labels) = images(), images(target_samples, seed=1)
    expected = terms(otce(source, source_labels, target, target_labels))
    renamed = otce(source, np.array([7, 0, 3])[source_labels], target, np.array([1, 0, 5])[target_labels])
    assert terms(renamed) == pytest.approx(expected, abs=1e-9)
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]
    turned = otce(40 * source @ rotation, source_labels, 40 * target @ rotation, target_labels)
    assert terms(turned) == pytest.approx(expected, abs=1e-9)


def test_only_w_d_feels_the_scale() -> None:
    (source, labels), (target, _) = images(), images(seed=1)
    plain = otce(source, labels, target, labels, scaled=False)
    scaled = otce(source, labels, target, labels)
    variance = (source.var(axis=0) + target.var(axis=0)).mean() / 2
    assert terms(scaled) == pytest.approx((terms(plain)[0] / variance, terms(plain)[1]))


def test_sets_of_different_size_report_the_error_of_their_plan() -> None:
    (source, source_labels), (target, target_labels) = images(60), images(45, seed=1)
    details = otce(source, source_labels, target, target_labels).diagnostics.details
    assert 0 < details["marginal_error"] <= 1e-6
    assert details["iterations"] > 0


def test_large_sets_are_drawn_from_and_the_draw_is_recorded() -> None:
    (source, source_labels), (target, target_labels) = images(200), images(150, seed=1)
    found = otce(source, source_labels, target, target_labels, samples=90)
    again = otce(source, source_labels, target, target_labels, samples=90)
    other = otce(source, source_labels, target, target_labels, samples=90, seed=1)
    details = found.diagnostics.details
    assert (details["source_samples"], details["target_samples"], details["iterations"]) == (90, 90, 0)
    assert found.value == again.value != other.value


def test_classes_of_one_sample_count_in_the_source_alone() -> None:
    source, target = np.arange(5.0)[:, None], np.arange(6.0)[:, None]
    source_before, target_before = source.copy(), target.copy()
    found = otce(source, [0, 1, 2, 3, 4], target, [5, 5, 2, 2, 2, 8])
    assert found.diagnostics.dropped == (8,)
    assert found.diagnostics.classes == 2
    # Each source image has a class of its own, which tells all about the target.
    assert found.value == pytest.approx(0.0, abs=1e-12)
    assert np.array_equal(source, source_before)
    assert np.array_equal(target, target_before)


def auxiliary(count: int) -> list[Score]:
    found = []
    for seed in range(count):
        (source, labels), (target, _) = images(seed=seed), images(seed=100 + seed)
        found.append(otce(source, labels, target * (1 + 0.2 * seed), np.roll(labels, seed // 2)))
    return found


def test_coefficients_that_made_the_accuracies_are_found_again() -> None:
    scores = auxiliary(8)
    values = np.array([terms(score) for score in scores])
    standard = (values - values.mean(0)) / values.std(0)
    accuracies = 0.7 - 0.04 * standard[:, 0] - 0.11 * standard[:, 1]
    fitted = OtceCoefficients.fitted(scores, accuracies)
    assert (fitted.domain, fitted.task, fitted.intercept) == pytest.approx((-0.04, -0.11, 0.7))
    (source, labels), (target, _) = images(seed=3), images(seed=103)
    found = otce(source, labels, target * 1.6, np.roll(labels, 1), coefficients=fitted)
    assert found.value == pytest.approx(accuracies[3])
    assert terms(found) == terms(scores[3])


def test_coefficients_that_cannot_be_fitted_are_refused() -> None:
    scores = auxiliary(4)
    with pytest.raises(SelectionError, match="give four scores or more with one accuracy each"):
        OtceCoefficients.fitted(scores[:3], [0.1, 0.2, 0.3])
    with pytest.raises(SelectionError, match="give four scores or more with one accuracy each"):
        OtceCoefficients.fitted(scores, [0.1, 0.2, 0.3])
    with pytest.raises(SelectionError, match="cannot be told apart; add other tasks"):
        OtceCoefficients.fitted([scores[0]] * 4, [0.1, 0.2, 0.3, 0.4])
    together = [
        replace(
            scores[0],
            diagnostics=replace(scores[0].diagnostics, details={"W_D": float(step), "W_T": 2.0 * step}),
        )
        for step in range(4)
    ]
    with pytest.raises(SelectionError, match="cannot be told apart; add other tasks"):
        OtceCoefficients.fitted(together, [0.1, 0.2, 0.3, 0.4])


def test_sets_that_cannot_be_compared_are_refused() -> None:
    (source, labels), (target, _) = images(), images(seed=1)
    with pytest.raises(SelectionError, match="give features of one model"):
        otce(source, labels, target[:, :3], labels)
    with pytest.raises(SelectionError, match="60 rows and 59 labels"):
        otce(source, labels[1:], target, labels)
    with pytest.raises(SelectionError, match="ask for 2 or more"):
        otce(source, labels, target, labels, samples=1)
