"""The images that a protocol fits on, chooses on and measures on: of one task, or of several as one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np

from ...data import ImageSet, Provenance, TaskData
from ...data.sources.concatenated import ConcatenatedStore
from ...errors import DataError, DeltapatchError

TEST_SELECTED = "test-selected"

Split = Literal["test", "validation"]
MeasuredOn = Literal["test", "validation", "test-selected", "given"]

_LONGEST = 500
"""Characters of a description: patch files take little more."""


def test_selected(task: TaskData) -> TaskData:
    """The task with its test images as validation images: epoch and settings are then chosen on them.

    Many published figures were made in this way. They are optimistic, and comparable only with each other;
    patches and results that come from such a task say "test-selected".

    Raises:
        DataError: there are no test images.
    """
    if task.test is None or not len(task.test):
        raise DataError(f"{task.name} has no test images to choose on; leave it at its validation images.")
    digest = hashlib.sha256(f"{task.provenance.digest} {TEST_SELECTED}".encode()).hexdigest()
    changed = {"val": len(task.test), "validation": TEST_SELECTED, "digest": digest}
    return replace(task, val=task.test, provenance=task.provenance.model_copy(update=changed))


def images_to_measure(task: TaskData, on: Split) -> tuple[ImageSet, MeasuredOn]:
    """The test images, or the validation images where they are asked for or there are no others.

    Raises:
        DataError: there are none.
    """
    if on == "test" and task.test is not None and len(task.test):
        return task.test, TEST_SELECTED if task.provenance.validation == TEST_SELECTED else "test"
    if task.val is not None and len(task.val):
        return task.val, TEST_SELECTED if task.provenance.validation == TEST_SELECTED else "validation"
    wanted = "test or validation images" if on == "test" else "validation images"
    raise DataError(f"{task.name} has no {wanted} to measure an accuracy on; give data with some.")


@dataclass(frozen=True)
class _Part:
    """One task's images of one split, and the number of its first class among all."""

    images: ImageSet
    first_class: int


def joint_task(tasks: Sequence[TaskData]) -> TaskData:
    """All tasks as one: the images of all, and the classes of all, named ``task/class``.

    Each split is the concatenation of those that there are, in the order of the tasks; it is None where no
    task has it.

    Args:
        tasks: one or more, with different names.

    Raises:
        DataError: two tasks have the same name, or limit differently what an image may cost.
        DeltapatchError: there is no task.
    """
    check_tasks(tasks)
    starts = first_classes(tasks)

    def split(sets: Sequence[ImageSet | None]) -> ImageSet | None:
        return _concatenated(
            [_Part(images, start) for images, start in zip(sets, starts, strict=True) if images is not None]
        )

    train = split([task.train for task in tasks])
    val = split([task.val for task in tasks])
    test = split([task.test for task in tasks])
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(f"{task.name} {task.provenance.digest}\n".encode())
    return TaskData(
        name="+".join(task.name for task in tasks),
        classes=tuple(f"{task.name}/{name}" for task in tasks for name in task.classes),
        train=train,
        val=val,
        test=test,
        provenance=Provenance(
            source=_shortened(", ".join(task.provenance.source for task in tasks)),
            kind="joint",
            digest=digest.hexdigest(),
            train=len(train or ()),
            val=len(val or ()),
            test=len(test or ()),
            validation=_validation_of_all(tasks),
        ),
    )


def first_classes(tasks: Sequence[TaskData]) -> list[int]:
    """The number of each task's first class among the classes of the `joint_task`."""
    return list(accumulate((len(task.classes) for task in tasks[:-1]), initial=0))


def check_tasks(tasks: Sequence[TaskData]) -> None:
    """Raises DeltapatchError where there is no task, DataError where two have the same name."""
    if not tasks:
        raise DeltapatchError("there is no task; give one or more.")
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two tasks are called '{twice}'; give each its own name.")


def _concatenated(parts: Sequence[_Part]) -> ImageSet | None:
    if not parts:
        return None
    limits = parts[0].images.limits
    if any(part.images.limits != limits for part in parts):
        raise DataError("the tasks have different image limits; open all of their data with the same.")
    store = ConcatenatedStore(tuple(part.images.store for part in parts))
    rows = [part.images.rows + start for part, start in zip(parts, store.starts, strict=False)]
    labels = [part.images.labels + part.first_class for part in parts]
    return ImageSet(store, np.concatenate(labels), np.concatenate(rows), limits)


def _validation_of_all(tasks: Sequence[TaskData]) -> str:
    """How the validation images were made, said once where it is the same for all tasks."""
    rules = {task.provenance.validation for task in tasks}
    if len(rules) == 1:
        return rules.pop()
    return _shortened("; ".join(f"{task.name}: {task.provenance.validation}" for task in tasks))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
