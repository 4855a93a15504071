"""What scores are given is checked, and what is left out is said."""

import numpy as np
import pytest

from deltapatch.selection import SelectionError, Statistics, h_score, shrinkage_h_score
from deltapatch.selection.subject import read_samples, read_statistics

FEATURES = np.random.default_rng(0).standard_normal((12, 3))


def test_label_gaps_are_closed_and_classes_of_one_sample_are_left_out() -> None:
    labels = np.array([3, 3, 3, 3, 90, 90, 90, 7, 12, 12, 12, 12])
    subject = read_samples(FEATURES, labels)
    assert (subject.samples, subject.classes, subject.dropped) == (11, 3, (7,))
    assert subject.labels.tolist() == [0, 0, 0, 0, 2, 2, 2, 1, 1, 1, 1]
    assert subject.counts.tolist() == [4, 4, 3]
    assert "1 classes with fewer than 2 samples are left out: 7" in subject.warnings[0]
    diagnostics = shrinkage_h_score(FEATURES, labels).diagnostics
    assert (diagnostics.dropped, diagnostics.samples, diagnostics.classes) == ((7,), 11, 3)
    assert diagnostics.seconds > 0


def test_labels_may_be_renamed() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    renamed = np.array([50, 9, 700])[labels]
    assert h_score(FEATURES, renamed).value == pytest.approx(h_score(FEATURES, labels).value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([5] * 12, r"the labels hold one class \(5\)"),
        (list(range(12)), "0 of 12 classes have 2 samples or more"),
        ([0] * 11 + [1], "1 of 2 classes have 2 samples or more"),
        ([0] * 11, "12 rows and 11 labels"),
        (None, "without labels"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(labels: list[int] | None, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        read_statistics(FEATURES, labels)


def test_statistics_are_refused_with_the_same_words() -> None:
    with pytest.raises(SelectionError, match="the labels hold one class"):
        read_statistics(Statistics.of(FEATURES, [1] * 12))
    with pytest.raises(SelectionError, match="leave labels out"):
        read_statistics(Statistics.of(FEATURES, [0, 1] * 6), [0, 1] * 6)


def test_constant_features_are_said_and_nothing_but_constants_refused() -> None:
    some = np.concatenate([FEATURES, np.full((12, 2), 7.1)], axis=1)
    labels = [0, 1] * 6
    assert read_samples(some, labels).warnings == ("2 of 5 features are constant",)
    assert read_statistics(Statistics.of(some, labels)).warnings == ("2 of 5 features are constant",)
    assert h_score(some, labels).value == pytest.approx(h_score(FEATURES, labels).value)
    with pytest.raises(SelectionError, match="all features are constant"):
        read_samples(np.full((12, 4), 0.3), labels)
    with pytest.raises(SelectionError, match="all features are constant"):
        read_statistics(Statistics.of(np.full((12, 4), 0.3), labels))


def test_probabilities_have_to_sum_to_one() -> None:
    with pytest.raises(SelectionError, match="row 0 sum to 3"):
        read_samples(np.full((12, 3), 1.0), [0, 1] * 6, probabilities=True)
    with pytest.raises(SelectionError, match="or are negative"):
        read_samples(np.tile([2.0, -1.0], (12, 1)), [0, 1] * 6, probabilities=True)


def test_a_value_outside_of_its_bounds_is_an_error() -> None:
    subject = read_samples(FEATURES, [0, 1] * 6)
    with pytest.raises(SelectionError, match="h_score came out as 57, but can only be 0 to 46"):
        subject.score("h_score", 57, low=0, high=46)
    with pytest.raises(SelectionError, match="came out as nan"):
        subject.score("h_score", float("nan"))
    assert subject.score("leep", 1e-12, high=0).value == 0


def test_samples_that_were_read_serve_several_scores() -> None:
    samples = read_samples(FEATURES, [0, 1] * 6)
    assert read_samples(samples) is samples
    assert h_score(samples).value == h_score(FEATURES, [0, 1] * 6).value
    with pytest.raises(SelectionError, match="leave labels out"):
        h_score(samples, [0, 1] * 6)
