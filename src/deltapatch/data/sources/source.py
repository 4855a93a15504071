"""The common form of all sources: classes and, for each split, where the images lie and their labels."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from deltapatch.data.decode import ImageInput
from deltapatch.errors import DataError, DeltapatchWarning, ImageError

SourceKind = Literal["folder", "npz", "parquet", "hub", "joint"]


class Split(StrEnum):
    """What a group of images is for."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


SPLIT_OF_NAME = {
    "train": Split.TRAIN,
    "val": Split.VAL,
    "valid": Split.VAL,
    "validation": Split.VAL,
    "test": Split.TEST,
}


class ImageStore(Protocol):
    """Where the images of one split lie, not yet decoded; it is pickled into worker processes."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What a person calls the image in this row: a path, or a place in a file."""
        ...

    def read(self, row: int) -> ImageInput:
        """Fetches the image in this row for ``decode_image``; raises ``ImageError`` where there is none."""
        ...

    def version(self) -> str:
        """sha256, in hexadecimal digits, that changes when any image of the store changes."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """One split: a store and an int64 label for each of its rows, shape (N,)."""

    store: ImageStore
    labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """What was found in a folder, file or hub set.

    Attributes:
        name: the last part of the path, or the hub's name; no directory.
        kind: which of the readers read it.
        classes: label names in the order of the labels.
        splits: the splits that are there.
        digest: sha256 that changes when the images or labels change.
    """

    name: str
    kind: SourceKind
    classes: tuple[str, ...]
    splits: Mapping[Split, LabelledImages]
    digest: str

    def __post_init__(self) -> None:
        if not self.splits:
            raise DataError(f"{self.name}: no train, val or test split was found; add at least one.")
        _check_classes(self.classes, self.name)
        for split, images in self.splits.items():
            _check_labels(images, self.classes, f"{self.name}, split '{split}'")
        train = self.splits.get(Split.TRAIN)
        if train is not None and len(np.unique(train.labels)) < 2:
            raise DataError(
                f"{self.name}: all training images have the same label; at least two classes are needed."
            )


class EncodedImages(Protocol):
    """A store whose images are encoded bytes, in memory or in files of their own."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes | Path: ...


def content_version(store: EncodedImages) -> str:
    """sha256, in hexadecimal digits, over all encoded images of a store, in order; reads them all."""
    digest = hashlib.sha256()
    for row in range(len(store)):
        try:
            content = store.read(row)
            content = content.read_bytes() if isinstance(content, Path) else content
            # The length ends an image, so that bytes cannot move from one image to the next unnoticed.
            digest.update(b"%d:" % len(content) + content)
        except (ImageError, OSError):
            digest.update(b"none:")
    return digest.hexdigest()


def number_labels(
    values: Mapping[Split, np.ndarray], classes: tuple[str, ...] | None, source: str
) -> tuple[dict[Split, np.ndarray], tuple[str, ...]]:
    """Turns labels as stored, numbers or texts, into class indices.

    A validation or test split with -1 everywhere is how hub sets publish images without labels; it is left
    out, with a warning.

    Args:
        values: labels of each split, shape (N,) or (N, 1).
        classes: class names where the source gives them.
        source: what to call the source in errors.

    Returns:
        int64 labels of shape (N,) for each labelled split, and the class names.
    """
    if any(labels.dtype.kind == "U" for labels in values.values()):
        return _number_texts(values, classes, source)
    numbers = {
        split: _whole_numbers(labels, f"{source}, split '{split}'") for split, labels in values.items()
    }
    for split in (Split.VAL, Split.TEST):
        if split in numbers and len(numbers[split]) and (numbers[split] == -1).all():
            warnings.warn(
                f"{source}: split '{split}' has no labels and is left out.", DeltapatchWarning, stacklevel=2
            )
            del numbers[split]
    return numbers, classes or _classes_of_numbers(numbers, source)


def _number_texts(
    values: Mapping[Split, np.ndarray], classes: tuple[str, ...] | None, source: str
) -> tuple[dict[Split, np.ndarray], tuple[str, ...]]:
    texts = {split: [str(label) for label in labels.reshape(-1)] for split, labels in values.items()}
    reference = texts.get(Split.TRAIN) or [label for labels in texts.values() for label in labels]
    classes = classes or tuple(sorted(set(reference)))
    index_of = {name: index for index, name in enumerate(classes)}
    for split, labels in texts.items():
        unknown = sorted(set(labels) - set(classes))
        if unknown:
            raise DataError(
                f"{source}: label '{unknown[0]}' of split '{split}' is not a class of the training split."
            )
    numbers = {
        split: np.array([index_of[label] for label in labels], np.int64) for split, labels in texts.items()
    }
    return numbers, classes


def _whole_numbers(labels: np.ndarray, where: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            f"{where}: labels have shape {labels.shape}, but one label per image, (N,), is expected."
        )
    if labels.dtype.kind not in "iubf":
        raise DataError(
            f"{where}: labels are {labels.dtype} values, but whole numbers or texts are expected."
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise DataError(f"{where}: a label is NaN or infinite; give every image a class number.")
    if labels.dtype.kind == "f" and (labels % 1 != 0).any():
        raise DataError(f"{where}: a label is a fraction; give every image a class number.")
    return labels.astype(np.int64)


def _classes_of_numbers(numbers: Mapping[Split, np.ndarray], source: str) -> tuple[str, ...]:
    """Names classes after their numbers, which must be 0, 1, 2, ... without a gap."""
    present = np.unique(np.concatenate([*numbers.values(), np.empty(0, np.int64)]))
    if not np.array_equal(present, np.arange(len(present))):
        raise DataError(
            f"{source}: {len(present)} different labels from {present.min()} to {present.max()} were found,"
            f" but 0 to {len(present) - 1} is expected; renumber them or add class names."
        )
    return tuple(str(number) for number in present)


def _check_classes(classes: tuple[str, ...], source: str) -> None:
    if len(classes) < 2:
        found = f"only the class '{classes[0]}'" if classes else "no class"
        raise DataError(f"{source}: {found} was found, but at least two are needed.")
    spelling_of: dict[str, str] = {}
    for name in classes:
        if not name.strip():
            raise DataError(f"{source}: a class has an empty name; name every class.")
        key = name.casefold()
        if key in spelling_of:
            raise DataError(
                f"{source}: classes '{spelling_of[key]}' and '{name}' have the same name; rename one."
            )
        spelling_of[key] = name


def _check_labels(images: LabelledImages, classes: tuple[str, ...], where: str) -> None:
    labels = images.labels
    if len(labels) != len(images.store):
        raise DataError(f"{where}: there are {len(images.store)} images but {len(labels)} labels.")
    if len(labels) == 0:
        raise DataError(f"{where}: there are no images; add some or remove the split.")
    if labels.min() < 0 or labels.max() >= len(classes):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(
            f"{where}: label {wrong} is outside 0 to {len(classes) - 1}, the range of the classes."
        )
