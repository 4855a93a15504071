"""H-score."""

from numpy.typing import ArrayLike

from ..score import Score, ranking_score
from ..statistics import Statistics
from ..subject import Samples, read_statistics
from ._explained import explained_variance


@ranking_score("statistics")
def h_score(features: ArrayLike | Statistics | Samples, labels: ArrayLike | None = None) -> Score:
    """tr(T⁻¹ B): the variance between class means in units of the features' own covariance (Bao et al., "An
    information-theoretic approach to transferability in task transfer learning", ICIP 2019).

    T and B have the same divisor. The value is in 0..min(d, K - 1) and does not change under invertible
    linear maps of the features. With N ≲ d it is about K - 1 for every model and ranks nothing: take
    `shrinkage_h_score` then. Public implementations that invert T with a cut-off of 1e-15 exceed the bound.

    Args:
        features: shape (N, d), any floating dtype; or `Statistics` of them.
        labels: integers of shape (N,).

    Raises:
        SelectionError: the input cannot be scored.

    Example:
        >>> h_score([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1]).value
        0.8
    """
    subject = read_statistics(features, labels)
    warnings: tuple[str, ...] = ()
    if subject.samples < 3 * subject.width:
        warnings = (
            f"{subject.samples} samples are few for {subject.width} features: the plain H-score nears its"
            f" bound {min(subject.width, subject.classes - 1)} for every model; use shrinkage_h_score",
        )
    return subject.score(
        "h_score",
        explained_variance(subject.statistics, 0.0),
        low=0,
        high=min(subject.width, subject.classes - 1),
        warnings=warnings,
    )
