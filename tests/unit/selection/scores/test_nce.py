"""NCE: closed forms, relabelling, and its two kinds of input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from deltapatch.selection import SelectionError, nce

SOURCE, LABELS = [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 1]


def test_six_images() -> None:
    found = nce(SOURCE, LABELS)
    assert found.value == pytest.approx(-0.6365141683, abs=1e-10)
    assert found.diagnostics.details["source_labels"] == 2
    assert found.diagnostics.details["pairs"] == 4


def test_source_labels_that_determine_the_target_leave_nothing_open() -> None:
    source = np.arange(40) % 8
    assert nce(source, source // 3).value == 0


def test_one_source_label_leaves_everything_open() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    found = nce(np.full(7, 3), labels)
    assert found.value == pytest.approx(-entropy([3, 2, 2]), abs=1e-12)
    assert found.value == pytest.approx(-found.diagnostics.details["label_entropy"], abs=1e-12)


@given(st.integers(0, 1000), st.integers(4, 100), st.integers(1, 30), st.integers(2, 6))
def test_it_is_mutual_information_less_the_entropy_of_the_labels(
    seed: int, samples: int, width: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    source, labels = rng.integers(0, width, samples), np.arange(samples) % min(classes, samples // 2)
    expected = mutual_info_score(source, labels) - entropy(np.bincount(labels))
    assert nce(source, labels).value == pytest.approx(expected, abs=1e-9)


def test_other_names_for_classes_change_nothing() -> None:
    rng = np.random.default_rng(0)
    source, labels = rng.integers(0, 5, 60), np.arange(60) % 3
    renamed = nce(np.array([9, 4, 0, 100, 3])[source], np.array([7, 2, 30])[labels])
    assert renamed.value == pytest.approx(nce(source, labels).value, rel=1e-12)


def test_probabilities_stand_for_their_largest() -> None:
    rng = np.random.default_rng(1)
    rows = rng.dirichlet(np.ones(4), 50)
    labels = np.arange(50) % 3
    found = nce(rows, labels)
    assert found.value == nce(rows.argmax(axis=1), labels).value
    assert found.diagnostics.width == 4
    assert nce(torch.from_numpy(rows), torch.from_numpy(labels)).value == found.value


def test_source_labels_of_dropped_classes_are_dropped_too() -> None:
    found = nce([*SOURCE[:3], 8, *SOURCE[3:]], [*LABELS[:3], 4, *LABELS[3:]])
    assert found.value == nce(SOURCE, LABELS).value
    assert found.diagnostics.dropped == (4,)
    assert found.diagnostics.details["source_labels"] == 2


def test_too_many_pairs_for_the_samples_are_said() -> None:
    labels = np.arange(20) % 2
    found = nce(np.arange(20), labels)
    assert found.value == 0
    assert "give more images" in found.diagnostics.warnings[0]
    assert nce(labels, labels).diagnostics.warnings == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([0, 1], "2 rows and 6 labels"),
        ([0.5, 0, 1, 1, 1, 0], "not whole numbers"),
        ([[0.5, 0.1]] * 6, "sum to 0.6"),
        (np.zeros((6, 2, 2)), "shape"),
    ],
)
def test_what_cannot_be_scored_is_refused(source: list, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        nce(source, LABELS)
