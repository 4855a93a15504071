"""LogME."""

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import read_rows
from ..score import Diagnostics, Score, SelectionError, ranking_score
from ..statistics import Statistics, in_own_span
from ..subject import Samples, read_statistics
from ._evidence import Evidence, maximise_evidence


@ranking_score("statistics")
def logme(
    features: ArrayLike | Statistics | Samples, labels: ArrayLike | None = None, *, center: bool = False
) -> Score:
    """The log evidence per sample of a Bayesian linear model of each class's indicator, averaged over
    classes (You et al., "LogME: practical assessment of pre-trained models for transfer learning", ICML
    2021; JMLR 2022).

    For t in {0, 1}^N: t | w ~ N(F w, I/β), w ~ N(0, I/α), and the value is the mean over classes of
    max_{α, β} log p(t | F, α, β) / N. Columns that F lacks to rank d add nothing to it: the widely copied
    fast code leaves out a term for them and so mis-ranks models of different width where N < d; this
    follows the formula. The value has no absolute meaning, and there is no intercept: shifting the features
    changes it, while scaling, rotating and repeating them does not.

    Where the evidence has no maximum, its bound is taken and counted in the details: "no_signal" classes (α
    → ∞: the features tell nothing) and "separable" ones (β → ∞: they tell all).

    Args:
        features: shape (N, d), any floating dtype; or `Statistics` of them.
        labels: integers of shape (N,).
        center: take the mean from features and indicators first; False as published.

    Raises:
        SelectionError: the input cannot be scored.

    Example:
        >>> logme([[1, 0], [0, 1], [1, 1], [2, 1], [0, 2]], [1, 0, 1, 1, 0]).value
        -0.7987959367
    """
    subject = read_statistics(features, labels)
    statistics, counts = subject.statistics, subject.counts.astype(np.float64)
    if center:
        projected = statistics.class_sums - counts[:, None] * statistics.mean
        found = maximise_evidence(
            statistics.scatter, projected, counts - counts**2 / subject.samples, subject.samples
        )
    else:
        found = maximise_evidence(statistics.gram, statistics.class_sums, counts, subject.samples)
    return subject.score(
        "logme", float(found.evidence.mean()), warnings=_warnings(found), details=_details(found)
    )


def logme_of_targets(features: ArrayLike, targets: ArrayLike, *, center: bool = True) -> Score:
    """LogME of real targets, for regression and for images with several labels: the mean over the columns.

    Args:
        features: shape (N, d), any floating dtype.
        targets: shape (N,) or (N, T).
        center: take the mean from features and targets first.

    Raises:
        SelectionError: the shapes differ, or numbers are not finite.
    """
    rows = read_rows(features)
    columns = np.asarray(targets, np.float64)
    columns = read_rows(columns[:, None] if columns.ndim == 1 else columns, "targets").astype(np.float64)
    if len(rows) != len(columns):
        raise SelectionError(f"{len(rows)} rows of features and {len(columns)} targets; give as many")
    spanned = in_own_span(rows).astype(np.float64)
    if center:
        spanned, columns = spanned - spanned.mean(axis=0), columns - columns.mean(axis=0)
    found = maximise_evidence(
        spanned.T @ spanned, columns.T @ spanned, np.einsum("nt,nt->t", columns, columns), len(rows)
    )
    diagnostics = Diagnostics(
        len(rows), rows.shape[1], columns.shape[1], warnings=_warnings(found), details=_details(found)
    )
    return Score("logme_of_targets", float(found.evidence.mean()), diagnostics)


def _details(found: Evidence) -> dict[str, float]:
    return {
        "alpha": float(np.median(found.alpha)),
        "beta": float(np.median(found.beta)),
        "no_signal": float(found.no_signal.sum()),
        "separable": float(found.separable.sum()),
    }


def _warnings(found: Evidence) -> tuple[str, ...]:
    classes = len(found.evidence)
    said: list[str] = []
    if found.no_signal.any():
        said.append(f"the features tell nothing about {found.no_signal.sum()} of {classes} classes")
    if found.separable.any():
        said.append(f"the features fit {found.separable.sum()} of {classes} classes without error")
    return tuple(said)
