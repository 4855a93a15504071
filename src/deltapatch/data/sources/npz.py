"""``.npz`` files with MedMNIST's keys: ``train_images``, ``train_labels``, ``val_images`` and so on."""

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from deltapatch.data.decode import array_fault
from deltapatch.data.sources.source import LabelledImages, Source, Split, number_labels
from deltapatch.errors import DataError

READ_ERRORS = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ArrayStore:
    """Images that are rows of one array, N x H x W or N x H x W x C."""

    images: np.ndarray
    title: str

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return f"{self.title}[{row}]"

    def read(self, row: int) -> np.ndarray:
        return self.images[row]

    def version(self) -> str:
        """sha256 over the array's dtype, shape and bytes."""
        digest = hashlib.sha256(f"{self.images.dtype.str} {self.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(self.images).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def read_npz(path: Path) -> Source:
    """Loads the arrays into memory; nothing in the file is ever unpickled."""
    try:
        archive = np.load(path, allow_pickle=False)
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read as .npz ({error}); write it again.") from error
    if not isinstance(archive, NpzFile):
        raise DataError(
            f"{path}: holds a single array, but an .npz with train_images and train_labels is expected."
        )
    with archive:
        stores = {
            split: _store(archive, split, path) for split in Split if f"{split}_images" in archive.files
        }
        if not stores:
            found = ", ".join(archive.files) or "nothing"
            raise DataError(f"{path}: train_images and train_labels are expected, but it holds {found}.")
        values = {split: _array(archive, f"{split}_labels", path) for split in stores}
        names = _class_names(archive, path)
    labels, classes = number_labels(values, names, str(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    splits = {split: LabelledImages(stores[split], numbers) for split, numbers in labels.items()}
    return Source(path.name, "npz", classes, splits, digest)


def _store(archive: NpzFile, split: Split, path: Path) -> ArrayStore:
    images = _array(archive, f"{split}_images", path)
    fault = array_fault(images.shape[1:], images.dtype)
    if fault:
        raise DataError(f"{path}: an image of {split}_images {fault}.")
    return ArrayStore(images, f"{path}[{split}]")


def _class_names(archive: NpzFile, path: Path) -> tuple[str, ...] | None:
    if "classes" not in archive.files:
        return None
    names = _array(archive, "classes", path)
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(
            f"{path}: 'classes' must be a list of texts, as numpy.array(names, dtype=str) makes it."
        )
    return tuple(str(name) for name in names.astype(str))


def _array(archive: NpzFile, key: str, path: Path) -> np.ndarray:
    if key not in archive.files:
        raise DataError(f"{path}: the array '{key}' is missing; add it.")
    try:
        return archive[key]
    except READ_ERRORS as error:
        reason = f"the array '{key}' cannot be read ({error})"
        raise DataError(
            f"{path}: {reason}; save it again, texts as numpy.array(values, dtype=str)."
        ) from error
