"""ETran."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp, softmax

from ..closed_form import LinearRule, discriminant, ledoit_wolf, nearest_mean
from ..score import Score, SelectionError, ranking_score
from ..statistics import Array, Statistics
from ..subject import Samples, read_samples

_BLOCK = 2048
# The share of samples, those of least energy, that the energy term is the mean of.
_SHARE = 0.005


@ranking_score("features")
def etran(
    features: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    class_term: Literal["ncm", "lda"] = "ncm",
    scaled: bool = True,
) -> Score:
    """Energy of the least familiar images plus the probability of the true class (Gholami et al., "ETran:
    energy-based transferability estimation", ICCV 2023).

    Energy: e_i = log Σ_j exp f_ij over the features (over logits in the paper's words); the mean of the
    smallest 0.5 % of them, of one sample at least (the released selection is empty for N < 200 and gives
    NaN). Class: the mean posterior of the true class. The value is their sum, as the paper says. The released
    results combine the terms over all candidates instead, see `etran_over_pool`; both terms are in the
    details, as "energy" and "class". Its third term, for the boxes of object detection, is not offered.

    "ncm" is what produced the published numbers: the posterior softmax(x·μ_k - ½‖μ_k‖² + log n_k/N) of the
    nearest class mean. It is described as linear discriminant analysis, but the released code calls a
    symmetric eigensolver on a matrix that is not, and keeps all of its eigenvectors; since E Eᵀ = I, the
    covariance drops out. "lda" is the discriminant as described, with the covariance within classes shrunk by
    the coefficient of Ledoit and Wolf.

    Neither the energy nor "ncm" is free of the features' scale, so features are scaled to tr S_T = d; with
    many features and well separated classes the posterior then comes near the accuracy of the rule.

    Args:
        features: shape (N, d), any floating dtype.
        labels: integers of shape (N,).
        class_term: "ncm" or "lda".
        scaled: False takes the features' own scale, as released.

    Raises:
        SelectionError: the input cannot be scored, or an option is not possible.

    Example:
        >>> scores = [etran(features, labels) for features in features_of_each_model]
        >>> best = max(etran_over_pool(scores), key=float)
    """
    if class_term not in ("ncm", "lda"):
        raise SelectionError(f"class_term is {class_term!r}; give 'ncm' or 'lda'")
    subject = read_samples(features, labels)
    statistics = subject.statistics
    scale = 1.0
    if scaled:
        scale = float(np.sqrt(subject.width * subject.samples / np.trace(statistics.scatter)))
    energy, lowest = _energy(subject, scale)
    details = {"energy": energy, "energy_samples": lowest, "scale": scale}
    if class_term == "ncm":
        rule = _nearest_mean_with_priors(statistics, scale)
    else:
        details["shrinkage"] = _ledoit_wolf_within(subject)
        rule = discriminant(statistics, details["shrinkage"])
    details["class"] = _mean_posterior(subject, rule)
    return subject.score("etran", energy + details["class"], details=details)


def etran_over_pool(
    scores: Sequence[Score], *, energy: float = 0.15, classes: float = 0.85
) -> tuple[Score, ...]:
    """The released combination of the scores of all candidates for one task: each term is brought to 0..1
    over the candidates (least to largest), then 0.15 · energy + 0.85 · class. The values are in 0..1 and
    depend on the other candidates: adding a model can change the order of two others.

    Args:
        scores: of `etran`, two or more, all of the same images and options.
        energy: weight of the energy term; from 0.
        classes: weight of the class term; from 0.

    Returns:
        Scores in the given order that differ from the given ones in name and value. A term that is the same
        for all candidates adds nothing.

    Raises:
        SelectionError: there are fewer than two scores, one is not of `etran`, they are of different images
            or options, or a weight is negative.
    """
    if len(scores) < 2:
        raise SelectionError(f"{len(scores)} scores cannot be combined; give those of two or more candidates")
    if min(energy, classes) < 0:
        raise SelectionError(f"the weights are {energy} and {classes}; give numbers from 0")
    if any(score.name != "etran" for score in scores):
        raise SelectionError("only scores of etran can be combined by its terms; give what etran returned")
    made = {
        (score.diagnostics.samples, score.diagnostics.classes, "shrinkage" in score.diagnostics.details)
        for score in scores
    }
    if len(made) > 1:
        raise SelectionError(
            "the scores have different numbers of samples or classes, or different class terms; compute them"
            " on the same images with the same options"
        )
    terms = np.array([[score.diagnostics.details[term] for term in ("energy", "class")] for score in scores])
    spans = np.ptp(terms, axis=0)
    shares = (terms - terms.min(axis=0)) / np.where(spans > 0, spans, 1)
    values: list[float] = (shares @ np.array([energy, classes])).tolist()
    return tuple(
        replace(score, name="etran_over_pool", value=value)
        for score, value in zip(scores, values, strict=True)
    )


def _energy(subject: Samples, scale: float) -> tuple[float, int]:
    """The mean of the smallest energies, and how many they are."""
    energies = np.concatenate(
        [
            logsumexp(scale * subject.rows[start : start + _BLOCK].astype(np.float64), axis=1)
            for start in range(0, subject.samples, _BLOCK)
        ]
    )
    lowest = max(1, int(np.ceil(_SHARE * subject.samples)))
    return float(np.partition(energies, lowest - 1)[:lowest].mean()), lowest


def _nearest_mean_with_priors(statistics: Statistics, scale: float) -> LinearRule:
    rule = nearest_mean(statistics)
    return LinearRule(
        scale**2 * rule.weight, scale**2 * rule.bias + np.log(statistics.counts / statistics.samples)
    )


def _mean_posterior(subject: Samples, rule: LinearRule) -> float:
    total = 0.0
    for start in range(0, subject.samples, _BLOCK):
        part = slice(start, start + _BLOCK)
        posteriors = softmax(rule.scores(subject.spanned[part]), axis=1)
        total += float(np.take_along_axis(posteriors, subject.labels[part, None], axis=1).sum())
    return total / subject.samples


def _ledoit_wolf_within(subject: Samples) -> float:
    """The coefficient of Ledoit and Wolf for the covariance within classes."""
    samples, width = subject.samples, subject.width
    covariance: Array = subject.statistics.within / samples
    means = subject.statistics.class_means
    quartic = 0.0
    for start in range(0, samples, _BLOCK):
        part = slice(start, start + _BLOCK)
        residuals = subject.spanned[part] - means[subject.labels[part]]
        quartic += float((np.einsum("nd,nd->n", residuals, residuals) ** 2).sum())
    mean_variance = float(np.trace(covariance)) / width
    if mean_variance <= 1e-14 * float(np.trace(subject.statistics.scatter)) / (samples * width):
        raise SelectionError(
            "all samples of a class have the same features, so there is no covariance within classes; use"
            " class_term 'ncm'"
        )
    # Where S is a multiple of the identity, 1 is as right as any, and never singular.
    found = ledoit_wolf(covariance, quartic, samples, width)
    return 1.0 if found is None else found
