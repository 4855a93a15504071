"""LEEP: the closed forms, the bounds, memory, and what is no probability."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltapatch.selection import SelectionError, leep, nce
from deltapatch.selection.scores import _empirical

FOUR, HALVES = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]], [0, 0, 1, 1]


def probabilities(rng: np.random.Generator, samples: int, width: int) -> NDArray:
    return rng.dirichlet(np.full(width, 0.3), samples)


def entropy(labels: NDArray) -> float:
    shares = np.bincount(labels) / len(labels)
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


def test_four_images_and_two_source_classes() -> None:
    found = leep(FOUR, HALVES)
    assert found.value == pytest.approx(-0.3839808833, abs=1e-10)
    assert (found.name, found.diagnostics.width, found.diagnostics.classes) == ("leep", 2, 2)
    assert found.diagnostics.details["label_entropy"] == pytest.approx(np.log(2))
    assert found.diagnostics.warnings == ()


def test_it_is_the_definition_in_matrices() -> None:
    rng = np.random.default_rng(0)
    theta, labels = probabilities(rng, 60, 9), np.arange(60) % 4
    joint = np.eye(4)[labels].T @ theta / 60
    predicted = theta @ (joint / joint.sum(axis=0)).T
    of_truth = predicted[np.arange(60), labels]
    assert leep(theta, labels).value == pytest.approx(np.log(of_truth).mean(), rel=1e-12)
    without = leep(theta, labels, log=False)
    assert without.value == pytest.approx(of_truth.mean(), rel=1e-12)
    assert without.name == "leep without log"


def test_of_certain_answers_it_is_nce() -> None:
    rng = np.random.default_rng(1)
    source, labels = rng.integers(0, 6, 100), np.arange(100) % 5
    assert leep(np.eye(6)[source], labels).value == pytest.approx(nce(source, labels).value, abs=1e-12)


def test_one_source_class_tells_nothing() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    assert leep(np.ones((7, 1)), labels).value == pytest.approx(-entropy(labels), abs=1e-12)


def test_source_classes_without_mass_change_nothing() -> None:
    padded = np.insert(np.array(FOUR), 1, 0, axis=1)
    assert leep(padded, HALVES).value == leep(FOUR, HALVES).value


@given(st.integers(0, 1000), st.integers(4, 60), st.integers(1, 20), st.integers(2, 5))
def test_values_lie_between_the_negated_entropy_and_zero(
    seed: int, samples: int, width: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % min(classes, samples // 2)
    found = leep(probabilities(rng, samples, width), labels)
    assert -entropy(labels) - 1e-9 <= found.value <= 0
    assert 0 <= leep(probabilities(rng, samples, width), labels, log=False).value <= 1


def test_the_order_and_the_numbers_of_classes_change_nothing() -> None:
    rng = np.random.default_rng(2)
    theta, labels = probabilities(rng, 40, 5), np.arange(40) % 3
    order = rng.permutation(40)
    renamed = np.array([7, 2, 30])[labels]
    changed = leep(theta[order][:, ::-1], renamed[order])
    assert changed.value == pytest.approx(leep(theta, labels).value, rel=1e-12)


def test_a_class_with_one_image_is_left_out_and_said() -> None:
    with_a_lonely_one = leep([*FOUR, [0.5, 0.5]], [*HALVES, 9])
    assert with_a_lonely_one.value == leep(FOUR, HALVES).value
    assert with_a_lonely_one.diagnostics.dropped == (9,)
    assert "fewer than 2 samples" in with_a_lonely_one.diagnostics.warnings[0]


def test_float32_rows_count_as_summing_to_one() -> None:
    # Rows may miss 1 by a thousandth; a class that they determine still scores 0, not above.
    rows = np.repeat(np.eye(2, dtype=np.float32) * np.float32(1.0009), 3, axis=0)
    assert leep(rows, [0, 0, 0, 1, 1, 1]).value == 0


def test_inputs_stay_as_they_are() -> None:
    theta, labels = np.array(FOUR), np.array(HALVES)
    leep(theta, labels)
    assert theta.tolist() == FOUR
    assert labels.tolist() == HALVES


def test_a_thousand_source_classes_and_a_thousand_classes() -> None:
    theta = np.random.default_rng(3).random((4000, 1000), np.float32) ** 4
    theta /= theta.sum(axis=1, keepdims=True)
    labels = np.arange(4000) % 1000
    mass = theta.sum(axis=0, dtype=np.float64)
    of_truth = [
        rows @ (rows.sum(axis=0) / mass) for rows in (theta[k::1000].astype(float) for k in range(1000))
    ]
    found = leep(theta, labels)
    assert found.diagnostics.classes == 1000
    assert found.value == pytest.approx(np.log(of_truth).mean(), rel=1e-6)


def test_no_matrix_of_samples_by_classes_is_made() -> None:
    rng = np.random.default_rng(4)
    theta, labels = rng.dirichlet(np.ones(20), 40_000), np.arange(40_000) % 1000
    tracemalloc.start()
    try:
        leep(theta, labels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40_000 * 1000 * 8 / 5


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    theta, labels = probabilities(rng, 60, 9), np.arange(60) % 4
    whole = leep(theta, labels).value
    monkeypatch.setattr(_empirical, "_BLOCK_NUMBERS", 70)
    assert leep(theta, labels).value == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([[2.0, -1.0], [0.5, 0.5], [1, 0], [1, 0]], HALVES, "softmax of the logits"),
        ([[0.9, 0.2], [0.5, 0.5], [1, 0], [1, 0]], HALVES, "row 0 sum to 1.1"),
        (FOUR, [0, 0, 1], "4 rows and 3 labels"),
        (FOUR, [0, 0, 0, 0], "one class"),
        ([[np.nan, 1.0], *FOUR[1:]], HALVES, "NaN"),
    ],
)
def test_what_cannot_be_scored_is_refused(rows: list, labels: list, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        leep(rows, labels)
