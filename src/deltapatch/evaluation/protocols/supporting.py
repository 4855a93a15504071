"""The task that the base was trained for: what is measured of it, and what methods may choose by."""

from dataclasses import dataclass

import numpy as np

from ...base import Base
from ...data import ImageSet, TaskData
from ...errors import DataError


@dataclass(frozen=True)
class Supporting:
    """The task that the base was trained for.

    Attributes:
        name: what it is called in tables.
        images: labelled images to measure on; a label is the number of one of the base's outputs.
        validation: other such images, by which methods that change the base's weights choose how far they
            go; None leaves that to the patching tasks.
    """

    name: str
    images: ImageSet
    validation: ImageSet | None = None

    @classmethod
    def of(cls, base: Base, task: TaskData) -> "Supporting":
        """The task with the numbers of the base's outputs as labels.

        It is measured on the test images, and methods choose by the validation images. Without both of them
        the test images are divided, class by class, into a half for each; without test images the validation
        images, and without those the training images. Classes are matched by name. Where none has the name of
        one of the base's, as with numbers or the codes of ImageNet's folders, and there are as many as the
        base has, they are taken in order.

        Raises:
            DataError: some classes are the base's and others are not, or there are fewer than two images.
        """
        measured, validation = task.test, task.val
        if measured is None or validation is None or not len(measured) or not len(validation):
            measured, validation = _halves(task)
        numbers = _outputs(base, task)
        return cls(
            task.name,
            measured.with_labels(numbers[measured.labels]),
            validation.with_labels(numbers[validation.labels]),
        )


def _halves(task: TaskData) -> tuple[ImageSet, ImageSet]:
    """Every other image of each class to measure on, and those between them to choose by."""
    splits = (task.test, task.val, task.train)
    images = next((images for images in splits if images is not None and len(images)), None)
    if images is None or len(images) < 2:
        raise DataError(
            f"{task.name} has fewer than two images of the base's own task, of which one half is measured and"
            " one half chosen by; give more"
        )
    order = np.argsort(images.labels, kind="stable")
    return images.subset(np.sort(order[::2])), images.subset(np.sort(order[1::2]))


def _outputs(base: Base, task: TaskData) -> np.ndarray:
    """For each class of the task, the number of the base's output: int64 of shape (classes,)."""
    place = {name: index for index, name in enumerate(base.classes)}
    unknown = [name for name in task.classes if name not in place]
    if len(unknown) == len(task.classes) and len(base.classes) in (0, len(task.classes)):
        return np.arange(len(task.classes))
    if unknown:
        raise DataError(
            f"{task.name} has the class '{unknown[0]}', which is not one of the {len(place)} classes of"
            f" {base.name}; name the folders as its classes are"
        )
    return np.array([place[name] for name in task.classes])
