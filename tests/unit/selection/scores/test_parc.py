"""PARC: the closed forms, the definition, draws, and features that have no patterns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from deltapatch.selection import SelectionError, parc

FOUR, HALVES = [[1, 0, 0.2], [0.9, 0.1, 0], [0, 1, 0.1], [0.1, 0.8, 0.3]], [0, 0, 1, 1]


def clouds(seed: int, samples: int, width: int, classes: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % classes
    return rng.standard_normal((samples, width)) + rng.standard_normal((classes, width))[labels], labels


def definition(features: NDArray, labels: NDArray) -> float:
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    upper = np.triu_indices(len(labels), 1)
    of_features = (1 - np.corrcoef(standard))[upper]
    of_labels = (1 - np.corrcoef(np.eye(labels.max() + 1)[labels]))[upper]
    return 100 * spearmanr(of_features.round(9), of_labels.round(9))[0]


def test_four_images() -> None:
    assert parc(FOUR, HALVES, components=None).value == pytest.approx(82.8078671, abs=1e-7)


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_features_that_are_the_labels_score_100(classes: int) -> None:
    labels = np.repeat(np.arange(classes), 12)
    assert parc(np.eye(classes)[labels], labels, components=None).value == pytest.approx(100, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 5])
def test_it_is_the_definition(classes: int) -> None:
    features, labels = clouds(0, 101, 7, classes)
    expected = definition(features, labels)
    assert parc(features, labels, components=None).value == pytest.approx(expected, rel=1e-9)


def test_principal_components_come_first() -> None:
    features, labels = clouds(1, 120, 40, 4)
    coordinates = PCA(6, svd_solver="full").fit_transform(features)
    # Correlations between rows depend on the columns' signs, which have a convention.
    signs = np.sign(coordinates[np.abs(coordinates).argmax(axis=0), np.arange(6)])
    found = parc(features, labels, components=6)
    assert found.value == pytest.approx(definition(coordinates * signs, labels), rel=1e-6)
    assert found.diagnostics.details["components"] == 6


@given(st.integers(0, 1000), st.integers(4, 50), st.integers(2, 60), st.integers(2, 4))
def test_values_keep_to_their_bounds_whatever_the_scale(
    seed: int, samples: int, width: int, classes: int
) -> None:
    features, labels = clouds(seed, samples, width, min(classes, samples // 2))
    found = parc(features, labels, components=None)
    assert -100 <= found.value <= 100
    scaled = features * np.random.default_rng(seed).uniform(0.1, 10, width) + 1
    assert parc(scaled, labels, components=None).value == pytest.approx(found.value, abs=1e-3)


def test_fewer_rows_are_drawn_in_the_shares_of_the_classes() -> None:
    features, labels = clouds(2, 400, 5, 2)
    labels = np.where(np.arange(400) < 2, 2, labels)
    found = parc(features, labels, rows=100)
    details = found.diagnostics.details
    assert (details["draws"], details["rows"]) == (5, 102)  # both of the two samples of class 2
    assert details["spread"] > 0
    assert "mean of 5 draws of 102 of the 400 samples" in found.diagnostics.warnings[0]
    assert found.value == pytest.approx(parc(features, labels).value, abs=5 * details["spread"])
    assert parc(features, labels, rows=100).value == found.value
    assert parc(features, labels, rows=100, seed=9).value != found.value


def test_more_classes_than_pairs_have_room_are_drawn_from() -> None:
    features, labels = clouds(3, 120, 5, 60)
    assert parc(features, labels, rows=20).diagnostics.details["rows"] == 20


def test_all_rows_are_taken_where_they_are_few() -> None:
    features, labels = clouds(4, 120, 5, 3)
    details = parc(features, labels).diagnostics.details
    assert (details["draws"], details["rows"], details["spread"]) == (1, 120, 0)


def test_few_samples_for_the_components_are_said() -> None:
    features, labels = clouds(5, 30, 100, 3)
    assert "30 samples are few for 29 standardised" in parc(features, labels).diagnostics.warnings[0]
    assert parc(features, labels, components=8).diagnostics.warnings == ()


def test_equal_distances_rank_nothing() -> None:
    found = parc(np.eye(4), [0, 0, 1, 1], components=None)
    assert found.value == 0
    assert "nothing to rank" in found.diagnostics.warnings[0]


def test_constant_columns_gaps_and_lonely_samples_change_nothing() -> None:
    features, labels = clouds(6, 90, 4, 3)
    odd = np.insert(np.concatenate([features, features[:1]]), 2, 7.0, axis=1)
    found = parc(odd, [*np.array([5, 0, 9])[labels], 3])
    assert found.value == pytest.approx(parc(features, labels).value, rel=1e-9)
    assert found.diagnostics.dropped == (3,)


def test_inputs_stay_as_they_are() -> None:
    features, labels = clouds(7, 40, 5, 2)
    before = features.copy()
    parc(features, labels)
    parc(features, labels, components=None)
    assert np.array_equal(features, before)


def test_what_cannot_be_scored_is_refused() -> None:
    features, labels = clouds(8, 40, 5, 2)
    with pytest.raises(SelectionError, match="components=1; give 2 or more"):
        parc(features, labels, components=1)
    with pytest.raises(SelectionError, match="rows=3"):
        parc(features, labels, rows=3)
    for components in (None, 32):
        with pytest.raises(SelectionError, match="one direction only"):
            parc(features[:, :1], labels, components=components)
