"""How much of the variance the classes explain, in units of the variance: what both H-scores measure."""

import numpy as np
from scipy.linalg import LinAlgError, cholesky, eigh, solve_triangular

from ..spectrum import rank_of
from ..statistics import Array, Statistics


def explained_variance(statistics: Statistics, shrinkage: float) -> float:
    """tr(T_α⁻¹ B) with the scatter T_α = (1 - α) T + α (tr T / d) I of all features and B between classes.

    With T_α = LLᵀ it is ‖L⁻¹ Mᵀ‖² for the rows M of which B is the Gram matrix. Where T_α is singular its
    inverse on its own range is taken, in which M lies.
    """
    scatter, offsets = statistics.scatter, statistics.class_offsets
    total = (1 - shrinkage) * scatter
    total[np.diag_indices_from(total)] += shrinkage * float(np.trace(scatter)) / statistics.width
    if shrinkage > 0 or statistics.samples > statistics.width:
        try:
            lower = cholesky(total, lower=True, check_finite=False)
        except LinAlgError:
            lower = None
        if lower is not None and _is_sound(np.diag(lower)):
            whitened = solve_triangular(lower, offsets.T, lower=True, check_finite=False)
            return float(np.einsum("dk,dk->", whitened, whitened))
    values, vectors = eigh(total, check_finite=False)
    rank = rank_of(values, statistics.samples)
    projected = offsets @ vectors[:, len(values) - rank :]
    return float((projected**2 / values[len(values) - rank :]).sum())


def _is_sound(diagonal: Array) -> bool:
    """Whether no pivot of a Cholesky factor is as small as rounding makes those of a singular matrix."""
    noise = len(diagonal) * np.finfo(np.float64).eps
    return bool((diagonal**2).min() > noise * (diagonal**2).max())
