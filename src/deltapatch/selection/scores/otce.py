"""OTCE."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from ..drawing import stratified
from ..score import Score, SelectionError
from ..statistics import Array, indicator
from ..subject import Samples, read_samples
from ..transport import domain_costs, transport


@dataclass(frozen=True)
class OtceCoefficients:
    """How the two terms of OTCE are weighed: domain · (W_D - mean) / deviation + task · (...) + intercept.

    Attributes:
        domain: weight of the standardised W_D.
        task: weight of the standardised W_T.
        intercept: what is added.
        means: of W_D and of W_T over the tasks that the weights were fitted on.
        deviations: their standard deviations.
    """

    domain: float
    task: float
    intercept: float
    means: tuple[float, float]
    deviations: tuple[float, float]

    @classmethod
    def fitted(cls, scores: Sequence[Score], accuracies: ArrayLike) -> "OtceCoefficients":
        """The least-squares fit of accuracies that are known, of pairs of tasks other than the one in
        question.

        Args:
            scores: of `otce`, one for each auxiliary pair of source and target; four or more.
            accuracies: after transfer, in the same order and in any unit; values of `otce` are then in that
                unit.

        Raises:
            SelectionError: there are too few scores, not one accuracy for each, a term is the same for all,
                or both terms go together exactly.
        """
        known = np.asarray(accuracies, dtype=np.float64)
        if len(scores) < 4 or known.shape != (len(scores),) or not np.isfinite(known).all():
            raise SelectionError(
                f"{len(scores)} scores and accuracies of shape {known.shape} cannot be fitted by three"
                " coefficients;"
                " give four scores or more with one accuracy each"
            )
        terms = np.array([[score.diagnostics.details[name] for name in ("W_D", "W_T")] for score in scores])
        means, deviations = terms.mean(axis=0), terms.std(axis=0)
        design = np.column_stack(
            [(terms - means) / np.where(deviations > 0, deviations, 1.0), np.ones(len(terms))]
        )
        weights, _, rank, _ = np.linalg.lstsq(design, known, rcond=1e-10)
        if rank < 3:
            raise SelectionError(
                "W_D and W_T of the auxiliary tasks are constant or go together exactly, so their weights"
                " cannot be told apart; add other tasks"
            )
        domain, task, intercept = weights.tolist()
        return cls(domain, task, intercept, (means[0].item(), means[1].item()), tuple(deviations.tolist()))

    def combine(self, domain_difference: float, task_difference: float) -> float:
        """The score that belongs to W_D and W_T."""
        terms = np.array([domain_difference, task_difference])
        return float(
            np.array([self.domain, self.task]) @ ((terms - self.means) / self.deviations) + self.intercept
        )


def otce(
    source_features: ArrayLike,
    source_labels: ArrayLike,
    target_features: ArrayLike,
    target_labels: ArrayLike,
    *,
    coefficients: OtceCoefficients | None = None,
    samples: int = 1000,
    scaled: bool = True,
    seed: int = 0,
) -> Score:
    """Optimal-transport-based conditional entropy (Tan et al., "OTCE: a transferability metric for
    cross-domain cross-task representations", CVPR 2021), from one model's features of its own source images
    and of the target's.

    P is the plan that moves the source onto the target at the least cost C, squared Euclidean distances. W_D
    = Σ P C says how different the images are; with P(a, b) the mass that goes from source class a to target
    class b, W_T = -Σ P(a, b) log(P(a, b) / P(a)) says how little a source class tells about the target's.
    Both are in the details, with the marginal error of the plan ("marginal_error", 0 for the exact plan of
    equal sizes up to 500; see `deltapatch.selection.transport`).

    The value is -W_T, the paper's score without auxiliary tasks, in -log K..0. Given coefficients that were
    fitted on auxiliary tasks with known accuracy, it is λ₁ Ŵ_D + λ₂ Ŵ_T + b of the standardised terms. The
    bare sum W_D + W_T, in use elsewhere, is dominated by W_D, which has the unit of features², and has the
    wrong sign.

    Args:
        source_features: shape (N_s, d), any floating dtype.
        source_labels: integers of shape (N_s,); classes of one sample are used too.
        target_features: shape (N_t, d).
        target_labels: integers of shape (N_t,); classes of one sample are left out.
        coefficients: see `OtceCoefficients.fitted`.
        samples: use at most so many of each set, drawn at random with the share of each class kept.
        scaled: measure W_D in units of the variance per feature inside of the sets; -W_T does not depend on
            it.
        seed: of the draw.

    Raises:
        SelectionError: the input cannot be scored, the widths differ, or ``samples`` is less than 2.
    """
    target = read_samples(target_features, target_labels)
    source = read_samples(source_features, source_labels, min_count=1)
    source_part, target_part = (stratified(side.labels, samples, seed) for side in (source, target))
    plan = transport(domain_costs(source.rows[source_part], target.rows[target_part], scaled=scaled))
    joint = _joint(source, target, source_part, target_part, plan.masses)
    task_difference = max(float(entr(joint).sum() - entr(joint.sum(axis=1)).sum()), 0.0)
    details = {
        "W_D": plan.cost,
        "W_T": task_difference,
        "source_samples": len(source_part),
        "target_samples": len(target_part),
        "marginal_error": plan.marginal_error,
        "iterations": plan.iterations,
    }
    if coefficients is not None:
        value = coefficients.combine(plan.cost, task_difference)
        return target.score("otce", value, warnings=plan.warnings, details=details)
    low = -float(np.log(target.classes))
    return target.score(
        "otce", 0.0 - task_difference, low=low, high=0, warnings=plan.warnings, details=details
    )


def _joint(
    source: Samples,
    target: Samples,
    source_part: NDArray[np.int64],
    target_part: NDArray[np.int64],
    masses: Array,
) -> Array:
    """The mass between each class of the source and each of the target, shape (K_s, K_t)."""
    by_source = indicator(source.labels[source_part], source.classes) @ masses
    return (indicator(target.labels[target_part], target.classes) @ by_source.T).T
