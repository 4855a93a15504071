"""TransRate."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..score import Score, SelectionError, ranking_score
from ..statistics import Array
from ..subject import Samples, read_samples


@ranking_score("features")
def transrate(
    features: ArrayLike | Samples,
    labels: ArrayLike | None = None,
    *,
    epsilon: float = 1e-4,
    class_weights: Literal["samples", "equal"] = "samples",
    scaled: bool = True,
) -> Score:
    """R(Z) - Σ_k w_k R(Z_k): how many more nats it takes to code the features than to code them class by
    class (Huang et al., "Frustratingly easy transferability estimation", ICML 2022).

    R(Z) = ½ log det(I + ZᵀZ / (N ε)) with Z centred; Z_k are the rows of class k, centred by the mean of
    all, and n_k stands in place of N. The rates depend on the features' scale, so features are scaled to
    tr(ZᵀZ) = N.

    Args:
        features: shape (N, d), any floating dtype.
        labels: integers of shape (N,).
        epsilon: distortion; larger than 0.
        class_weights: "samples" for w_k = n_k / N as in theory, "equal" for 1 / K as in the released code.
        scaled: False takes the features' own scale; values of different models then cannot be compared.

    Raises:
        SelectionError: the input cannot be scored, or an option is not possible.
    """
    if epsilon <= 0:
        raise SelectionError(f"epsilon is {epsilon}; give a number larger than 0")
    subject = read_samples(features, labels)
    statistics = subject.statistics
    samples = subject.samples
    scale = samples / float(np.trace(statistics.scatter)) if scaled else 1.0
    whole = _rate(statistics.scatter * (scale / (samples * epsilon)))
    order = np.argsort(subject.labels, kind="stable")
    ends = np.cumsum(subject.counts)
    rates: list[float] = []
    for count, end in zip(subject.counts.tolist(), ends.tolist(), strict=True):
        rows = subject.spanned[order[end - count : end]].astype(np.float64) - statistics.mean
        gram = rows @ rows.T if count < rows.shape[1] else rows.T @ rows
        rates.append(_rate(gram * (scale / (count * epsilon))))
    weights = subject.counts / samples if class_weights == "samples" else np.full(len(rates), 1 / len(rates))
    within = float(weights @ np.array(rates))
    return subject.score(
        "transrate", whole - within, details={"rate": whole, "class_rate": within, "epsilon": epsilon}
    )


def _rate(matrix: Array) -> float:
    """½ log det(I + A)."""
    shifted = matrix + np.eye(len(matrix))
    return 0.5 * float(np.linalg.slogdet(shifted)[1])
