"""Smaller versions of a task: a few training images of each class, or a share of all."""

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...data import ImageSet, TaskData
from ...errors import DataError, DeltapatchError


def few_shot(task: TaskData, per_class: int, seed: int) -> TaskData:
    """The task with ``per_class`` random training images of each class; the other splits stay as they are.

    For one seed, the images of a smaller number are among those of a larger one, and the same on every
    machine.

    Raises:
        DataError: there are no training images, or a class that has some has fewer.
        DeltapatchError: ``per_class`` is below 1, or the seed is negative.
    """
    if per_class < 1:
        raise DeltapatchError(f"per_class is {per_class}, but at least one image of each class is expected.")
    train = _training_images(task)
    present, counts = np.unique(train.labels, return_counts=True)
    if counts.min() < per_class:
        scarce = task.classes[present[counts.argmin()]]
        raise DataError(
            f"{task.name}: class '{scarce}' has {counts.min()} training images, but {per_class} of each class"
            f" were asked for; ask for at most {counts.min()}."
        )
    return _of_first(task, train, np.full(len(task.classes), per_class), seed)


def subsample(task: TaskData, share: float, seed: int) -> TaskData:
    """The task with a random share of the training images of each class, at least one of each.

    For one seed, the images of a smaller share are among those of a larger one, and the same on every
    machine. The other splits stay as they are; the whole share is the task itself.

    Args:
        task: the whole task.
        share: part of the training images, 0 < share <= 1; 0.15 for 15 %.
        seed: decides which images, from 0.

    Raises:
        DataError: there are no training images.
        DeltapatchError: ``share`` is not a part, or the seed is negative.
    """
    if not 0 < share <= 1:
        raise DeltapatchError(f"share is {share}, but 0 < share <= 1 is expected, such as 0.15 for 15 %.")
    train = _training_images(task)
    counts = np.bincount(train.labels, minlength=len(task.classes))
    # Rounded half up: the count never falls as the share grows. The tiny amount undoes 0.15 * 100 = 14.99...
    wanted = np.maximum(np.floor(share * counts + 0.5 + 1e-9).astype(np.int64), 1)
    return _of_first(task, train, wanted, seed)


def _training_images(task: TaskData) -> ImageSet:
    if task.train is None or not len(task.train):
        raise DataError(f"{task.name} has no training images to choose from; give data with some.")
    return task.train


def _of_first(task: TaskData, train: ImageSet, wanted: NDArray[np.int64], seed: int) -> TaskData:
    """The task with the first so many images of each class, in the random order of a seed."""
    chosen = _chosen(train.labels, wanted, seed)
    if len(chosen) == len(train):
        return task
    digest = hashlib.sha256(f"{task.provenance.digest} training images:".encode())
    digest.update(chosen.astype("<i8").tobytes())
    provenance = task.provenance.model_copy(update={"train": len(chosen), "digest": digest.hexdigest()})
    return replace(task, train=train.subset(chosen), provenance=provenance)


def _chosen(labels: NDArray[np.int64], wanted: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Indices in ascending order, so that more of them change nothing but what is added."""
    if seed < 0:
        raise DeltapatchError(f"seed is {seed}, but a whole number from 0 is expected.")
    # The raw stream is the same in every version of NumPy, which is not promised for its permutations.
    keys = np.random.PCG64(seed).random_raw(len(labels))
    chosen: list[NDArray[np.int64]] = []
    for label, count in enumerate(wanted):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(keys[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))
