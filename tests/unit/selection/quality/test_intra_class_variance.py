"""Variance within classes: closed forms, invariances, features against statistics."""

import numpy as np
import pytest

from deltapatch.selection.quality.intra_class_variance import intra_class_variance
from deltapatch.selection.score import SelectionError
from deltapatch.selection.statistics import Statistics


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, 5)) + np.arange(60)[:, None] % 3


LABELS = np.arange(60) % 3


def test_four_points_in_closed_form() -> None:
    found = intra_class_variance([[0.0], [2.0], [3.0], [5.0]], [0, 0, 1, 1])
    assert found.share == pytest.approx(4 / 13)
    assert found.diagnostics.details == {"within": pytest.approx(1), "total": pytest.approx(13 / 4)}


def test_points_are_0_and_equal_means_are_1() -> None:
    assert intra_class_variance([[0.0], [0.0], [1.0], [1.0]], [0, 0, 1, 1]).share == pytest.approx(
        0, abs=1e-12
    )
    assert intra_class_variance([[-1.0], [1.0], [-2.0], [2.0]], [0, 0, 1, 1]).share == pytest.approx(1)


def test_it_is_the_variance_within_of_features_scaled_to_unit_total(features: np.ndarray) -> None:
    scaled = features / np.sqrt(features.var(axis=0).mean())
    within = np.concatenate([scaled[k::3] - scaled[k::3].mean(0) for k in range(3)])
    expected = (within**2).sum() / 60 / 5
    assert intra_class_variance(features, LABELS).share == pytest.approx(expected)


def test_scale_shift_rotation_and_the_order_of_rows_change_nothing(features: np.ndarray) -> None:
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    order = np.random.default_rng(2).permutation(60)
    expected = intra_class_variance(features, LABELS).share
    moved = intra_class_variance((7 * features @ turn + 3)[order], LABELS[order]).share
    assert moved == pytest.approx(expected)


def test_statistics_compact_ones_too_give_the_same(features: np.ndarray) -> None:
    expected = intra_class_variance(features, LABELS).share
    assert intra_class_variance(Statistics.of(features, LABELS)).share == pytest.approx(expected, rel=1e-10)
    wide = np.random.default_rng(3).normal(size=(12, 40))
    compact = Statistics.of(wide, LABELS[:12], compact=True)
    assert intra_class_variance(compact).share == pytest.approx(intra_class_variance(wide, LABELS[:12]).share)


def test_lonely_classes_are_left_out_and_named(features: np.ndarray) -> None:
    more = np.concatenate([features, [[100.0] * 5]])
    found = intra_class_variance(more, [*LABELS, 9])
    assert found.diagnostics.dropped == (9,)
    assert found.share == pytest.approx(intra_class_variance(features, LABELS).share)


def test_constant_features_are_refused() -> None:
    with pytest.raises(SelectionError, match="all features are constant"):
        intra_class_variance(np.ones((4, 2)), [0, 0, 1, 1])
