"""Principal components: those of a peer, on both sides, with signs that do not depend on the solver."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from deltapatch.selection.scores._principal import principal_components


@pytest.mark.parametrize("shape", [(80, 12), (12, 80), (30, 30), (5000, 3)])
def test_they_are_those_of_scikit_learn_but_for_signs(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape) * np.linspace(1, 3, shape[1]) + 50
    found = principal_components(rows, most=3)
    peer = PCA(3, svd_solver="full")
    expected = peer.fit_transform(rows)
    assert np.allclose(np.abs(found.coordinates), np.abs(expected), atol=1e-8)
    assert found.variance_kept == pytest.approx(peer.explained_variance_ratio_.sum())
    largest = np.abs(found.coordinates).argmax(axis=0)
    assert (found.coordinates[largest, np.arange(3)] > 0).all()


@pytest.mark.parametrize("share", [0.2, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(60, 10), (10, 60)])
def test_as_few_as_keep_a_share_of_the_variance(shape: tuple[int, int], share: float) -> None:
    rows = np.random.default_rng(1).standard_normal(shape)
    found = principal_components(rows, variance=share)
    ratios = np.cumsum(PCA(svd_solver="full").fit(rows).explained_variance_ratio_)
    rank = min(shape[1], shape[0] - 1)
    assert found.count == min(rank, int((ratios < share).sum()) + 1)
    assert found.variance_kept == pytest.approx(ratios[found.count - 1])


@pytest.mark.parametrize("samples", [40, 6])
def test_directions_of_rounding_are_left_out(samples: int) -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((samples, 3)) @ rng.standard_normal((3, 15)) + 1000
    found = principal_components(rows, most=10)
    assert found.count == 3
    assert found.variance_kept == pytest.approx(1)


def test_rotated_features_have_the_same_coordinates() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((50, 8)) * np.arange(1, 9)
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    turned = principal_components(rows @ rotation, most=8)
    assert np.allclose(turned.coordinates, principal_components(rows, most=8).coordinates, atol=1e-9)


def test_float32_rows_are_summed_in_float64_and_not_written_to() -> None:
    rows = (np.random.default_rng(4).standard_normal((3000, 5)) + 100).astype(np.float32)
    before = rows.copy()
    exact = principal_components(rows.astype(np.float64), most=5)
    found = principal_components(rows, most=5)
    assert found.coordinates.dtype == np.float64
    assert np.allclose(found.coordinates, exact.coordinates, atol=1e-9)
    assert np.array_equal(rows, before)
