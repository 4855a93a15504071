"""How far apart two sets of features are: the domain gap between what a base was trained for and a task."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arrays import read_rows
from ..score import SelectionError
from ..statistics import Statistics

Array = NDArray[np.float64]


def frechet_distance(source: ArrayLike | Statistics, target: ArrayLike | Statistics) -> float:
    """The squared Fréchet distance between two normal distributions fitted to features::

        G = ‖m_s - m_t‖² + tr( C_s + C_t - 2 (C_s^{1/2} C_t C_s^{1/2})^{1/2} )

    Covariances are divided by N - 1. With factors C = AᵀA the last trace is the sum of the singular values of
    A_s A_tᵀ, so that no root of a matrix is taken and fewer images than features are no trouble. It is not
    free of scale, and too few images make it too large: compare values of one base at one number of images.

    Args:
        source: features of shape (N, d) of the base on its own images, or their statistics (not compact
            ones).
        target: features (M, d) of the same base on the task's images, or their statistics.

    Raises:
        SelectionError: the widths differ, or there are fewer than two rows.

    Example:
        >>> frechet_distance([[-1.0], [1.0]], [[2.0], [4.0]])
        9.0
    """
    (first_mean, first), (second_mean, second) = _mean_and_factor(source), _mean_and_factor(target)
    if len(first_mean) != len(second_mean):
        raise SelectionError(
            f"features of {len(first_mean)} and of {len(second_mean)} columns cannot be compared; give those"
            " of one model, and statistics made without compact=True"
        )
    shift = first_mean - second_mean
    shared = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    distance = shift @ shift + (first**2).sum() + (second**2).sum() - 2 * shared
    return max(float(distance), 0.0)


def _mean_and_factor(features: ArrayLike | Statistics) -> tuple[Array, Array]:
    """The mean, and a matrix A with as few rows as there can be and AᵀA the covariance."""
    if isinstance(features, Statistics):
        samples, mean = features.samples, features.mean
        if features.width != len(mean):
            raise SelectionError(
                "compact statistics have a basis of their own; make them without compact=True"
            )
        values, vectors = np.linalg.eigh(features.scatter)
        factor = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    else:
        rows = read_rows(features).astype(np.float64)
        samples, mean = len(rows), rows.mean(axis=0)
        factor = np.linalg.qr(rows - mean, mode="r")
    if samples < 2:
        raise SelectionError("one row of features has no covariance; give two images or more")
    return mean, factor / np.sqrt(samples - 1)
