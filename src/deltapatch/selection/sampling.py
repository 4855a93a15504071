"""A given number of samples in the proportions of their classes, for what is too costly on all of them."""

import numpy as np
from numpy.typing import NDArray

from .score import SelectionError


def stratified(labels: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """Draws ``most`` samples at random; each class gives its share of them, rounded up or down.

    Unlike `draw_probe`, which keeps two samples of each class, it never draws more, so rare classes can be
    missed.

    Args:
        labels: shape (N,).
        most: how many to draw; all are taken where there are no more.
        seed: decides which, the same on every machine.

    Returns:
        Indices in ascending order.

    Raises:
        SelectionError: ``most`` is less than 2.
    """
    if most < 2:
        raise SelectionError(f"at most {most} samples were asked for; ask for 2 or more")
    if len(labels) <= most:
        return np.arange(len(labels))
    # Evenly spaced places in the order of the classes; within a class the order is random. The raw stream is
    # the same in every version of NumPy, which is not promised for its permutations.
    keys = np.random.PCG64(seed).random_raw(len(labels))
    places = (2 * np.arange(most) + 1) * len(labels) // (2 * most)
    return np.sort(np.lexsort((keys, labels))[places])
