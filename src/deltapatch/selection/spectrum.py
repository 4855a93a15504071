"""Eigenvalues of a symmetric matrix, and vectors in the basis of its eigenvectors."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal, get_lapack_funcs

Array = NDArray[np.float64]


def in_eigenbasis(matrix: Array, vectors: Array) -> tuple[Array, Array]:
    """Eigenvalues w of A = V diag(w) Vᵀ in ascending order, shape (d,), and Vᵀ x for each column x.

    A = Q T Qᵀ is made tridiagonal, Qᵀ is applied to the few vectors, and T's eigenvectors to the result. The
    product V = Q Z, half of what `numpy.linalg.eigh` does, is never needed.

    Args:
        matrix: symmetric, shape (d, d).
        vectors: shape (d, n).
    """
    size = len(matrix)
    if size == 1:
        return matrix[0].copy(), vectors.copy()
    dsytrd, dormqr = get_lapack_funcs(("sytrd", "ormqr"), (matrix,))
    reduced, diagonal, off_diagonal, factors, problem = dsytrd(matrix, lower=1, lwork=64 * size)
    assert problem == 0
    turned = np.array(vectors, order="F")
    # Below its first row the reduced matrix holds the reflections in the form of a QR decomposition.
    reflections = np.asfortranarray(reduced[1:, :-1])
    below, _, problem = dormqr("L", "T", reflections, factors, turned[1:], 64 * turned.shape[1])
    assert problem == 0
    turned[1:] = below
    values, eigenvectors = eigh_tridiagonal(diagonal, off_diagonal)
    return values, eigenvectors.T @ turned


def rank_of(eigenvalues: Array, samples: int) -> int:
    """How many eigenvalues, in ascending order, are larger than rounding can make them."""
    noise = max(samples, len(eigenvalues)) * np.finfo(np.float64).eps * max(float(eigenvalues[-1]), 0.0)
    return int((eigenvalues > noise).sum())
