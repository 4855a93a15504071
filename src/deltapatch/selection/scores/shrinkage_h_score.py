"""H-score with a regularised covariance."""

import numpy as np
from numpy.typing import ArrayLike

from ..score import Score, SelectionError, ranking_score
from ..statistics import Statistics
from ..subject import Samples, read_statistics
from ._explained import explained_variance


@ranking_score("statistics")
def shrinkage_h_score(
    features: ArrayLike | Statistics | Samples,
    labels: ArrayLike | None = None,
    *,
    shrinkage: float | None = None,
) -> Score:
    """(1 - α) tr(T_α⁻¹ B) with T_α = (1 - α) T + α (tr T / d) I (Ibrahim, Ponomareva, Mazumder: "Newer is not
    always better: rethinking transferability metrics, their peculiarities, stability and performance", 2021).

    α is the coefficient of Ledoit and Wolf unless one is given; it is in the details as "shrinkage". T and B
    have the divisor N - 1 both; a public implementation that takes N for one of them is off by N / (N - 1).
    The value is in 0..min(d, K - 1).

    Args:
        features: shape (N, d), any floating dtype; or `Statistics` of them.
        labels: integers of shape (N,).
        shrinkage: α in 0..1.

    Raises:
        SelectionError: the input cannot be scored, or α is not in 0..1.
    """
    subject = read_statistics(features, labels)
    if shrinkage is None:
        shrinkage = ledoit_wolf(subject.statistics)
    if not 0 <= shrinkage <= 1:
        raise SelectionError(f"shrinkage is {shrinkage}; give a number from 0 to 1, or None to estimate it")
    value = (1 - shrinkage) * explained_variance(subject.statistics, shrinkage)
    warnings: tuple[str, ...] = ()
    if shrinkage > 0.9:
        warnings = (
            f"the covariance was shrunk by {shrinkage:.2f}: too few samples to tell directions apart",
        )
    return subject.score(
        "shrinkage_h_score",
        value,
        low=0,
        high=min(subject.width, subject.classes - 1),
        warnings=warnings,
        details={"shrinkage": shrinkage},
    )


def ledoit_wolf(statistics: Statistics) -> float:
    """The coefficient α of Ledoit and Wolf (2004), from statistics alone.

    With S of divisor N, m = tr S / d: α = min(1, β² / δ²), δ² = ‖S - m I‖² / d and
    β² = (Σ‖f - μ‖⁴ - N ‖S‖²) / (d N²). In a basis of the features' span S lacks only zeros.
    """
    samples, width = statistics.samples, statistics.width
    covariance = statistics.scatter / samples
    length = float(np.einsum("ij,ij->", covariance, covariance))
    mean_variance = float(np.trace(covariance)) / width
    spread = length / width - mean_variance**2
    noise = (statistics.quartic - samples * length) / (width * samples**2)
    # Features of one variance in all directions are their own target: any coefficient is right.
    return float(np.clip(noise / spread, 0, 1)) if spread > 1e-14 * mean_variance**2 else 0.0
