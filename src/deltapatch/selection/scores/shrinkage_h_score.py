"""H-score with a regularised covariance."""

from numpy.typing import ArrayLike

from ..closed_form import ledoit_wolf
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
        statistics, samples = subject.statistics, subject.samples
        covariance = statistics.scatter / samples
        shrinkage = ledoit_wolf(covariance, statistics.quartic, samples, statistics.width) or 0.0
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
