"""H-score and shrinkage H-score: closed forms, bounds, invariances, a peer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage

from deltapatch.selection import SelectionError, Statistics, h_score, shrinkage_h_score

LINE, HALVES = [[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1]


def test_four_points_on_a_line() -> None:
    assert h_score(LINE, HALVES).value == pytest.approx(0.8)
    assert shrinkage_h_score(LINE, HALVES, shrinkage=0.3).value == pytest.approx(0.56)
    assert shrinkage_h_score(LINE, HALVES, shrinkage=1.0).value == 0


def test_one_vector_for_each_class_reaches_the_bound() -> None:
    vectors = np.random.default_rng(0).standard_normal((4, 6))
    labels = np.arange(40) % 4
    assert h_score(vectors[labels], labels).value == pytest.approx(3)


def test_invertible_linear_maps_change_nothing() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 200)
    features = rng.standard_normal((200, 7)) + rng.standard_normal((5, 7))[labels]
    mapped = features @ rng.standard_normal((7, 7)) + 100
    assert h_score(mapped, labels).value == pytest.approx(h_score(features, labels).value, rel=1e-8)


@given(st.integers(0, 1000), st.integers(4, 60), st.integers(1, 80), st.integers(2, 4))
def test_values_keep_to_their_bounds_and_equal_the_formula(
    seed: int, samples: int, width: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % min(classes, samples // 2)
    features = rng.standard_normal((samples, width))
    found = shrinkage_h_score(features, labels)
    alpha = found.diagnostics.details["shrinkage"]
    assert alpha == pytest.approx(ledoit_wolf_shrinkage(features), abs=1e-9)
    total = np.cov(features, rowvar=False).reshape(width, width)
    means = np.stack([features[labels == k].mean(0) for k in range(labels.max() + 1)])[labels]
    between = np.cov(means, rowvar=False).reshape(width, width)
    target = (1 - alpha) * total + alpha * np.trace(total) / width * np.eye(width)
    assert found.value == pytest.approx((1 - alpha) * np.trace(np.linalg.pinv(target) @ between), rel=1e-6)
    assert h_score(features, labels).value == pytest.approx(
        np.trace(np.linalg.pinv(total, rcond=1e-10) @ between), rel=1e-6
    )


def test_too_few_samples_are_said() -> None:
    features = np.random.default_rng(0).standard_normal((20, 50))
    found = h_score(features, np.arange(20) % 4)
    assert found.value == pytest.approx(3)
    assert "use shrinkage_h_score" in found.diagnostics.warnings[0]
    assert shrinkage_h_score(features, np.arange(20) % 4).value < 3


def test_a_feature_that_repeats_another_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    features, labels = rng.standard_normal((60, 4)), np.arange(60) % 3
    doubled = np.concatenate([features, features[:, :2]], axis=1)
    assert h_score(doubled, labels).value == pytest.approx(h_score(features, labels).value)


def test_shrinkage_of_statistics_far_from_zero_keeps_its_digits() -> None:
    features = np.random.default_rng(3).standard_normal((500, 6)) * [1, 2, 3, 4, 5, 6]
    labels = np.arange(500) % 3
    expected = ledoit_wolf_shrinkage(features)
    halves = Statistics.of(features[:99] + 1e4, labels[:99]) + Statistics.of(features[99:] + 1e4, labels[99:])
    assert shrinkage_h_score(halves).diagnostics.details["shrinkage"] == pytest.approx(expected, rel=1e-6)


def test_shrinkage_has_to_be_a_share() -> None:
    with pytest.raises(SelectionError, match=r"shrinkage is 1\.5"):
        shrinkage_h_score(LINE, HALVES, shrinkage=1.5)
