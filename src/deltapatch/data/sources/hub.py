"""Image sets of the Hugging Face hub, by name, through the optional ``datasets`` library."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltapatch.data.sources.parquet import IMAGE_COLUMNS, LABEL_COLUMNS, column_of, label_array
from deltapatch.data.sources.source import (
    SPLIT_OF_NAME,
    LabelledImages,
    Source,
    Split,
    content_version,
    number_labels,
)
from deltapatch.errors import DataError, ImageError

HUB_PREFIX = "hf:"
OWNER_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubStore:
    """The encoded images of one split of a ``datasets.Dataset``."""

    images: Any
    column: str
    title: str

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return f"{self.title}[{row}]"

    def read(self, row: int) -> bytes | Path:
        cell = self.images[row][self.column]
        if cell and cell["bytes"]:
            return cell["bytes"]
        if cell and cell["path"]:
            return Path(cell["path"])
        raise ImageError(self.name(row), "has no image; leave the row out")

    def version(self) -> str:
        """sha256 over the fingerprint that ``datasets`` gives a set, or over the images where it has none."""
        fingerprint = getattr(self.images, "_fingerprint", None)
        if fingerprint is None:
            return content_version(self)
        return hashlib.sha256(f"{self.column} {fingerprint}\n".encode()).hexdigest()


def is_hub_name(source: str) -> bool:
    """Whether a text can be the name of a hub set: ``hf:...`` or ``owner/name``."""
    return source.startswith(HUB_PREFIX) or OWNER_AND_NAME.fullmatch(source) is not None


def read_hub(source: str) -> Source:
    """Downloads a set, or takes it from the cache of ``datasets``, without decoding its images."""
    name = source.removeprefix(HUB_PREFIX)
    datasets = _datasets_library(source)
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the library has no common error for network, name and format
        raise DataError(
            f"{source}: no such file or folder, and no Hugging Face dataset could be loaded ({error});"
            " check the name."
        ) from error
    parts: dict[Split, Any] = {
        SPLIT_OF_NAME[key]: part for key, part in loaded.items() if key in SPLIT_OF_NAME
    }
    if not parts:
        found = ", ".join(loaded)
        raise DataError(f"{source}: a split train, validation or test is expected, but it has {found}.")
    label_column = column_of(next(iter(parts.values())).column_names, LABEL_COLUMNS, source)
    values = {
        split: label_array(list(part[label_column]), f"{source}[{split}]") for split, part in parts.items()
    }
    names = getattr(next(iter(parts.values())).features[label_column], "names", None)
    labels, classes = number_labels(values, tuple(names) if names else None, source)
    images = {
        split: LabelledImages(_store(datasets, parts[split], f"{name}[{split}]"), numbers)
        for split, numbers in labels.items()
    }
    return Source(name, "hub", classes, images, _digest(name, parts, images))


def _datasets_library(source: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{source}: no such file or folder; for a Hugging Face dataset, run pip install deltapatch[hub]."
        ) from error
    return datasets


def _store(datasets: Any, part: Any, title: str) -> HubStore:
    """Asks for the encoded bytes, so that images are decoded by our rules and limits."""
    column = column_of(part.column_names, IMAGE_COLUMNS, title)
    try:
        encoded = part.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # again of any kind
        raise DataError(f"{title}: the column '{column}' holds no images ({error}).") from error
    return HubStore(encoded, column, title)


def _digest(name: str, parts: dict[Split, Any], images: dict[Split, LabelledImages]) -> str:
    """sha256 over the labels and the download checksums, whose addresses name the hub's revision."""
    digest = hashlib.sha256(name.encode())
    for split, labelled in images.items():
        checksums = json.dumps(parts[split].info.download_checksums, sort_keys=True, default=str)
        digest.update(f"\n{split}\n{checksums}\n".encode())
        digest.update(labelled.labels.tobytes())
    return digest.hexdigest()
