"""Class-per-folder trees: ``root/cat/1.jpg``, or ``root/train/cat/1.jpg`` with ``val`` and ``test``."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltapatch.data.sources.source import SPLIT_OF_NAME, LabelledImages, Source, Split
from deltapatch.errors import DataError, ImageError

IGNORED_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
IGNORED_SUFFIXES = frozenset(
    {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".db", ".ini"}
)
LAYOUT = "expected folder/<class>/<image> or folder/train/<class>/<image>"


@dataclass(frozen=True)
class FileStore:
    """Image files.

    Attributes:
        paths: one file per row.
        root: where given, a file that lies elsewhere once links are followed is refused.
    """

    paths: Sequence[Path]
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def read(self, row: int) -> Path:
        path = self.paths[row]
        # Not Path.resolve, which raises where links form a loop.
        if self.root is not None and not Path(os.path.realpath(path)).is_relative_to(self.root.resolve()):
            raise ImageError(str(path), f"is a link that leaves {self.root}; copy the file into the folder")
        return path

    def version(self) -> str:
        """sha256 over absolute path, size and time of change of each file; no file is opened."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                status = path.stat()
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:
                state = "not there"
            digest.update(os.fsencode(os.path.abspath(path)) + f"\0{state}\n".encode())
        return digest.hexdigest()


def read_folder(root: Path) -> Source:
    """Lists a tree without opening its images; classes are the sorted names of the class folders."""
    splits = _split_folders(root)
    classes = _class_names(next(iter(splits.values())))
    images: dict[Split, LabelledImages] = {}
    digest = hashlib.sha256()
    for split, folder in splits.items():
        if _class_names(folder) != classes:
            raise DataError(_class_difference(folder, classes))
        files = [sorted(_visible_files(folder / name)) for name in classes]
        for name, found in zip(classes, files, strict=True):
            if not found:
                raise DataError(f"{folder / name}: the class folder has no images; add some or remove it.")
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in files])
        paths = [path for found in files for path in found]
        images[split] = LabelledImages(FileStore(paths, root), labels)
        for path, label in zip(paths, labels, strict=True):
            digest.update(
                os.fsencode(f"{path.relative_to(root).as_posix()}\0{path.lstat().st_size}\0{label}\n")
            )
    return Source(root.resolve().name, "folder", classes, images, digest.hexdigest())


def walk_files(folder: Path) -> Iterator[Path]:
    """Yields the visible files under a folder; links to folders are yielded as they are and not followed."""
    for directory, folders, files in os.walk(folder):
        links = [name for name in folders if Path(directory, name).is_symlink()]
        folders[:] = [name for name in folders if _is_visible(name)]
        yield from (Path(directory, name) for name in [*files, *links] if _is_visible(name))


def _split_folders(root: Path) -> dict[Split, Path]:
    """Finds train, val and test; a tree without them is all training.

    A class may be called "train" too: such folders are splits only where they hold class folders themselves
    or nothing else is beside them.
    """
    named = {folder: SPLIT_OF_NAME.get(folder.name.lower()) for folder in _folders(root)}
    splits = [folder for folder, split in named.items() if split is not None]
    others = [folder for folder, split in named.items() if split is None]
    if not splits or (others and not any(_folders(folder) for folder in splits)):
        return {Split.TRAIN: root}
    if others:
        raise DataError(
            f"{others[0]}: this folder lies beside {splits[0].name}, but is no split; move it away."
        )
    found: dict[Split, Path] = {}
    for split in Split:
        folders = [folder for folder in splits if named[folder] == split]
        if len(folders) > 1:
            raise DataError(f"{folders[1]}: {folders[0].name} is the same split; keep one of the two.")
        if folders:
            found[split] = folders[0]
    return found


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(path.name for path in _folders(folder)))
    if not names:
        raise DataError(f"{folder}: there are no class folders in it; {LAYOUT}.")
    return names


def _class_difference(folder: Path, classes: tuple[str, ...]) -> str:
    here = set(_class_names(folder))
    missing, extra = sorted(set(classes) - here), sorted(here - set(classes))
    if missing:
        return (
            f"{folder}: the class folder '{missing[0]}' of the training split is missing; add it with images."
        )
    return f"{folder}: the class folder '{extra[0]}' is not in the training split; remove it or add it there."


def _folders(folder: Path) -> list[Path]:
    """Lists visible sub-folders in name order; a link to a folder elsewhere is an error."""
    found = sorted(path for path in folder.iterdir() if path.is_dir() and _is_visible(path.name))
    for path in found:
        if path.is_symlink():
            raise DataError(f"{path}: is a link to a folder, which is not followed; copy the folder here.")
    return found


def _visible_files(folder: Path) -> Iterator[Path]:
    return (path for path in walk_files(folder) if path.suffix.lower() not in IGNORED_SUFFIXES)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in IGNORED_NAMES
