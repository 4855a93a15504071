"""How much of the features' variance is within classes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..score import Diagnostics
from ..statistics import Statistics
from ..subject import read_statistics


@dataclass(frozen=True)
class IntraClassVariance:
    """Variance within classes as a share of all variance.

    Attributes:
        share: tr(S_W) / tr(S_T), from 0 (each class is one point) to 1 (class means do not differ). Smaller
            is better separated; it is no transferability score.
        diagnostics: samples, width and classes that were used, and the traces as "within" and "total".
    """

    share: float
    diagnostics: Diagnostics


def intra_class_variance(
    features: ArrayLike | Statistics, labels: ArrayLike | None = None, *, min_count: int = 2
) -> IntraClassVariance:
    """D = tr(S_W) / d for features that are scaled to tr(S_T) / d = 1, which is tr(S_W) / tr(S_T).

    S_W is the scatter around the class means, S_T that around the mean, both divided by N. With few images a
    class it comes out too small, since class means are fitted: by (N - K) / (N - 1) where classes do not
    differ.

    Args:
        features: shape (N, d), or their statistics, compact ones too.
        labels: integers, shape (N,); none with statistics.
        min_count: classes with fewer samples are left out.

    Raises:
        SelectionError: the input cannot be used.

    Example:
        >>> intra_class_variance([[0.0], [2.0], [3.0], [5.0]], [0, 0, 1, 1]).share
        0.3076923076923077
    """
    subject = read_statistics(features, labels, min_count=min_count)
    statistics = subject.statistics
    total = float(np.trace(statistics.scatter)) / subject.samples
    # The length of what is within is what is not between: no d x d matrix is needed for its trace.
    between = float((statistics.class_offsets**2).sum()) / subject.samples
    score = subject.score(
        "intra_class_variance",
        (total - between) / total,
        low=0,
        high=1,
        details={"within": total - between, "total": total},
    )
    return IntraClassVariance(score.value, score.diagnostics)
