"""GBC: coefficients by hand and by definition, the bound, and features where others underflow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltapatch.selection import SelectionError, gbc

ROUND = [[-2.0], [0.0], [0.0], [2.0]]


def clouds(seed: int, samples: int, width: int, classes: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    return rng.standard_normal((samples, width)) + rng.standard_normal((classes, width))[labels], labels


def definition(features: NDArray, labels: NDArray, kind: str) -> float:
    """All pairs one by one, with determinants and inverses of full matrices."""
    parts = []
    for k in np.unique(labels):
        rows = features[labels == k]
        covariance = np.atleast_2d(np.cov(rows, rowvar=False, bias=True))
        if kind == "diagonal":
            covariance = np.diag(np.diag(covariance))
        if kind == "spherical":
            covariance = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        parts.append((rows.mean(axis=0), covariance))
    total = 0.0
    for i, (mean, covariance) in enumerate(parts):
        for j, (other, others) in enumerate(parts):
            if i != j:
                between, apart = (covariance + others) / 2, mean - other
                determinants = np.linalg.det(covariance) * np.linalg.det(others)
                distance = apart @ np.linalg.inv(between) @ apart / 8
                distance += np.log(np.linalg.det(between) / np.sqrt(determinants)) / 2
                total += np.exp(-distance)
    return -total


def test_two_gaussians_of_variance_one_two_apart() -> None:
    found = gbc(ROUND, [0, 0, 1, 1])
    assert found.value == pytest.approx(-1.2130613, abs=1e-7)
    assert found.diagnostics.details["mean_overlap"] == pytest.approx(np.exp(-0.5))


@pytest.mark.parametrize("covariance", ["diagonal", "spherical", "full"])
def test_equal_means_and_variances_1_and_4(covariance: str) -> None:
    features = np.repeat([[-1.0], [1.0], [-2.0], [2.0]], 6, axis=0)
    found = gbc(features, np.repeat([0, 1], 12), covariance=covariance)
    assert found.diagnostics.details["mean_overlap"] == pytest.approx(0.8944272, abs=1e-7)


@pytest.mark.parametrize("covariance", ["diagonal", "spherical", "full"])
def test_it_is_the_definition(covariance: str) -> None:
    features, labels = clouds(0, 300, 4, 5)
    _, vectors = np.linalg.eigh(np.cov(features, rowvar=False))
    expected = definition(features @ vectors, labels, covariance)
    assert gbc(features, labels, covariance=covariance).value == pytest.approx(expected, rel=1e-6)


def test_blocks_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clouds(1, 200, 6, 20)
    whole = gbc(features, labels).value
    monkeypatch.setitem(gbc.__globals__, "_BLOCK_NUMBERS", 500)
    assert gbc(features, labels).value == pytest.approx(whole, rel=1e-12)


@given(st.integers(0, 1000), st.integers(4, 60), st.integers(1, 80), st.integers(2, 4))
def test_values_keep_to_their_bounds_whatever_the_scale(
    seed: int, samples: int, width: int, classes: int
) -> None:
    features, labels = clouds(seed, samples, width, min(classes, samples // 2))
    found = gbc(features, labels)
    pairs = found.diagnostics.classes * (found.diagnostics.classes - 1)
    assert -pairs <= found.value <= 0
    assert gbc(1e-4 * features + 3, labels).value == pytest.approx(found.value, rel=1e-5, abs=1e-9)


def test_indistinguishable_classes_reach_the_bound() -> None:
    features = np.tile(np.random.default_rng(2).standard_normal((20, 3)), (4, 1))
    assert gbc(features, np.repeat(np.arange(4), 20)).value == pytest.approx(-12)


def test_64_tiny_variances_do_not_underflow() -> None:
    # The product of the variances is 1e-640, which no floating number holds.
    features, labels = clouds(3, 1000, 64, 2)
    assert gbc(1e-5 * features, labels).value == pytest.approx(gbc(features, labels).value, rel=1e-8)


def test_rotations_change_nothing() -> None:
    features, labels = clouds(4, 300, 8, 3)
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((8, 8)))[0]
    expected = gbc(features, labels, components=5).value
    assert gbc(features @ rotation, labels, components=5).value == pytest.approx(expected, rel=1e-8)


def test_components_are_kept_up_to_the_rank() -> None:
    features, labels = clouds(6, 300, 100, 3)
    details = gbc(features, labels).diagnostics.details
    assert details["components"] == 64
    assert 0.6 < details["variance_kept"] < 1
    assert gbc(features[:30], labels[:30]).diagnostics.details["components"] == 29
    assert gbc(features, labels, components=None).diagnostics.details["components"] == 100


def test_few_samples_are_said() -> None:
    features, labels = clouds(7, 30, 100, 3)
    assert "30 samples are few for 29 components" in gbc(features, labels).diagnostics.warnings[0]
    assert gbc(features, labels, components=10).diagnostics.warnings == ()


def test_classes_without_any_spread_do_not_overlap() -> None:
    found = gbc(np.eye(3)[[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, 2])
    assert found.value == 0
    assert found.diagnostics.details["floored_variances"] == 1


def test_constant_columns_gaps_and_lonely_samples_change_nothing() -> None:
    features, labels = clouds(8, 90, 4, 3)
    odd = np.insert(np.concatenate([features, features[:1]]), 2, 7.0, axis=1)
    found = gbc(odd, [*np.array([5, 0, 9])[labels], 3])
    assert found.value == pytest.approx(gbc(features, labels).value, rel=1e-9)
    assert found.diagnostics.dropped == (3,)
    assert any("1 of 5 features are constant" in warning for warning in found.diagnostics.warnings)


def test_inputs_stay_as_they_are() -> None:
    features, labels = clouds(9, 40, 5, 2)
    before = features.copy()
    gbc(features, labels)
    assert np.array_equal(features, before)


def test_what_cannot_be_scored_is_refused() -> None:
    features, labels = clouds(10, 40, 5, 2)
    with pytest.raises(SelectionError, match="components=0"):
        gbc(features, labels, components=0)
    with pytest.raises(
        SelectionError, match="20 samples, and full covariances of 5 components need more than 50"
    ):
        gbc(features, labels, covariance="full")
    with pytest.raises(SelectionError, match="'banded'; give one of diagonal, spherical, full"):
        gbc(features, labels, covariance="banded")
    with pytest.raises(SelectionError, match="constant"):
        gbc(np.ones((4, 3)), [0, 0, 1, 1])
