"""Eigenvalues and coordinates equal those of numpy's full decomposition."""

import numpy as np
import pytest

from deltapatch.selection.spectrum import in_eigenbasis, rank_of


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 2), (7, 7), (40, 40), (40, 9)])
def test_squared_coordinates_are_those_of_a_full_decomposition(size: int, rank: int) -> None:
    rng = np.random.default_rng(size + rank)
    root = rng.standard_normal((size, rank))
    matrix, vectors = root @ root.T, rng.standard_normal((size, 3))
    given = matrix.copy(), vectors.copy()
    values, turned = in_eigenbasis(matrix, vectors)
    expected, basis = np.linalg.eigh(matrix)
    np.testing.assert_allclose(values, expected, atol=1e-10 * expected[-1])
    assert rank_of(values, size) == rank
    # Eigenvectors of the null space are anybody's choice, so only their share as a whole is compared.
    np.testing.assert_allclose(
        turned[size - rank :] ** 2, (basis.T @ vectors)[size - rank :] ** 2, rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose((turned**2).sum(0), (vectors**2).sum(0))
    np.testing.assert_array_equal(matrix, given[0])
    np.testing.assert_array_equal(vectors, given[1])


def test_repeated_eigenvalues_keep_lengths() -> None:
    values, turned = in_eigenbasis(np.eye(6), np.arange(6.0)[:, None])
    np.testing.assert_allclose(values, np.ones(6))
    assert (turned**2).sum() == pytest.approx(55)


def test_nothing_has_rank_zero() -> None:
    assert rank_of(np.zeros(4), 10) == 0
