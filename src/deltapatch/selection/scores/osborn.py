"""OSBORN."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from ..arrays import read_labels, read_rows
from ..drawing import stratified
from ..score import SelectionError
from ..statistics import Array
from ..subject import Samples, read_samples
from ..transport import domain_costs, transport

# Beyond these there are too many ensembles to try them all.
_MOST_CANDIDATES = 25
_LARGEST_SIZE = 3


@dataclass(frozen=True, eq=False)
class EnsembleCandidate:
    """A model as `osborn` sees it.

    Attributes:
        source_features: of a sample of the images that the model was trained on, shape (N_s, d); N_s and d
            may differ between candidates.
        target_features: of the target's images, shape (N, d), in the order of their labels.
        predictions: the source class that its own head gives each target image, whole numbers from 0 of shape
            (N,); None for a model without head, whose target features are then clustered into groups.
    """

    source_features: ArrayLike = field(repr=False)
    target_features: ArrayLike = field(repr=False)
    predictions: ArrayLike | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Which candidates were chosen, and why.

    Attributes:
        chosen: indices into the candidates; in the order in which they were added, or ascending where all
            ensembles were tried.
        costs: of the first one, two, ... of ``chosen``; lower is better.
        domain_differences: W_D of each candidate, shape (M,).
        task_differences: W_T of each candidate, shape (M,).
        disagreements: H(Ŷ_a | Ŷ_b) + H(Ŷ_b | Ŷ_a) of each pair, shape (M, M), zeros on the diagonal.
        marginal_error: the largest of the transport plans.
        warnings: one sentence each.
        seconds: what it took.
    """

    chosen: tuple[int, ...]
    costs: tuple[float, ...]
    domain_differences: Array = field(repr=False)
    task_differences: Array = field(repr=False)
    disagreements: Array = field(repr=False)
    marginal_error: float = 0.0
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def cost(self) -> float:
        """Of the whole ensemble."""
        return self.costs[-1]


def osborn(
    candidates: Sequence[EnsembleCandidate],
    labels: ArrayLike,
    *,
    size: int = 3,
    exhaustive: bool = False,
    standardized: bool = False,
    samples: int = 1000,
    groups: int | None = None,
    scaled: bool = True,
    seed: int = 0,
) -> Ensemble:
    """Chooses models whose ensemble is expected to do well on the target (Bachu et al., "Building a winning
    team: selecting source model ensembles using a submodular transferability estimation approach", ICCV
    2023).

    Cost(M) = Σ_{m in M} (W_D(m) + W_T(m)) + Σ_{pairs in M} (H(Ŷ_a | Ŷ_b) + H(Ŷ_b | Ŷ_a)): how far a model's
    own images are from the target's in its features (the cost of moving one onto the other), how little the
    target's class tells about the source class Ŷ that the model predicts, H(Ŷ | Y), and how much two models'
    predictions disagree.

    The greedy choice starts with the model of least own cost and adds the one that costs least beside those
    it has. -Cost is submodular but falls with every model, so the bound of 1 - 1/e, which needs a set
    function that does not fall, holds for the function shifted by a constant per model only. Up to 25
    candidates and ensembles of 3 all can be tried instead.

    Args:
        candidates: M models; indices of the result are those of this sequence.
        labels: of the target's images, shape (N,); classes of one sample are left out.
        size: how many models to choose, 1..M.
        exhaustive: try all ensembles.
        standardized: divide W_D, W_T and the disagreements by their standard deviation over candidates and
            pairs. They have different units, so without it the largest term can decide alone; False as
            published.
        samples: use at most so many images of each side for W_D, drawn with the share of each class kept.
        groups: how many groups to cluster features into for models without head; None for the number of
            target classes.
        scaled: W_D in units of the total variance inside of the two sets, so that models of different width
            or feature scale can be compared; False for plain squared distances, as published.
        seed: of the draws and of the clustering.

    Raises:
        SelectionError: a candidate cannot be read (it is named by its index), or an option is not possible.

    Example:
        >>> ensemble = osborn([EnsembleCandidate(own, target, predictions), ...], labels, size=2)
        >>> ensemble.chosen, ensemble.cost
    """
    started = time.perf_counter()
    _check_size(len(candidates), size, exhaustive)
    if groups is not None and groups < 2:
        raise SelectionError(f"groups is {groups}; give 2 or more, or None")
    measured: list[_Measured] = []
    for index, candidate in enumerate(candidates):
        try:
            measured.append(_measure(candidate, labels, samples, groups, scaled, seed))
        except SelectionError as error:
            raise SelectionError(f"candidate {index}: {error}") from error
    domain = np.array([one.domain for one in measured])
    task = np.array([one.task for one in measured])
    pairs = _disagreements([one.predictions for one in measured])
    unary, weighed = domain + task, pairs
    if standardized:
        unary = domain / _deviation(domain) + task / _deviation(task)
        weighed = pairs / _deviation(pairs[np.triu_indices(len(pairs), 1)])
    chosen = (choose_best if exhaustive else choose_greedily)(unary, weighed, size)
    steps = tuple(ensemble_cost(unary, weighed, chosen[:count]) for count in range(1, size + 1))
    error = max(one.marginal_error for one in measured)
    seconds = time.perf_counter() - started
    return Ensemble(chosen, steps, domain, task, pairs, error, _warnings(measured), seconds)


def ensemble_cost(unary: Array, pairs: Array, members: Sequence[int]) -> float:
    """Σ of the members' own costs, shape (M,), and of the costs of their pairs, symmetric of shape (M, M)."""
    index = np.asarray(members, dtype=np.int64)
    return float(unary[index].sum() + np.triu(pairs[np.ix_(index, index)], 1).sum())


def choose_greedily(unary: Array, pairs: Array, size: int) -> tuple[int, ...]:
    """The member of least cost, then each time the one that adds least; of equals the first. O(size · M).

    Raises:
        SelectionError: ``size`` is not in 1..M.
    """
    _check_size(len(unary), size, exhaustive=False)
    added = unary.astype(np.float64)
    chosen: list[int] = []
    for _ in range(size):
        best = int(added.argmin())
        chosen.append(best)
        added = added + pairs[best]
        added[best] = np.inf
    return tuple(chosen)


def choose_best(unary: Array, pairs: Array, size: int) -> tuple[int, ...]:
    """The members of least cost among all ensembles of the size, ascending; of equals the first.

    Raises:
        SelectionError: ``size`` is not in 1..M, or there are more than 25 candidates or 3 members.
    """
    _check_size(len(unary), size, exhaustive=True)
    return min(
        combinations(range(len(unary)), size), key=lambda members: ensemble_cost(unary, pairs, members)
    )


def _check_size(candidates: int, size: int, exhaustive: bool) -> None:
    if not 1 <= size <= candidates:
        raise SelectionError(
            f"an ensemble of {size} cannot be chosen from {candidates} candidates; give a size from 1 to"
            f" {candidates}"
        )
    if exhaustive and (candidates > _MOST_CANDIDATES or size > _LARGEST_SIZE):
        raise SelectionError(
            f"all ensembles of {size} from {candidates} candidates are too many to try; that is for up to"
            f" {_MOST_CANDIDATES} candidates and {_LARGEST_SIZE} members, so choose greedily"
        )


@dataclass(frozen=True, eq=False)
class _Measured:
    """What there is to know of one candidate."""

    domain: float
    task: float
    predictions: NDArray[np.int64]
    marginal_error: float
    exact: bool
    warnings: tuple[str, ...]


def _measure(
    candidate: EnsembleCandidate, labels: ArrayLike, samples: int, groups: int | None, scaled: bool, seed: int
) -> _Measured:
    target = read_samples(candidate.target_features, labels)
    source = read_rows(candidate.source_features, "source features")
    source_part = stratified(np.zeros(len(source), np.int64), samples, seed)
    target_part = stratified(target.labels, samples, seed)
    costs = domain_costs(source[source_part], target.rows[target_part], scaled=scaled)
    predictions = _predictions(candidate, target, labels, groups or target.classes, seed)
    plan = transport(costs)
    # In units of the total variance rather than of that per feature, else wide models would be far from all.
    domain = plan.cost / target.width if scaled else plan.cost
    task = _conditional_entropy(predictions, target.labels)
    warnings = target.warnings + plan.warnings
    return _Measured(domain, task, predictions, plan.marginal_error, plan.iterations == 0, warnings)


def _warnings(measured: Sequence[_Measured]) -> tuple[str, ...]:
    said = [f"candidate {index}: {warning}" for index, one in enumerate(measured) for warning in one.warnings]
    if len({one.exact for one in measured}) > 1:
        said.append(
            "W_D is exact for some candidates and blurred, so a little too large, for others; give all as"
            " many source images"
        )
    return tuple(said)


def _predictions(
    candidate: EnsembleCandidate, target: Samples, labels: ArrayLike, groups: int, seed: int
) -> NDArray[np.int64]:
    """What the model says of the images that are used, numbered from 0: classes, or groups."""
    if candidate.predictions is None:
        return _clustered(target, groups, seed)
    predictions, numbers = read_labels(candidate.predictions), read_labels(labels)
    if len(predictions) != len(numbers):
        raise SelectionError(
            f"{len(predictions)} predictions and {len(numbers)} labels were given; give as many"
        )
    used = predictions[~np.isin(numbers, target.dropped)]
    return np.unique(used, return_inverse=True)[1].astype(np.int64)


def _clustered(target: Samples, groups: int, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans

    if groups > target.samples:
        raise SelectionError(
            f"{target.samples} samples cannot be clustered into {groups} groups; give predictions, or"
            " fewer groups"
        )
    found = KMeans(groups, random_state=seed).fit_predict(target.spanned.astype(np.float64))
    return found.astype(np.int64)


def _conditional_entropy(of: NDArray[np.int64], given: NDArray[np.int64]) -> float:
    """H(of | given) in nats, of two numberings of the same samples; needs no table of all pairs of
    classes."""
    joint = np.unique(of + given * (of.max() + 1), return_counts=True)[1] / len(of)
    alone = np.bincount(given) / len(given)
    return max(float(entr(joint).sum() - entr(alone).sum()), 0.0)


def _disagreements(predicted: Sequence[NDArray[np.int64]]) -> Array:
    pairs = np.zeros((len(predicted), len(predicted)))
    for first, second in combinations(range(len(predicted)), 2):
        a, b = predicted[first], predicted[second]
        pairs[first, second] = pairs[second, first] = _conditional_entropy(a, b) + _conditional_entropy(b, a)
    return pairs


def _deviation(values: Array) -> float:
    """The standard deviation; 1 for values without any, which then decide nothing."""
    return float(values.std() or 1.0) if len(values) else 1.0
