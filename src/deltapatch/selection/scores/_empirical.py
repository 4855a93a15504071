"""The predictor that target labels and source probabilities define together, which LEEP and NLEEP measure."""

import numpy as np
from numpy.typing import NDArray

from ..statistics import indicator

Array = NDArray[np.float64]

# Numbers in one block of rows: 32 MiB.
_BLOCK_NUMBERS = 1 << 22


def expected_predictions(
    probabilities: NDArray[np.floating], labels: NDArray[np.int64], classes: int
) -> Array:
    """Σ_z P̂(y_i | z) Θ_iz for each sample i: how probable the empirical predictor finds its true class.

    P̂(k | z) = Σ_{i: y_i = k} Θ_iz / Σ_i Θ_iz. Takes O(N S + K S) operations and O(K S) memory: no other
    class than a sample's own is predicted.

    Args:
        probabilities: Θ, shape (N, S); rows are brought to sum to 1 exactly.
        labels: shape (N,), from 0 to ``classes`` - 1.
        classes: K.

    Returns:
        Shape (N,), each in (0, 1].
    """
    size = max(1, _BLOCK_NUMBERS // probabilities.shape[1])
    blocks = [slice(start, start + size) for start in range(0, len(probabilities), size)]
    joint = np.zeros((classes, probabilities.shape[1]))
    for block in blocks:
        joint += indicator(labels[block], classes) @ _normalised(probabilities[block])
    mass = joint.sum(axis=0)
    # A source class without mass multiplies zeros only, whatever is put in for its 0 / 0.
    joint /= np.where(mass > 0, mass, 1.0)
    return np.concatenate(
        [np.einsum("ns,ns->n", joint[labels[block]], _normalised(probabilities[block])) for block in blocks]
    )


def label_entropy(counts: NDArray[np.int64]) -> float:
    """H(y) in nats, of the classes' sample counts, each 1 or more."""
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _normalised(rows: NDArray[np.floating]) -> Array:
    return rows / rows.sum(axis=1, keepdims=True, dtype=np.float64)
