"""All trunk caches of a machine: which there are, and which have to go."""

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from ..errors import DeltapatchError
from .cache_folders import (
    DIGEST_NAME,
    FILLED,
    LOCK,
    MANIFEST,
    MARK,
    MARKS,
    UNFINISHED_NAME,
    StoredAs,
    disk_bytes,
    erase,
    foreign_file,
    lock_root,
    read_manifest,
    remove_folder,
)


@dataclass(frozen=True)
class CacheEntry:
    """What is known of one cache on disk.

    Attributes:
        digest: of its identity; the name of its folder.
        base: fingerprint of its base.
        divergence: name of the module whose inputs it keeps; empty where it keeps features only.
        stored_as: how floating activations are stored.
        views: rows an image.
        filled: rows that are there.
        rows: rows that it has room for.
        bytes: what it takes of the disk.
        created: when it was begun.
        last_used: when it was last opened.
    """

    digest: str
    base: str
    divergence: str
    stored_as: StoredAs
    views: int
    filled: int
    rows: int
    bytes: int
    created: datetime
    last_used: datetime

    def is_older(self, days: float) -> bool:
        """Whether it was not opened for so many days."""
        return (datetime.now(UTC) - self.last_used).total_seconds() > days * 86400


def select_caches(
    root: Path, older_than_days: float | None = None, digest_prefix: str | None = None
) -> list[CacheEntry]:
    """The caches under a root that were unused for so long and whose digest begins so; see `list_caches`."""
    return [
        entry
        for entry in list_caches(root)
        if entry.digest.startswith(digest_prefix or "")
        and (older_than_days is None or entry.is_older(older_than_days))
    ]


def list_caches(root: Path) -> list[CacheEntry]:
    """All caches under a root that can be read, the most recently used first."""
    entries = [_entry(folder) for folder in _folders(root, DIGEST_NAME)]
    return sorted((entry for entry in entries if entry), key=lambda entry: entry.last_used, reverse=True)


def clear_caches(
    root: Path, older_than_days: float | None = None, digest_prefix: str | None = None
) -> list[CacheEntry]:
    """Deletes caches; one that a fit is filling stays, and so does one with a file in it that is not ours.

    Args:
        root: folder of the caches.
        older_than_days: only those unused for longer.
        digest_prefix: only those whose digest begins so.

    Returns:
        What was deleted.

    Raises:
        DeltapatchError: the system does not let a file go.
    """
    if not root.is_dir():
        return []
    try:
        with lock_root(root):
            _remove_leftovers(root)
            chosen = select_caches(root, older_than_days, digest_prefix)
            return [entry for entry in chosen if _remove_unless_in_use(root / entry.digest)]
    except OSError as error:
        raise DeltapatchError(
            f"{error.filename or root} cannot be deleted: {error.strerror}; check its permissions"
        ) from error


def sweep(
    root: Path, keep_days: float = 30.0, keep_bytes: int = 50 * 2**30, keep: Path | None = None
) -> list[CacheEntry]:
    """Deletes caches that were unused for long, then the least recently used ones until the rest fits.

    One that a fit is filling stays, and so does whatever the system does not let go: sweeping never ends a
    fit.

    Args:
        root: folder of the caches.
        keep_days: caches unused for longer go.
        keep_bytes: what all caches together may take of the disk.
        keep: the folder of a cache that stays in any case.

    Returns:
        What was deleted.
    """
    removed: list[CacheEntry] = []
    if not root.is_dir():
        return removed
    with suppress(OSError), lock_root(root):
        _remove_leftovers(root)
        entries = list_caches(root)
        total = sum(entry.bytes for entry in entries)
        for entry in reversed(entries):
            folder = root / entry.digest
            if keep is not None and folder.resolve() == keep.resolve():
                continue
            if not entry.is_older(keep_days) and total <= keep_bytes:
                continue
            with suppress(OSError):
                if _remove_unless_in_use(folder):
                    removed.append(entry)
                    total -= entry.bytes
    return removed


def _remove_unless_in_use(folder: Path) -> bool:
    """Deletes a cache, unless a fit is filling it or it holds a file that is not ours; whether it did."""
    if foreign_file(folder) is not None:
        return False
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            remove_folder(folder)
    except Timeout:
        return False
    return True


def _remove_leftovers(root: Path) -> None:
    """Deletes what kills in the middle of making or deleting have left, and caches without a manifest.

    The caller holds the root's lock, so nothing is being made or deleted at this time.
    """
    for folder in _folders(root, UNFINISHED_NAME):
        with suppress(OSError):
            erase(folder)
    for folder in _folders(root, DIGEST_NAME):
        with suppress(OSError):
            if read_manifest(folder) is None:
                _remove_unless_in_use(folder)


def _folders(root: Path, name: re.Pattern[str]) -> list[Path]:
    """The folders, not links, under a root whose names are of that form."""
    if not root.is_dir():
        return []
    found = (path for path in root.iterdir() if name.fullmatch(path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _entry(folder: Path) -> CacheEntry | None:
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        identity, _, created = manifest
        marks = np.fromfile(folder / MARKS, np.uint8)
        states = marks[: len(marks) // MARK.itemsize * MARK.itemsize].view(MARK)["state"]
        last_used = datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, UTC)
        used = disk_bytes(folder)
    except OSError:
        return None
    return CacheEntry(
        digest=identity.digest,
        base=identity.base,
        divergence=identity.divergence,
        stored_as=identity.stored_as,
        views=identity.views,
        filled=int((states == FILLED).sum()),
        rows=identity.rows,
        bytes=used,
        created=created,
        last_used=last_used,
    )
