"""LEEP: how well the answers of the model's own head tell the target's labels."""

import numpy as np
from numpy.typing import ArrayLike

from ..score import Score, ranking_score
from ..subject import Samples, read_samples
from ._empirical import expected_predictions, label_entropy


@ranking_score("probabilities")
def leep(probabilities: ArrayLike | Samples, labels: ArrayLike | None = None, *, log: bool = True) -> Score:
    """Log expected empirical prediction (Nguyen et al., "LEEP", ICML 2020, equation 2).

    With Θ_iz the probability that the model's head gives its source class z for image i, and P̂(k | z) the
    share of z's mass that falls on images of target class k,

        LEEP = 1/N Σ_i log Σ_z P̂(y_i | z) Θ_iz,        -H(y) <= LEEP <= 0.

    0 means that source classes determine target classes. -H(y), the negated entropy of the labels (in the
    details), is a head that tells nothing; it cannot be worse, since P̂ is one step of
    expectation–maximisation away from a predictor that always gives the class frequencies. Models without a
    head have no LEEP; see `nleep`. Published LEEPs come in three kinds that cannot be compared: as above,
    with the roles of labels and source classes exchanged, and without the logarithm.

    Args:
        probabilities: Θ of shape (N, S); softmax, not logits.
        labels: target classes, integers of shape (N,).
        log: False averages the expected probabilities themselves, in [0, 1], as some public code does under
            the same name; the result is named apart.

    Raises:
        SelectionError: rows do not sum to 1, or fewer than two classes have two samples.

    Example:
        >>> leep([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]], [0, 0, 1, 1]).value
        -0.3839808833246151
    """
    subject = read_samples(probabilities, labels, probabilities=True)
    expected = expected_predictions(subject.rows, subject.labels, subject.classes)
    entropy = label_entropy(subject.counts)
    details = {"label_entropy": entropy}
    if not log:
        return subject.score("leep without log", float(expected.mean()), low=0, high=1, details=details)
    return subject.score("leep", float(np.log(expected).mean()), low=-entropy, high=0, details=details)
