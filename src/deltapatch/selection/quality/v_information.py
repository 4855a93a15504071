"""How early in a network a feature can be read off linearly: its complexity by V-information.

Source: Fel et al., "Understanding Visual Feature Reliance through the Lens of Complexity", NeurIPS 2024.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arrays import read_rows
from ..score import SelectionError

Array = NDArray[np.float64]

_PENALTIES = 10.0 ** np.arange(-8, 5)
"""Ridge penalties that are tried, as multiples of the mean eigenvalue of a layer."""


@dataclass(frozen=True, eq=False)
class VInformation:
    """How much of each feature every layer tells a linear reader.

    Attributes:
        information: I, the share of a feature's variance that is explained on held-out images, shape (layers,
            features), from 0 to 1.
        complexity: K = 1 - mean of I over the layers, shape (features,): 0 for what every layer tells, (m -
            1) / n for what layer m of n is the first to tell, 1 for what none does.
        features: which of the given features these are, in order; constant ones are left out.
        penalties: each layer's ridge penalty, as a multiple of its mean eigenvalue, shape (layers,).
        held_out: how many images the shares were measured on.
        warnings: one sentence each.
    """

    information: Array
    complexity: Array
    features: tuple[int, ...]
    penalties: tuple[float, ...]
    held_out: int
    warnings: tuple[str, ...]


def v_information(
    layers: Sequence[ArrayLike], features: ArrayLike, *, held_out: float = 0.3, seed: int = 0
) -> VInformation:
    """K(z) = 1 - (1/n) Σ_l I_l(z), where I_l is how well z is predicted linearly from layer l.

    I_l is R² on images that nothing was fitted to, 0 at least: on the same images it would come near 1
    wherever there are fewer images than activations. Each layer's ridge penalty has the smallest
    leave-one-out error over all features; one eigendecomposition of a layer serves all features and
    penalties. How activations are pooled changes K: compare only what was pooled in one way.

    Args:
        layers: for each layer, pooled activations of the same images, shape (N, d_l), in the order of the
            model.
        features: what is predicted, shape (N, F): pooled activations before the classifier along directions
            such as the rows of its weight. Scale and offset of a column change nothing.
        held_out: part of the images that I is measured on.
        seed: decides which.

    Raises:
        SelectionError: shapes do not fit, there are fewer than ten images, or all features are constant.

    Example:
        >>> found = v_information([stage1, stage2, stage3], pooled @ classifier.weight.T)
        >>> found.complexity.argsort()[:5]  # the five classes that are told apart earliest
    """
    targets = read_rows(features, "features").astype(np.float64)
    inputs = [read_rows(layer, f"activations of layer {index}") for index, layer in enumerate(layers)]
    _check(inputs, targets, held_out)
    order = np.random.default_rng(seed).permutation(len(targets))
    train, test = np.split(order, [len(order) - max(2, round(held_out * len(order)))])
    varies = (_spread(targets[train]) > 0) & (_spread(targets[test]) > 0)
    if not varies.any():
        raise SelectionError(
            "all features are constant over these images, so that there is nothing to predict"
        )
    targets = targets[:, varies]
    mean = targets[train].mean(axis=0)
    # Of one variance each, so that no feature alone decides the penalty.
    targets = (targets - mean) / targets[train].std(axis=0)
    information, penalties = zip(
        *(_explained(layer.astype(np.float64), targets, train, test) for layer in inputs), strict=True
    )
    shares = np.stack(information)
    constant = int((~varies).sum())
    return VInformation(
        shares,
        1 - shares.mean(axis=0),
        tuple(np.flatnonzero(varies).tolist()),
        tuple(penalties),
        len(test),
        (f"{constant} of {len(varies)} features are constant and left out",) if constant else (),
    )


def _check(inputs: Sequence[NDArray[np.floating]], targets: Array, held_out: float) -> None:
    if not inputs:
        raise SelectionError("there are no layers to predict from; give the activations of one or more")
    for index, layer in enumerate(inputs):
        if len(layer) != len(targets):
            raise SelectionError(
                f"layer {index} has {len(layer)} rows, but the features have {len(targets)}; give the same"
                " images"
            )
    if len(targets) < 10:
        raise SelectionError(f"{len(targets)} images are too few to fit and to measure; give ten or more")
    if not 0 < held_out < 1 or round(held_out * len(targets)) > len(targets) - 3:
        raise SelectionError(f"held_out must be a part of the images that leaves some to fit, not {held_out}")


def _spread(columns: Array) -> Array:
    """The range of each column, 0 where it is but rounding."""
    spread = np.ptp(columns, axis=0)
    return np.where(spread > 1e-12 * np.abs(columns).max(axis=0), spread, 0)


def _explained(
    layer: Array, targets: Array, train: NDArray[np.int64], test: NDArray[np.int64]
) -> tuple[Array, float]:
    """Held-out R² of each target, and the penalty.

    With X = U S Vᵀ the centred training rows, a ridge regression predicts U (S² / (S² + λ)) Uᵀ y for them,
    and X_test V / S of the rest stands in the place of U.
    """
    centred = layer[train] - layer[train].mean(axis=0)
    left, squares, right = _decomposed(centred)
    if not len(squares):
        return np.zeros(targets.shape[1]), float(_PENALTIES[-1])
    response = targets[train]
    projected = left.T @ response
    mean_square = float(squares.mean())
    errors = [
        _leave_one_out(left, squares / (squares + penalty * mean_square), projected, response)
        for penalty in _PENALTIES
    ]
    penalty = float(_PENALTIES[int(np.argmin(errors))])
    weights = right @ (projected * (np.sqrt(squares) / (squares + penalty * mean_square))[:, None])
    predicted = (layer[test] - layer[train].mean(axis=0)) @ weights
    rest = ((targets[test] - predicted) ** 2).sum(axis=0)
    whole = ((targets[test] - targets[test].mean(axis=0)) ** 2).sum(axis=0)
    return np.clip(1 - rest / whole, 0, 1), penalty


def _decomposed(rows: Array) -> tuple[Array, Array, Array]:
    """U, S² and V of rows, from the eigendecomposition of the smaller of their two Gram matrices."""
    is_wide = len(rows) < rows.shape[1]
    squares, vectors = np.linalg.eigh(rows @ rows.T if is_wide else rows.T @ rows)
    kept = squares > 1e-12 * max(float(squares[-1]), 1e-300)
    squares, vectors = squares[kept], vectors[:, kept]
    others = (rows.T if is_wide else rows) @ vectors / np.sqrt(squares)
    return (vectors, squares, others) if is_wide else (others, squares, vectors)


def _leave_one_out(left: Array, shrinkage: Array, projected: Array, response: Array) -> float:
    """Mean squared error when each row is predicted from all others, its part of the mean included."""
    leverage = (left**2) @ shrinkage + 1 / len(left)
    residual = response - left @ (shrinkage[:, None] * projected)
    return float(((residual / np.maximum(1 - leverage, 1e-9)[:, None]) ** 2).mean())
