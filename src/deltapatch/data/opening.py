"""From the name of a folder, file or hub set to a task's splits, and from paths to images without labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deltapatch.data.dataset import ImageSet, Provenance, TaskData
from deltapatch.data.decode import DEFAULT_LIMITS, ImageLimits
from deltapatch.data.sources.folder import FileStore, read_folder, walk_files
from deltapatch.data.sources.hub import is_hub_name, read_hub
from deltapatch.data.sources.npz import read_npz
from deltapatch.data.sources.parquet import read_parquet
from deltapatch.data.sources.source import Source, Split
from deltapatch.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
    }
)
READER_OF_SUFFIX = {".npz": read_npz, ".parquet": read_parquet}


def open_data(
    source: str | Path, *, validation: float = 0.2, seed: int = 0, limits: ImageLimits = DEFAULT_LIMITS
) -> TaskData:
    """Opens labelled images; they are decoded later, one by one.

    Args:
        source: a class-per-folder tree with or without ``train``, ``val`` and ``test`` in it; an ``.npz``
            file; a Parquet file or a folder of them; or a Hugging Face dataset, ``hf:owner/name``, or
            ``owner/name`` where no such path exists.
        validation: part of the training images that becomes the validation split where none is given, class
            by class; 0 makes none.
        seed: decides which images these are.
        limits: what an image may cost.

    Raises:
        DataError: the source is not there or not of the form that is expected.
    """
    if not 0 <= validation < 1:
        raise DataError(
            f"validation is {validation}, but a part of the training images in 0 <= part < 1 is expected."
        )
    if seed < 0:
        raise DataError(f"seed is {seed}, but a whole number from 0 is expected.")
    found = _read(source)
    sets = {split: ImageSet.of(part.store, part.labels, limits) for split, part in found.splits.items()}
    train, val = sets.get(Split.TRAIN), sets.get(Split.VAL)
    how = "given" if val is not None else "none"
    if train is not None and val is None and validation > 0:
        kept, held_out = _stratified_split(train.labels, validation, seed)
        if len(held_out):
            train, val = train.subset(kept), train.subset(held_out)
            how = f"stratified {validation * 100:g} % of train, seed {seed}"
    return _task(found, train, val, sets.get(Split.TEST), how)


def open_images(paths: Sequence[Path], *, limits: ImageLimits = DEFAULT_LIMITS) -> ImageSet:
    """Makes a set of image files without labels (-1), in the order given, for prediction."""
    return ImageSet.of(FileStore(tuple(paths)), None, limits)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Lists image files, sorted: files as given, and those with an image's suffix anywhere in given folders.

    Raises:
        DataError: a path is not there, or no image was found.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path.")
        if path.is_dir():
            found.update(file for file in walk_files(path) if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            found.add(path)
    if not found:
        given = ", ".join(str(path) for path in paths) or "an empty list"
        raise DataError(f"{given}: no image was found; give image files, or folders that hold some.")
    return sorted(found)


def _read(source: str | Path) -> Source:
    path = Path(source).expanduser()
    if isinstance(source, str) and is_hub_name(source) and not path.exists():
        return read_hub(source)
    if not path.exists():
        raise DataError(f"{source}: no such file or folder; check the path.")
    if path.is_dir():
        return read_parquet(path) if any(path.glob("*.parquet")) else read_folder(path)
    reader = READER_OF_SUFFIX.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{source}: a folder, an .npz or a .parquet file is expected.")
    return reader(path)


def _stratified_split(labels: np.ndarray, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides indices class by class into kept and held out; a class with two or more images is in both."""
    generator = np.random.default_rng(seed)
    held_out: list[np.ndarray] = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(part * len(members)), 1), len(members) - 1)
        held_out.append(members[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _task(
    found: Source, train: ImageSet | None, val: ImageSet | None, test: ImageSet | None, validation: str
) -> TaskData:
    provenance = Provenance(
        source=found.name,
        kind=found.kind,
        digest=found.digest,
        train=len(train or ()),
        val=len(val or ()),
        test=len(test or ()),
        validation=validation,
    )
    name = found.name if found.kind in ("folder", "hub") else Path(found.name).stem
    return TaskData(name, found.classes, train, val, test, provenance)
