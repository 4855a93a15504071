"""TMI: the entropy estimator on known distributions, what scale does to it, and the floor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import digamma

from deltapatch.selection import SelectionError, tmi

LINE = [[0.0], [1.0], [3.0], [7.0]]


def clouds(seed: int, samples: int, width: int, classes: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    return rng.standard_normal((samples, width)) + rng.standard_normal((classes, width))[labels], labels


def entropy(features: object, labels: object, **options: int) -> float:
    return tmi(features, labels, **options).diagnostics.details["entropy"]


def test_four_points_on_a_line() -> None:
    labels = np.repeat([0, 1], 4)
    assert entropy(LINE + LINE, labels, neighbours=1) == pytest.approx(3.0463408993, abs=1e-10)
    scale = np.std([0, 1, 3, 7])
    found = tmi(LINE + LINE, labels, neighbours=1)
    assert found.value == pytest.approx(3.0463408993 - np.log(scale), abs=1e-10)


def test_it_is_the_definition_class_by_class() -> None:
    features, labels = clouds(0, 61, 5, 3)
    expected = 0.0
    for k in range(3):
        rows = features[labels == k]
        distances = np.sort(np.abs(rows[:, None] - rows).max(axis=2), axis=1)[:, 3]
        own = digamma(len(rows)) - digamma(3) + 5 * np.log(2 * distances).mean()
        expected += len(rows) / 61 * own
    found = tmi(features, labels)
    assert found.diagnostics.details["entropy"] == pytest.approx(expected, rel=1e-12)
    spread = np.trace(np.cov(features, rowvar=False, bias=True)) / 5
    assert found.value == pytest.approx(expected / 5 - np.log(spread) / 2, rel=1e-12)


def test_of_a_uniform_box_it_is_the_logarithm_of_the_volume() -> None:
    features = 10 * np.random.default_rng(1).random((4000, 2))
    assert entropy(features, np.arange(4000) % 2) == pytest.approx(2 * np.log(10), rel=0.05)


def test_of_normal_features_it_is_half_the_logarithm_of_2_pi_e() -> None:
    features = np.random.default_rng(2).standard_normal((3000, 1))
    assert tmi(features, np.arange(3000) % 2).value == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.05)


@given(st.integers(0, 1000), st.floats(1e-6, 1e6), st.integers(1, 20))
def test_scale_moves_the_entropy_and_not_the_value(seed: int, scale: float, width: int) -> None:
    features, labels = clouds(seed, 30, width, 2)
    moved = entropy(scale * features, labels) - entropy(features, labels)
    assert moved == pytest.approx(width * np.log(scale), abs=1e-6)
    found = tmi(features, labels).value
    assert tmi(scale * features, labels).value == pytest.approx(found, abs=1e-8)


def test_models_whose_distances_are_all_small_still_differ() -> None:
    # Normalised features, where a floor of 1 would leave nothing but the width.
    rng = np.random.default_rng(3)
    labels = np.arange(200) % 4
    centres = rng.standard_normal((4, 32))[labels]
    tight, wide = (centres + spread * rng.standard_normal((200, 32)) for spread in (0.1, 1.0))
    tight, wide = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (tight, wide))
    assert tmi(tight, labels).value < tmi(wide, labels).value - 1
    assert tmi(tight, labels).diagnostics.details["floored"] == 0


def test_repeated_points_are_floored_and_said() -> None:
    features, labels = clouds(4, 80, 3, 2)
    features[:16:2] = features[0]
    found = tmi(features, labels)
    assert found.diagnostics.details["floored"] == pytest.approx(0.1)
    assert "10.0% of the samples have 3 others" in found.diagnostics.warnings[0]
    assert np.isfinite(found.value)
    collapsed = tmi(np.eye(2)[labels], labels)
    assert collapsed.diagnostics.details["floored"] == 1
    assert collapsed.value < found.value


def test_the_floor_is_a_millionth_of_the_median_distance() -> None:
    # Distances to the nearest: 0, 0, 1, 2 in each class; the median of those that are not 0 is 1.5.
    points = [[0.0], [0.0], [1.0], [3.0]]
    expected = digamma(4) - digamma(1) + np.log([3e-6, 3e-6, 2.0, 4.0]).mean()
    assert entropy(points + points, np.repeat([0, 1], 4), neighbours=1) == pytest.approx(expected, rel=1e-12)


def test_wider_features_of_the_same_kind_come_out_higher() -> None:
    features = np.random.default_rng(11).standard_normal((500, 64))
    labels = np.arange(500) % 20
    assert tmi(features, labels).value == pytest.approx(1.83, abs=0.02)
    assert tmi(features[:, :8], labels).value == pytest.approx(1.51, abs=0.05)
    narrow, wide = (tmi(features[:, :d], labels, estimator="variance").value for d in (8, 64))
    assert narrow == pytest.approx(wide, abs=0.03)


def test_large_classes_are_asked_about_a_thousand_samples() -> None:
    features, labels = clouds(5, 5000, 2, 2)
    found = tmi(features, labels)
    assert found.diagnostics.details["queried"] == 2000
    assert "1000 samples" in found.diagnostics.warnings[0]
    assert tmi(features, labels).value == found.value
    assert tmi(features, labels, seed=1).value == pytest.approx(found.value, abs=0.1)
    assert tmi(features, labels, seed=1).value != found.value


def test_classes_need_more_samples_than_neighbours() -> None:
    features, labels = clouds(6, 33, 4, 3)
    odd = np.insert(np.concatenate([features, features[:3]]), 2, 7.0, axis=1)
    found = tmi(odd, [*np.array([5, 0, 9])[labels], 3, 3, 3])
    assert found.value == pytest.approx(tmi(features, labels).value, rel=1e-12)
    assert found.diagnostics.dropped == (3,)
    assert found.diagnostics.details["dimensions"] == 4
    with pytest.raises(SelectionError, match="12 samples or more"):
        tmi(features, labels, neighbours=11)


def test_more_features_than_samples_are_scored() -> None:
    assert np.isfinite(tmi(*clouds(7, 20, 300, 2)).value)


def test_the_variance_inside_classes() -> None:
    features, labels = clouds(8, 90, 4, 3)
    means = np.stack([features[labels == k].mean(axis=0) for k in range(3)])[labels]
    within, total = ((features - means) ** 2).sum(), ((features - features.mean(axis=0)) ** 2).sum()
    found = tmi(features, labels, estimator="variance")
    assert found.name == "tmi variance"
    assert found.value == pytest.approx(within / total, rel=1e-12)
    assert tmi(1e3 * features + 1e4, labels, estimator="variance").value == pytest.approx(found.value)
    assert tmi(np.eye(3)[labels], labels, estimator="variance").value == 0


def test_inputs_stay_as_they_are() -> None:
    features, labels = clouds(9, 40, 5, 2)
    before = features.copy()
    tmi(features, labels)
    tmi(features, labels, estimator="variance")
    assert np.array_equal(features, before)


def test_what_cannot_be_scored_is_refused() -> None:
    features, labels = clouds(10, 40, 5, 2)
    with pytest.raises(SelectionError, match="neighbours=0"):
        tmi(features, labels, neighbours=0)
    with pytest.raises(SelectionError, match="'range'; give one of entropy, variance"):
        tmi(features, labels, estimator="range")
    with pytest.raises(SelectionError, match="constant"):
        tmi(np.ones((8, 3)), np.arange(8) % 2)
