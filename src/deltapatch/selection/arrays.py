"""Arrays as users have them -> arrays as scores need them, or a sentence that says what is wrong."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .score import SelectionError


def read_rows(values: ArrayLike, what: str = "features") -> NDArray[np.floating]:
    """A matrix of finite floating numbers, not copied where it is one; never written to.

    Args:
        values: numpy array, torch tensor or nested lists of shape (N, columns).
        what: how messages call the rows.

    Raises:
        SelectionError: it has another shape, is empty, or holds NaN or infinite numbers.
    """
    array = _as_numpy(values)
    if array.ndim != 2 or 0 in array.shape:
        raise SelectionError(
            f"{what} have shape {array.shape}; expected (N, columns) with one row or more for each sample"
        )
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise SelectionError(
            f"{what} hold NaN or infinite numbers in {len(bad)} of {len(array)} rows (the first is row"
            f" {bad[0]}); leave these images out, or compute the model in fp32"
        )
    return array


def read_labels(labels: ArrayLike) -> NDArray[np.int64]:
    """Class numbers of shape (N,), int64.

    Raises:
        SelectionError: they are not one whole number from 0 for each sample.
    """
    array = _as_numpy(labels)
    if array.ndim != 1:
        raise SelectionError(f"labels have shape {array.shape}; expected one number for each sample, (N,)")
    numbers = array.astype(np.int64)
    if not np.array_equal(numbers, array):
        raise SelectionError("labels are not whole numbers; number the classes from 0")
    if len(numbers) and numbers.min() < 0:
        raise SelectionError(f"labels hold the negative number {numbers.min()}; number the classes from 0")
    return numbers


def read_probabilities(values: ArrayLike) -> NDArray[np.floating]:
    """Rows of probabilities, shape (N, S).

    Raises:
        SelectionError: a number is negative, or a row does not sum to 1 within 1e-3, as logits do not.
    """
    rows = read_rows(values, "probabilities")
    sums = rows.sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero((np.abs(sums - 1) > 1e-3) | (rows.min(axis=1) < 0))
    if len(wrong):
        raise SelectionError(
            f"probabilities of row {wrong[0]} sum to {sums[wrong[0]]:.4g} or are negative; expected numbers"
            " from 0 that sum to 1 (softmax of the logits)"
        )
    return rows


def _as_numpy(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor, which selection need not import
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() < 4:
            values = values.float()
        values = values.numpy()
    return np.asarray(values)
