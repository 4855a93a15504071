"""PED."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from ..arrays import read_labels, read_rows
from ..score import Score, SelectionError
from ..statistics import Array, indicator

_BLOCK = 2048
# Narrower features of the generic set are taken to be this wide, as published.
_LEAST_DEVIATION = 1e-3
# Classes move at most so many times.
_MOST_STEPS = 6


@dataclass(frozen=True, eq=False)
class MovedFeatures:
    """Features after classes that overlap have moved apart.

    Attributes:
        features: shape (N, d), float64 where anything moved; else the given array, bit for bit.
        steps: how often the classes moved, 0..6.
        sizes: of each move, Σ |move| over classes and standardised features; a move that was found too small
            to be made is the last of them.
    """

    features: NDArray[np.floating] = field(repr=False)
    steps: int
    sizes: tuple[float, ...]


def ped(
    score: Callable[[ArrayLike, ArrayLike], Score],
    features: ArrayLike,
    labels: ArrayLike,
    *,
    reference_std: ArrayLike,
    reference_mean: ArrayLike | None = None,
    overlap: float = 0.6,
    time_step: float = 0.1,
) -> Score:
    """Another score after potential energy descent: classes that overlap are first moved apart a little, as
    fine-tuning would (Li et al., "Exploring model transferability through the lens of potential energy", ICCV
    2023).

    What moves, and why so little, is said at `move_classes_apart`. Published for SFDA, NLEEP and LogME; any
    score that takes features and labels can be wrapped.

    Args:
        score: such as `sfda` or `logme`; other options than its defaults by `functools.partial`.
        features: shape (N, d), any floating dtype; never written to.
        labels: integers of shape (N,).
        reference_std: see `move_classes_apart`.
        reference_mean: see `move_classes_apart`.
        overlap: see `move_classes_apart`.
        time_step: see `move_classes_apart`.

    Returns:
        The wrapped score's result, named "ped(logme)" for one named "logme", with the details "ped_steps" and
        "ped_first_move", the size of the first step.

    Raises:
        SelectionError: see `move_classes_apart`, and what the wrapped score cannot take.

    Example:
        >>> generic = features_of(model, imagenet_validation)
        >>> ped(logme, features, labels, reference_std=generic.std(axis=0)).value
    """
    moved = move_classes_apart(
        features,
        labels,
        reference_std=reference_std,
        reference_mean=reference_mean,
        overlap=overlap,
        time_step=time_step,
    )
    found = score(moved.features, labels)
    details = {**found.diagnostics.details, "ped_steps": moved.steps, "ped_first_move": moved.sizes[0]}
    return replace(found, name=f"ped({found.name})", diagnostics=replace(found.diagnostics, details=details))


def move_classes_apart(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    reference_std: ArrayLike,
    reference_mean: ArrayLike | None = None,
    overlap: float = 0.6,
    time_step: float = 0.1,
) -> MovedFeatures:
    """Moves each class as a whole away from those that it overlaps with, at most 6 times.

    In features standardised by those of a generic set, such as ImageNet's validation images, class k with
    mean μ_k has the radius R_k = √(Σ variances), and classes overlap by O_kl = max(ν (R_k + R_l) - ‖μ_k -
    μ_l‖, 0). Class k moves by Σ_l e_kl min(½ Δt² O_kl, O_kl), with e_kl the unit vector from l to k. It ends
    when a move is half as large as the first or less; that move is not made. With Δt = 0.1 a move is 0.5 % of
    the overlap.

    Classes whose means coincide have no direction to part in and do not push each other. Classes of one
    sample neither move nor push: scores leave them out.

    Args:
        features: shape (N, d), any floating dtype; never written to.
        labels: integers of shape (N,).
        reference_std: standard deviation of each feature over the generic set, by the same model, shape (d,);
            taken as 1e-3 where smaller.
        reference_mean: mean of each feature over the generic set, shape (d,). Standardising and undoing it
            are both in the published method, but moves depend on differences only, so it cancels and can be
            left out.
        overlap: ν; 0.6 or 0.3 as published.
        time_step: Δt; the released program runs with 0.1, its function has 0.01 by default.

    Raises:
        SelectionError: an array cannot be read or has the wrong length, deviations are negative, no class has
            two samples, or an option is not above 0.
    """
    rows, numbers = read_rows(features), read_labels(labels)
    if len(rows) != len(numbers):
        raise SelectionError(f"{len(rows)} rows of features and {len(numbers)} labels; give as many")
    if overlap <= 0 or time_step <= 0:
        raise SelectionError(f"overlap is {overlap} and time_step {time_step}; give numbers above 0")
    deviations = np.maximum(_reference(reference_std, "reference_std", rows.shape[1]), _LEAST_DEVIATION)
    if reference_mean is not None:
        _reference(reference_mean, "reference_mean", rows.shape[1])
    counts = np.bincount(numbers)
    used = np.flatnonzero(counts > 1)
    if len(used) < 2:
        raise SelectionError(
            f"{len(used)} classes have 2 samples or more; classes move away from each other, so give two"
            " such classes"
        )
    means, radii = _shapes(rows, numbers, counts, deviations)
    shift, sizes = _descend(means[used], overlap * radii[used], min(0.5 * time_step**2, 1.0))
    if not shift.any():
        return MovedFeatures(rows, 0, sizes)
    moves = np.zeros_like(means)
    moves[used] = shift * deviations
    steps = len(sizes) - 1 if _too_small(sizes) else len(sizes)
    return MovedFeatures(rows + moves[numbers], steps, sizes)


def _reference(values: ArrayLike, what: str, width: int) -> Array:
    array = read_rows(np.atleast_2d(np.asarray(values, dtype=np.float64)), what)[0]
    if array.shape != (width,) or np.ndim(values) != 1:
        raise SelectionError(
            f"{what} has shape {np.shape(values)}, but there are {width} features; give one number for each"
        )
    if what == "reference_std" and array.min() < 0:
        raise SelectionError(
            f"reference_std holds the negative number {array.min():g}; give standard deviations"
        )
    return array


def _shapes(
    rows: NDArray[np.floating], labels: NDArray[np.int64], counts: NDArray[np.int64], deviations: Array
) -> tuple[Array, Array]:
    """Means (classes, d) and radii (classes,) in standardised features; zeros for classes without samples."""
    sums = np.zeros((len(counts), rows.shape[1]))
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(rows), _BLOCK)]
    # Around a row of their own, so that features far from zero lose no digits.
    origin = rows[0].astype(np.float64)
    for part in blocks:
        sums += indicator(labels[part], len(counts)) @ ((rows[part] - origin) / deviations)
    present = np.maximum(counts, 1)
    means = sums / present[:, None]
    squares = np.zeros(len(counts))
    for part in blocks:
        residuals = (rows[part] - origin) / deviations - means[labels[part]]
        lengths = np.einsum("nd,nd->n", residuals, residuals)
        squares += np.bincount(labels[part], weights=lengths, minlength=len(counts))
    return means, np.sqrt(squares / present)


def _descend(means: Array, reaches: Array, rate: float) -> tuple[Array, tuple[float, ...]]:
    """How far each class has moved in all, shape (K, d), and the size of every move. Radii stay as they
    are."""
    shift, sizes = np.zeros_like(means), list[float]()
    for _ in range(_MOST_STEPS):
        move = _push(means + shift, reaches, rate)
        sizes.append(float(np.abs(move).sum()))
        if sizes[0] == 0 or _too_small(tuple(sizes)):
            break
        shift += move
    return shift, tuple(sizes)


def _push(means: Array, reaches: Array, rate: float) -> Array:
    """Σ_l (μ_k - μ_l) / ‖μ_k - μ_l‖ · rate · O_kl of every class, as one product instead of K² vectors."""
    distances = cdist(means, means)
    overlaps = np.maximum(reaches[:, None] + reaches - distances, 0)
    apart = distances > 0
    weights = np.where(apart, rate * overlaps / np.where(apart, distances, 1), 0)
    # Around their middle, since the product is a difference of two sums.
    centred = means - means.mean(axis=0)
    return weights.sum(axis=1)[:, None] * centred - weights @ centred


def _too_small(sizes: tuple[float, ...]) -> bool:
    """Whether the last move is not to be made."""
    return len(sizes) > 1 and sizes[-1] <= 0.5 * sizes[0]
