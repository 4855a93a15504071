"""Parquet files with an ``image`` and a ``label`` column, plain or as Hugging Face writes them.

``image`` is binary, or a struct with a binary field ``bytes``; ``label`` is a whole number or a text. The
encoded images stay in memory as they are in the file and are decoded one by one.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltapatch.data.sources.source import LabelledImages, Source, Split, content_version, number_labels
from deltapatch.errors import DataError, ImageError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class ColumnStore:
    """Encoded images in Arrow columns, one per file of a split.

    Attributes:
        columns: the image column of each file.
        files: the file that each column came from.
        starts: the row at which each file starts.
    """

    columns: Sequence[Any]
    files: Sequence[Path]
    starts: Sequence[int]

    def __len__(self) -> int:
        return self.starts[-1] + len(self.columns[-1])

    def name(self, row: int) -> str:
        file = bisect_right(self.starts, row) - 1
        return f"{self.files[file]}[{row - self.starts[file]}]"

    def read(self, row: int) -> bytes:
        file = bisect_right(self.starts, row) - 1
        cell = self.columns[file][row - self.starts[file]].as_py()
        encoded = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(encoded, bytes):
            raise ImageError(self.name(row), "has no image bytes; write the image itself into the file")
        return encoded

    def version(self) -> str:
        """sha256 over the encoded images."""
        return content_version(self)


@dataclass(frozen=True)
class _File:
    path: Path
    images: Any
    labels: np.ndarray
    classes: tuple[str, ...] | None


def read_parquet(path: Path) -> Source:
    """Reads one file as the training split, or a folder of ``train*``, ``val*`` and ``test*`` files."""
    split_paths = _files_of_splits(path) if path.is_dir() else {Split.TRAIN: [path]}
    splits = {split: [_read_file(file) for file in files] for split, files in split_paths.items()}
    stores = {split: _store(files) for split, files in splits.items()}
    values = {split: np.concatenate([file.labels for file in files]) for split, files in splits.items()}
    labels, classes = number_labels(values, _class_names(splits, path), str(path))
    digest = _digest(path, [file for files in split_paths.values() for file in files])
    images = {split: LabelledImages(stores[split], numbers) for split, numbers in labels.items()}
    return Source(path.resolve().name, "parquet", classes, images, digest)


def label_array(labels: Sequence[Any], where: str) -> np.ndarray:
    """Makes an array of a column of labels, shape (N,); a row without label is an error that names it."""
    for row, label in enumerate(labels):
        if label is None:
            raise DataError(f"{where}: row {row} has no label; give it one or remove the row.")
    try:
        return np.asarray(labels)
    except ValueError as error:
        raise DataError(f"{where}: a label is a list, but one label per image is expected.") from error


def column_of(columns: Sequence[str], accepted: tuple[str, ...], where: str) -> str:
    """Picks the column that has one of the accepted names."""
    for name in accepted:
        if name in columns:
            return name
    raise DataError(
        f"{where}: a column '{accepted[0]}' is expected, but the columns are {', '.join(columns)}."
    )


def _files_of_splits(folder: Path) -> dict[Split, list[Path]]:
    found: dict[Split, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        split = next((split for split in Split if file.name.lower().startswith(split)), None)
        if split is None:
            raise DataError(f"{file}: the name must start with train, val or test; rename or move the file.")
        found.setdefault(split, []).append(file)
    return found


def _read_file(path: Path) -> _File:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; run pip install deltapatch[parquet]."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            image_column = column_of(schema.names, IMAGE_COLUMNS, str(path))
            label_column = column_of(schema.names, LABEL_COLUMNS, str(path))
            table = file.read(columns=[image_column, label_column])
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); write it again.") from error
    labels = label_array(table.column(label_column).to_pylist(), str(path))
    classes = _declared_classes(schema.metadata, label_column)
    return _File(path, table.column(image_column), labels, classes)


def _declared_classes(metadata: dict[bytes, bytes] | None, label_column: str) -> tuple[str, ...] | None:
    """Class names from Hugging Face's metadata; metadata of another form counts as none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label_column]["names"])
    except (ValueError, KeyError, TypeError):
        return None


def _class_names(splits: dict[Split, list[_File]], path: Path) -> tuple[str, ...] | None:
    declared = {file.classes for files in splits.values() for file in files}
    if len(declared) > 1:
        raise DataError(f"{path}: its files declare different class names; write them with the same ones.")
    return declared.pop()


def _store(files: list[_File]) -> ColumnStore:
    starts = np.cumsum([0, *(len(file.images) for file in files[:-1])]).tolist()
    return ColumnStore([file.images for file in files], [file.path for file in files], starts)


def _digest(path: Path, files: list[Path]) -> str:
    """sha256 of a file's content, or of the names and contents of a folder's files."""
    digest_of: dict[str, str] = {}
    for name in files:
        with name.open("rb") as file:
            digest_of[name.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return digest_of[path.name]
    return hashlib.sha256(json.dumps(digest_of).encode()).hexdigest()
