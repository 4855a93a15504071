"""Random samples in the proportions of their classes: a probe of images, its halves, and parts of what is too
costly to compute on all.
"""

import numpy as np
from numpy.typing import NDArray

from .score import SelectionError
from .subject import read_samples

# Fewer samples of a class say nothing about how far it spreads.
_LEAST = 2
# A class of fewer samples has no half of `_LEAST`.
_DIVISIBLE = 2 * _LEAST
_HALVES_STREAM = 1


def draw_probe(labels: NDArray[np.int64], size: int, seed: int = 0) -> NDArray[np.int64]:
    """Draws about ``size`` images, of each class in proportion to its own, but two wherever it has two.

    For one seed, the images of a smaller probe are among those of a larger one, and the same on every
    machine.

    Args:
        labels: of all images, shape (N,).
        size: how many are wanted; more are drawn only where two of each class are more.
        seed: decides which.

    Returns:
        Indices in ascending order.

    Raises:
        SelectionError: fewer than two classes have two images, or ``size`` is below 4.
    """
    if size < 2 * _LEAST:
        raise SelectionError(
            f"a probe of {size} images cannot hold two images of two classes; ask for at least {2 * _LEAST}"
        )
    # A stand-in for features: whether labels can be scored at all is known before any base is loaded.
    read_samples(np.arange(len(labels), dtype=np.float64)[:, None], labels)
    counts = np.bincount(labels)
    share = min(1.0, size / len(labels))
    # Rounded half up: the count never falls as the share grows.
    wanted = np.minimum(np.maximum(np.floor(share * counts + 0.5), _LEAST), counts).astype(np.int64)
    # The raw stream is the same in every version of NumPy, which is not promised for its permutations.
    keys = np.random.PCG64(seed).random_raw(len(labels))
    chosen: list[NDArray[np.int64]] = []
    for label, count in enumerate(wanted):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(keys[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def draw_halves(labels: NDArray[np.int64], draws: int, seed: int = 0) -> NDArray[np.bool_]:
    """Draws random stratified halves of a probe, without repeats in a half.

    For a statistic that is smooth in the data, values on halves spread around the value of the whole as the
    value of the whole does around that of the population, since n / (n/2) - 1 = 1 (delete-half jackknife).
    This is no bootstrap, which draws images several times: a repeated image is its own nearest neighbour at
    distance zero, and scores that read distances break on it.

    A class of four or more images gives half of them, and of an odd number the larger or the smaller half. A
    smaller class would be left with one image: half of such classes are kept whole, the others left out.

    Args:
        labels: of the probe, shape (N,).
        draws: how many halves.
        seed: of all that is random.

    Returns:
        Which images are in each half, bool of shape (draws, N).
    """
    random = np.random.default_rng((seed, _HALVES_STREAM))
    classes, counts = np.unique(labels, return_counts=True)
    halves = np.zeros((draws, len(labels)), np.bool_)
    large = classes[counts >= _DIVISIBLE]
    small = classes[(counts >= _LEAST) & (counts < _DIVISIBLE)]
    for half in halves:
        # A half needs two classes.
        kept = min(len(small), max(_rounded(len(small) / 2, random), 2 - len(large)))
        half[np.isin(labels, random.permutation(small)[:kept])] = True
        for label in large:
            members = random.permutation(np.flatnonzero(labels == label))
            half[members[: _rounded(len(members) / 2, random)]] = True
    return halves


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


def _rounded(number: float, random: np.random.Generator) -> int:
    """Up or down by chance, right on average."""
    return int(number + random.random())
