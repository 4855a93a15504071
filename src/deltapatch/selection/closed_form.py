"""Heads that follow from statistics alone, without training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from .arrays import read_rows
from .score import SelectionError
from .statistics import Statistics

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LinearRule:
    """A linear classifier.

    Attributes:
        weight: shape (K, d).
        bias: shape (K,).
    """

    weight: Array
    bias: Array

    def scores(self, features: ArrayLike) -> Array:
        """What each class scores for each row: (N, d) -> (N, K)."""
        return read_rows(features) @ self.weight.T + self.bias

    def predict(self, features: ArrayLike) -> NDArray[np.int64]:
        """The class of each row: (N, d) -> (N,)."""
        return self.scores(features).argmax(axis=1)


def ledoit_wolf(covariance: Array, quartic: float, samples: int, width: int) -> float | None:
    """The shrinkage α of Ledoit and Wolf (2004) towards m I, m = tr S / d; None where S is m I already, so
    that any coefficient is right.

    α = min(1, β² / δ²), δ² = ‖S - m I‖² / d, β² = (Σ‖r‖⁴ - N ‖S‖²) / (d N²).

    Args:
        covariance: S of N residuals r with divisor N, shape (d, d); in a basis of their span it lacks only
        zeros. quartic: Σ‖r‖⁴. samples: N. width: d.
    """
    length = float(np.einsum("ij,ij->", covariance, covariance))
    mean_variance = float(np.trace(covariance)) / width
    spread = length / width - mean_variance**2
    if spread <= 1e-14 * mean_variance**2:
        return None
    noise = (quartic - samples * length) / (width * samples**2)
    return float(np.clip(noise / spread, 0, 1))


def nearest_mean(statistics: Statistics) -> LinearRule:
    """The class whose mean is nearest, see `nearest_to`. Classes without samples are never chosen."""
    rule = nearest_to(statistics.class_means)
    return LinearRule(rule.weight, np.where(statistics.counts > 0, rule.bias, -np.inf))


def nearest_to(means: Array) -> LinearRule:
    """The rule f·μ_k - ½‖μ_k‖², which is largest for the nearest of the means, shape (K, d)."""
    return LinearRule(means, -0.5 * np.einsum("kd,kd->k", means, means))


def discriminant(
    statistics: Statistics, shrinkage: float = 0.0, within: Array | None = None, means: Array | None = None
) -> LinearRule:
    """Linear discriminant analysis: f·S⁻¹μ_k - ½ μ_kᵀS⁻¹μ_k + log(n_k / N).

    S is the covariance within classes (divisor N), moved by ``shrinkage`` towards the multiple of the
    identity with the same trace.

    Args:
        statistics: of the features.
        shrinkage: 0..1.
        within: scatter within classes, shape (d, d); left out, that of the statistics.
        means: of the classes, shape (K, d); left out, those of the statistics.

    Raises:
        SelectionError: S is singular, as it is for N ≤ d without shrinkage.
    """
    means = statistics.class_means if means is None else means
    covariance = (statistics.within if within is None else within) / statistics.samples
    mean_variance = float(np.trace(covariance)) / statistics.width
    shrunk = (1 - shrinkage) * covariance
    shrunk[np.diag_indices_from(shrunk)] += shrinkage * mean_variance
    try:
        weight = cho_solve(cho_factor(shrunk, lower=True, overwrite_a=True, check_finite=False), means.T).T
    except LinAlgError:
        raise SelectionError(
            f"the covariance within classes of {statistics.samples} samples with {statistics.width} features"
            " is singular; give more samples, fewer features, or shrinkage"
        ) from None
    priors = np.log(np.maximum(statistics.counts, 1e-300) / statistics.samples)
    return LinearRule(weight, priors - 0.5 * np.einsum("kd,kd->k", weight, means))
