"""NCE: how much of the target's labels is left open once the source label is known."""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arrays import read_labels
from ..score import Score, ranking_score
from ..subject import Samples, read_samples
from ._empirical import label_entropy


@ranking_score("probabilities")
def nce(source: ArrayLike | Samples, labels: ArrayLike | None = None) -> Score:
    """Negative conditional entropy (Tran et al., "Transferability and Hardness", ICCV 2019).

    With P̂ the shares of images that have source label z and target label k,

        NCE = -H(Y | Z) = Σ_{k,z} P̂(k, z) log( P̂(k, z) / P̂(z) ),        -H(y) <= NCE <= 0.

    0 means that the source label determines the target label, -H(y) (in the details) that it tells nothing.
    Cells without images add nothing. Public code adds 1e-5 or 1e-20 to each cell instead, which moves the
    value by the number of cells, so values of models with different numbers of source classes are not
    comparable there.

    Args:
        source: probabilities of the model's own head, shape (N, S), whose largest (the first of equal ones)
            is taken as the source label; or source labels as integers of shape (N,).
        labels: target classes, integers of shape (N,).

    Raises:
        SelectionError: rows of probabilities do not sum to 1, source labels are not whole numbers from 0, or
            fewer than two target classes have two samples.

    Example:
        >>> nce([0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 1]).value
        -0.6365141682948129
    """
    subject, source_labels = _read_source(source, labels)
    used, numbers = np.unique(source_labels, return_inverse=True)
    cells, first, counts = np.unique(
        numbers * subject.classes + subject.labels, return_index=True, return_counts=True
    )
    of_source = np.bincount(numbers)[numbers[first]]
    value = float((counts * np.log(counts / of_source)).sum()) / subject.samples
    entropy = label_entropy(subject.counts)
    warnings: tuple[str, ...] = ()
    if len(cells) > subject.samples / 2:
        warnings = (
            f"{subject.samples} samples are spread over {len(cells)} pairs of source and target label, so the"
            " value is too high; give more images",
        )
    details = {"label_entropy": entropy, "source_labels": len(used), "pairs": len(cells)}
    return subject.score("nce", value, low=-entropy, high=0, warnings=warnings, details=details)


def _read_source(source: ArrayLike | Samples, labels: ArrayLike | None) -> tuple[Samples, NDArray[np.int64]]:
    """What is scored, and the source label of each of its samples."""
    if isinstance(source, Samples) or labels is None or np.ndim(source) != 1:
        subject = read_samples(source, labels, probabilities=True)
        return subject, subject.rows.argmax(axis=1)
    numbers = read_labels(source)
    # Source labels stand for rows of probabilities that are certain; the rows themselves are not needed.
    subject = read_samples(np.ones((len(numbers), 1)), labels, probabilities=True)
    kept = ~np.isin(read_labels(labels), subject.dropped)
    return replace(subject, width=len(np.unique(numbers))), numbers[kept]
