"""Optimal transport between the features of two sets of images: what moving one onto the other costs."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp

from .score import SelectionError

Array = NDArray[np.float64]

# Up to so many rows on both sides an exact plan is also the faster one.
EXACT_UP_TO = 500
# Scalings beyond exp(±30) are moved into the exponent, long before they could overflow.
_ABSORB_ABOVE = np.exp(30.0)


@dataclass(frozen=True, eq=False)
class Plan:
    """How much of each row of the source goes to each row of the target, all rows weighing the same.

    Attributes:
        masses: shape (n, m), non-negative, the sum is 1; row sums are 1/n and column sums 1/m.
        cost: Σ masses · costs.
        marginal_error: how far the row and column sums are from that, Σ of absolute differences; 0 where
            exact.
        iterations: of Sinkhorn's algorithm; 0 for an exact plan.
        warnings: a sentence where Sinkhorn's algorithm was stopped before it had settled.
    """

    masses: Array = field(repr=False)
    cost: float
    marginal_error: float
    iterations: int
    warnings: tuple[str, ...] = ()


def transport(
    costs: Array, *, regularization: float = 0.05, tolerance: float = 1e-6, max_iterations: int = 5000
) -> Plan:
    """The plan of least cost between two sets of equally heavy rows.

    Sets of the same size of up to 500 rows are assigned one to one, which is exact. Other plans are those of
    Sinkhorn's algorithm in the log domain: the minimum of ``cost - ε · entropy``, so they blur over costs of
    about ε and their cost is a little above the exact one.

    Args:
        costs: what moving a row of the source onto one of the target costs, shape (n, m), non-negative.
        regularization: ε as a share of the median cost.
        tolerance: Sinkhorn's algorithm stops when the marginal error is below it.
        max_iterations: or after so many passes over the rows and columns.

    Raises:
        SelectionError: costs are no matrix, are negative or not finite, or an option is not positive.
    """
    if costs.ndim != 2 or 0 in costs.shape or not np.isfinite(costs).all() or costs.min() < 0:
        raise SelectionError(
            f"transport costs of shape {costs.shape} must be a matrix of finite numbers from 0, one row or"
            " more for both sets"
        )
    if min(regularization, tolerance, max_iterations) <= 0:
        raise SelectionError(
            "regularization, tolerance and max_iterations of a transport plan must be above 0"
        )
    rows, columns = costs.shape
    if rows == columns <= EXACT_UP_TO:
        masses = np.zeros_like(costs, dtype=np.float64)
        masses[linear_sum_assignment(costs)] = 1 / rows
        return Plan(masses, float((masses * costs).sum()), 0.0, 0)
    # Where most rows coincide the median is 0; where all do, every plan costs nothing.
    epsilon = regularization * (float(np.median(costs)) or float(costs.mean()) or 1.0)
    masses, error, iterations = _sinkhorn(costs / epsilon, tolerance, max_iterations)
    warnings = ()
    if error > tolerance:
        warnings = (f"the transport plan had a marginal error of {error:.1g} after {iterations} iterations",)
    return Plan(masses, float((masses * costs).sum()), error, iterations, warnings)


def domain_costs(source: NDArray[np.floating], target: NDArray[np.floating], *, scaled: bool = True) -> Array:
    """Squared Euclidean distances between features of two sets, shape (n, m), float64.

    Args:
        source: shape (n, d).
        target: shape (m, d).
        scaled: measure in units of the variance per feature inside of the two sets, tr S = d with the pooled
            covariance S. Squared distances have the unit of features², which differs between models.

    Raises:
        SelectionError: the widths differ, or nothing varies in either set.
    """
    if source.shape[1] != target.shape[1]:
        raise SelectionError(
            f"source features have {source.shape[1]} columns and target features {target.shape[1]}; give"
            " features of one model"
        )
    costs = squared_distances(source, target)
    if not scaled:
        return costs
    left = source.astype(np.float64) - source.mean(axis=0, dtype=np.float64)
    right = target.astype(np.float64) - target.mean(axis=0, dtype=np.float64)
    variance = (np.vdot(left, left) + np.vdot(right, right)) / ((len(left) + len(right)) * left.shape[1])
    if variance <= 0:
        raise SelectionError(
            "all features are constant in both sets, so there is no scale to measure their distance by;"
            " check the model's weights and preprocessing"
        )
    return costs / float(variance)


def squared_distances(left: NDArray[np.floating], right: NDArray[np.floating]) -> Array:
    """‖l_i - r_j‖² for all pairs, shape (n, m), float64; exact to rounding relative to the spread of the
    rows."""
    center = left.mean(axis=0, dtype=np.float64)
    left, right = left - center, right - center
    lengths = np.einsum("nd,nd->n", left, left)[:, None] + np.einsum("md,md->m", right, right)
    return np.maximum(lengths - 2 * (left @ right.T), 0)


def _sinkhorn(exponents: Array, tolerance: float, max_iterations: int) -> tuple[Array, float, int]:
    """masses = exp(f + g - exponents) with the wanted marginals, their error, and the iterations.

    One pass in the log domain brings all numbers into range; after it, passes are two products with a matrix
    each, whose scalings are moved into f and g (so the matrix is made anew) whenever they grow large.
    """
    rows, columns = exponents.shape
    f = -np.log(rows) - logsumexp(-exponents, axis=1)
    g = -np.log(columns) - logsumexp(f[:, None] - exponents, axis=0)
    masses = np.exp(f[:, None] + g - exponents)
    u, v = np.ones(rows), np.ones(columns)
    sums = masses.sum(axis=1)
    iterations = 1
    # After each pass the columns are exact, so the rows carry all of the error.
    while (error := float(np.abs(u * sums - 1 / rows).sum())) > tolerance and iterations < max_iterations:
        u = 1 / (rows * sums)
        v = 1 / (columns * (u @ masses))
        if max(u.max(), v.max(), 1 / u.min(), 1 / v.min()) > _ABSORB_ABOVE:
            f, g = f + np.log(u), g + np.log(v)
            masses = np.exp(f[:, None] + g - exponents)
            u, v = np.ones(rows), np.ones(columns)
        sums = masses @ v
        iterations += 1
    return u[:, None] * masses * v, error, iterations
