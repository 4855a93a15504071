"""The accuracy on every task after every step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...base import Base
from ...data import ImageSet
from ...patch import Patch
from ..answers import evaluate
from .scores import BASE_ROW, AccuracyMatrix
from .splits import MeasuredOn
from .steps import Step


@dataclass(frozen=True)
class Column:
    """One task of an accuracy matrix.

    Attributes:
        name: the task.
        images: its images, with labels that are classes of whoever answers.
        measured_on: which of its splits they are.
        answered_by: the task whose patch answers; None where the base does, for its own task.
    """

    name: str
    images: ImageSet
    measured_on: MeasuredOn
    answered_by: str | None


@dataclass(frozen=True)
class Measurement:
    """How many images of a task were answered right.

    Attributes:
        right: images that were answered right.
        images: images that could be read.
        skipped: images that could not; they count in no accuracy.
        measured_on: the split that they are of: "test", or "validation" where there are no test images or
            they were not wanted; "test-selected" where the images that are measured on chose the epoch as
            well, in the manner of many published figures; "given" for the supporting task.
    """

    right: int
    images: int
    skipped: int
    measured_on: MeasuredOn

    @property
    def accuracy(self) -> float:
        """The part of the readable images that was answered right."""
        return self.right / self.images


class Measuring:
    """Measures patches of one base; no patch answers the same images twice."""

    def __init__(self, base: Base, workers: int) -> None:
        self._base = base
        self._workers = workers
        self._known: dict[tuple[str, Patch | None], Measurement] = {}

    def matrix(self, columns: Sequence[Column], steps: Sequence[Step]) -> AccuracyMatrix:
        """The accuracies on all columns after all steps, below those of the base alone."""
        values = np.full((len(steps) + 1, len(columns)), np.nan)
        for place, column in enumerate(columns):
            if column.answered_by is None:
                values[0, place] = self._measure(column, None).accuracy
            for row, step in enumerate(steps, start=1):
                found = self.measure(column, step)
                if found is not None:
                    values[row, place] = found.accuracy
        names = tuple(column.name for column in columns)
        return AccuracyMatrix(names, (BASE_ROW, *(step.task for step in steps)), values)

    def measure(self, column: Column, step: Step) -> Measurement | None:
        """How a column's task is answered after a step; None where it is not learned yet.

        Raises:
            DeltapatchError: no image could be read, or a label is not a class of whoever answers.
        """
        if column.answered_by is None:
            return self._measure(column, step.supporting)
        patch = step.patches.get(column.answered_by)
        return None if patch is None else self._measure(column, patch)

    def _measure(self, column: Column, patch: Patch | None) -> Measurement:
        key = (column.name, patch)
        if key not in self._known:
            found = evaluate(self._base, column.images, patch, workers=self._workers)
            self._known[key] = Measurement(
                int(found.correct.sum()), len(found.labels), found.skipped, column.measured_on
            )
        return self._known[key]
