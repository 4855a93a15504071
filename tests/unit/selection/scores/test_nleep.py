"""NLEEP: its two ends, the spread over fits, and the number of components."""

import numpy as np
import pytest
from numpy.typing import NDArray

from deltapatch.selection import SelectionError, nleep


def blobs(apart: float, samples: int = 240, width: int = 6, classes: int = 4) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % classes
    return rng.standard_normal((samples, width)) + apart * np.eye(width)[labels], labels


@pytest.mark.parametrize("components", [None, 4, 9])
def test_blobs_far_apart_leave_nothing_open(components: int | None) -> None:
    assert nleep(*blobs(200.0), components=components).value == pytest.approx(0, abs=1e-6)


def test_one_component_tells_nothing() -> None:
    features, labels = blobs(5.0)
    labels = np.where(labels == 3, 2, labels)
    found = nleep(features, labels, components=1)
    assert found.value == pytest.approx(-(0.5 * np.log(4) + 0.5 * np.log(2)), abs=1e-9)
    assert found.value == pytest.approx(-found.diagnostics.details["label_entropy"], abs=1e-9)


def test_classes_farther_apart_score_higher() -> None:
    near, middle, far = (nleep(*blobs(apart)).value for apart in (0.0, 3.0, 8.0))
    assert near < middle < far <= 0


def test_scale_shift_and_rotation_change_nothing() -> None:
    features, labels = blobs(3.0)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    expected = nleep(features, labels).value
    assert nleep(1e-4 * features @ rotation + 2, labels).value == pytest.approx(expected, abs=1e-6)


def test_it_is_the_mean_of_three_fits_whose_spread_is_said() -> None:
    features, labels = blobs(2.0)
    found = nleep(features, labels)
    spread = found.diagnostics.details["spread"]
    assert spread > 0
    assert nleep(features, labels).value == found.value
    assert nleep(features, labels, seed=3).value == pytest.approx(found.value, abs=6 * spread)
    assert nleep(features, labels, seed=3).value != found.value


@pytest.mark.parametrize(("samples", "components"), [(240, 20), (120, 12), (16, 4)])
def test_fewer_components_are_taken_for_few_samples_and_said(samples: int, components: int) -> None:
    found = nleep(*blobs(2.0, samples=samples))
    assert found.diagnostics.details["components"] == components
    capped = [warning for warning in found.diagnostics.warnings if "instead of 20" in warning]
    assert len(capped) == (components < 20)


def test_the_share_of_the_variance_decides_the_dimensions() -> None:
    features, labels = blobs(2.0, width=40)
    details = nleep(features, labels).diagnostics.details
    assert details["variance_kept"] >= 0.8
    assert details["dimensions"] < 40
    assert nleep(features, labels, variance=1.0).diagnostics.details["dimensions"] == 40


def test_more_features_than_samples_and_odd_labels_are_scored() -> None:
    features, labels = blobs(4.0, samples=60, width=300)
    odd = np.insert(np.concatenate([features, features[:1]]), 2, 7.0, axis=1)
    found = nleep(odd, [*np.array([5, 0, 9, 2])[labels], 3])
    assert found.value == pytest.approx(nleep(features, labels).value, abs=1e-9)
    assert found.diagnostics.dropped == (3,)


def test_inputs_stay_as_they_are() -> None:
    features, labels = blobs(2.0, samples=40)
    before = features.copy()
    nleep(features, labels)
    assert np.array_equal(features, before)


def test_what_cannot_be_scored_is_refused() -> None:
    features, labels = blobs(2.0, samples=40)
    for components in (0, 41):
        with pytest.raises(SelectionError, match=f"components={components}; give 1 to 40"):
            nleep(features, labels, components=components)
    for variance in (0.0, 1.5):
        with pytest.raises(SelectionError, match="variance="):
            nleep(features, labels, variance=variance)
