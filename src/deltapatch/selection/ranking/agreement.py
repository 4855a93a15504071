"""How well the values of a score order models as their accuracies after fine-tuning do.

The weighted Kendall tau counts, for each pair of models, whether both orders agree, with the weight
1/(r_i + 1) + 1/(r_j + 1), where r is a model's rank from 0. In whose order the ranks are counted makes three
figures that publications call by one name; here they are variants:

- ``"average"``: the mean of the two below; what SciPy computes by default, and most papers print.
- ``"by-accuracy"``: ranks in the order of the true accuracies.
- ``"by-score"``: ranks in the order of the score.

On the same numbers they can name different scores as the best one, so figures of different variants are never
put together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, pearsonr, rankdata, weightedtau

from ...evaluation.metrics import SIGNIFICANCE, Interval
from ..score import SelectionError

Variant = Literal["average", "by-accuracy", "by-score"]
Array = NDArray[np.float64]

VARIANTS: tuple[Variant, ...] = get_args(Variant)
TOP = (1, 3, 5)
"""For which k the figures among the k best models are given."""


@dataclass(frozen=True)
class Agreement:
    """How well a score orders models on one target.

    A constant score, and constant accuracies, have correlations of 0. Where scores are tied, the figures of
    the models chosen are the mean over all orders of the tied ones.

    Attributes:
        variant: of the weighted tau.
        models: how many were ranked.
        weighted_tau: -1 to 1, see the module's text.
        kendall_tau: τ_b, in which all models weigh the same.
        pearson: correlation of the values themselves, over the models that have a score.
        relative_accuracy: Rel@k for each k: the best accuracy among the k models with the highest scores,
            over the best of all; NaN where that is not positive, as for negated errors.
        recall: Rec@k for each k: whether the model with the highest score is among the k most accurate ones,
            1 or 0.
        regret: what the accuracy of the model with the highest score falls short of the best, in the unit of
            the accuracies.
        tied: how many models share their score with another.
        unscored: the numbers of the models whose score is NaN; they rank last.
    """

    variant: Variant
    models: int
    weighted_tau: float
    kendall_tau: float
    pearson: float
    relative_accuracy: Mapping[int, float]
    recall: Mapping[int, float]
    regret: float
    tied: int
    unscored: tuple[int, ...]


def agreement(scores: ArrayLike, accuracies: ArrayLike, variant: Variant = "average") -> Agreement:
    """Compares the order by a score with the order by accuracy.

    Args:
        scores: shape (M,), larger means expected to be better; NaN where a model has none.
        accuracies: shape (M,), what the models reached, in any unit in which larger is better.
        variant: of the weighted tau.

    Raises:
        SelectionError: the two do not belong together, there are fewer than two models, an accuracy is not
            finite, or there is no such variant.

    Example:
        >>> agreement([1, 3, 2, 4], [71.0, 72.0, 73.0, 74.0]).weighted_tau
        0.7333333333333332
    """
    values, truth = _read(scores, accuracies)
    ranks = _ranks(values)
    known = np.isfinite(values)
    return Agreement(
        variant=variant,
        models=len(values),
        weighted_tau=_weighted_tau(ranks, truth, variant),
        kendall_tau=_correlation(kendalltau(ranks, truth)),
        pearson=_pearson(values[known], truth[known]),
        relative_accuracy={k: _relative_accuracy(ranks, truth, k) for k in TOP if k <= len(values)},
        recall={k: _recall(ranks, truth, k) for k in TOP if k <= len(values)},
        regret=float(truth.max() - _expected_best(ranks, truth, 1)),
        tied=int((np.bincount(ranks)[ranks] > 1).sum()),
        unscored=tuple(np.flatnonzero(np.isnan(values)).tolist()),
    )


def weighted_tau(scores: ArrayLike, accuracies: ArrayLike, variant: Variant = "average") -> float:
    """The weighted Kendall tau alone; see `agreement`."""
    values, truth = _read(scores, accuracies)
    return _weighted_tau(_ranks(values), truth, variant)


def leave_one_model_out(scores: ArrayLike, accuracies: ArrayLike, variant: Variant = "average") -> Array:
    """The weighted tau without each of the models in turn, shape (M,).

    One poor network that every score knows to be poor can carry the figure of a whole table; then one of
    these values is far below the others.

    Raises:
        SelectionError: see `agreement`; three models or more are needed.
    """
    values, truth = _read(scores, accuracies, least=3)
    rest = ~np.eye(len(values), dtype=bool)
    return np.array([_weighted_tau(_ranks(values[kept]), truth[kept], variant) for kept in rest])


def bootstrap_over_models(
    scores: ArrayLike,
    accuracies: ArrayLike,
    variant: Variant = "average",
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """The weighted tau with its 95 % interval over pools of as many models, drawn with replacement.

    With ten models it is wide, as it should be: one target tells few scores apart.

    Raises:
        SelectionError: see `agreement`; or there is no draw.
    """
    values, truth = _read(scores, accuracies)
    if draws < 1:
        raise SelectionError(f"{draws} draws of models cannot be; give 1 or more")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(draws, len(values)))
    found = [_weighted_tau(_ranks(values[models]), truth[models], variant) for models in drawn]
    low, high = np.quantile(found, [SIGNIFICANCE / 2, 1 - SIGNIFICANCE / 2])
    return Interval(_weighted_tau(_ranks(values), truth, variant), float(low), float(high))


@dataclass(frozen=True)
class MeanAgreement:
    """A score over several targets.

    Attributes:
        variant: of the weighted tau, the same for all targets.
        targets: how many.
        weighted_tau: the mean.
        lowest_weighted_tau: of the target on which the score did worst.
        worst_target: which one that is.
        kendall_tau: the mean.
        pearson: the mean.
        regret: the mean.
    """

    variant: Variant
    targets: int
    weighted_tau: float
    lowest_weighted_tau: float
    worst_target: str
    kendall_tau: float
    pearson: float
    regret: float


def mean_agreement(by_target: Mapping[str, Agreement]) -> MeanAgreement:
    """The mean and the worst over targets.

    Raises:
        SelectionError: there is no target, or the weighted taus are of different variants.
    """
    found = list(by_target.values())
    if not found:
        raise SelectionError("there is no target to average over; give the agreement on one or more")
    variant = common_variant([one.variant for one in found])
    worst = min(by_target, key=lambda target: by_target[target].weighted_tau)
    return MeanAgreement(
        variant,
        len(found),
        float(np.mean([one.weighted_tau for one in found])),
        by_target[worst].weighted_tau,
        worst,
        float(np.mean([one.kendall_tau for one in found])),
        float(np.mean([one.pearson for one in found])),
        float(np.mean([one.regret for one in found])),
    )


def common_variant(variants: Sequence[Variant]) -> Variant:
    """The one variant that figures of a table are of.

    Raises:
        SelectionError: they are of several.
    """
    different = sorted(set(variants))
    if len(different) != 1:
        raise SelectionError(
            f"weighted taus of the variants {' and '.join(different)} were put together, which are different"
            " figures; compute all of them with the same variant"
        )
    return different[0]


def _read(scores: ArrayLike, accuracies: ArrayLike, least: int = 2) -> tuple[Array, Array]:
    values, truth = np.asarray(scores, np.float64), np.asarray(accuracies, np.float64)
    if values.ndim != 1 or values.shape != truth.shape:
        raise SelectionError(
            f"scores have shape {values.shape} and accuracies {truth.shape}; give one of each for every model"
        )
    if len(values) < least:
        raise SelectionError(f"{len(values)} models cannot be ranked here; give {least} or more")
    if not np.isfinite(truth).all():
        missing = int(np.flatnonzero(~np.isfinite(truth))[0])
        raise SelectionError(
            f"the accuracy of model {missing} is {truth[missing]}; leave out models without a known accuracy"
        )
    return values, truth


def _ranks(values: Array) -> NDArray[np.int64]:
    """0 for the lowest score, equal scores alike; NaN is below all numbers."""
    has_score = ~np.isnan(values)
    ranks = np.zeros(len(values), np.int64)
    ranks[has_score] = rankdata(values[has_score], "dense")
    return ranks - ranks.min()


def _weighted_tau(ranks: NDArray[np.int64], truth: Array, variant: Variant) -> float:
    if variant not in VARIANTS:
        raise SelectionError(f"there is no weighted tau '{variant}'; choose one of {', '.join(VARIANTS)}")
    if variant == "average":
        return _correlation(weightedtau(ranks, truth))
    by_first: Any = None  # what scipy takes, though its types do not know it
    ranked_by, other = (truth, ranks) if variant == "by-accuracy" else (ranks, truth)
    return _correlation(weightedtau(ranked_by, other, rank=by_first))


def _pearson(values: Array, truth: Array) -> float:
    # Said here, since scipy warns of a constant input.
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(truth) == 0:
        return 0.0
    return _correlation(pearsonr(values, truth))


def _correlation(found: Any) -> float:
    """Scipy's result as a number: with something constant it is NaN, and says nothing, which is 0."""
    return 0.0 if np.isnan(found.statistic) else float(found.statistic)


def _relative_accuracy(ranks: NDArray[np.int64], truth: Array, k: int) -> float:
    best = float(truth.max())
    return _expected_best(ranks, truth, k) / best if best > 0 else float("nan")


def _recall(ranks: NDArray[np.int64], truth: Array, k: int) -> float:
    more_accurate = (truth[:, None] < truth[None, :]).sum(axis=1)
    return float(np.mean(more_accurate[ranks == ranks.max()] < k))


def _expected_best(ranks: NDArray[np.int64], truth: Array, k: int) -> float:
    """The best accuracy among the k models with the highest scores: the mean over the orders of tied ones."""
    last = np.sort(ranks)[-k]
    tied = np.sort(truth[ranks == last])[::-1]
    sure = truth[ranks > last]
    drawn, count = k - len(sure), len(tied)
    floor = sure.max() if len(sure) else -np.inf
    # The i-th largest of the tied is the best of those drawn if it is and none of the i larger ones are.
    ways = [comb(count - number - 1, drawn - 1) for number in range(count)]
    return float(np.dot(ways, np.maximum(tied, floor)) / comb(count, drawn))
