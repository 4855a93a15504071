"""The trunk cache: what a frozen trunk makes of each image and view, kept on disk for all later fits.

One folder for each identity:

    manifest.json   what the rows depend on and how they are laid out
    rows.bin        one row of fixed length for each image and view; missing ones are holes in the file
    marks.bin       for each row whether it is there, and its checksum

Rows are written through the file and read through a memory map: writing into the map of a sparse file on a
full disk would end the process with a signal instead of an error.
"""

import errno
import logging
import os
import shutil
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from itertools import pairwise
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import CacheError, DeltapatchError
from .cache_folders import (
    BAD,
    FILLED,
    LOCK,
    MANIFEST,
    MARK,
    MARKS,
    MISSING,
    ROWS,
    CacheIdentity,
    StoredAs,
    begin,
    cache_root,
    disk_bytes,
    is_whole,
    lock_root,
)
from .cache_rows import RowLayout
from .cache_sweeping import CacheEntry, clear_caches, list_caches, sweep

__all__ = [
    "CacheEntry",
    "CacheIdentity",
    "RowLayout",
    "StoredAs",
    "TrunkCache",
    "cache_root",
    "clear_caches",
    "list_caches",
    "sweep",
]

logger = logging.getLogger(__name__)

_VERIFIED_AT_ONCE = 2**26


@dataclass(eq=False)
class TrunkCache:
    """The rows of one identity, on disk. Make one with `TrunkCache.open`.

    Any number of processes may read at once, also while one fills. Rows are numbered by image and view:
    ``image_rows`` are rows of the image store, int64 of shape (N,), and a view is a number from 0.

    Attributes:
        path: the folder.
        identity: what the rows depend on.
        layout: what a row holds.

    Example:
        >>> cache = TrunkCache.open(cache_root(), identity, layout)
        >>> with cache.filling():
        ...     for image_rows in np.array_split(cache.missing(np.arange(identity.count), view=0), 100):
        ...         cache.write(image_rows, 0, *run_trunk(image_rows))
        >>> activations, features = cache.read(np.array([7, 3]), views=np.array([0, 0]))
    """

    path: Path
    identity: CacheIdentity
    layout: RowLayout
    _rows_file: FileIO = field(init=False, repr=False)
    _marks_file: FileIO = field(init=False, repr=False)
    _rows: np.ndarray = field(init=False, repr=False)
    _marks: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape = (self.identity.rows, self.layout.stride)
        self._rows_file = FileIO(self.path / ROWS, "r+")
        self._marks_file = FileIO(self.path / MARKS, "r+")
        # Plain arrays on the maps: numpy's own subclass makes each small access slower.
        self._rows = np.asarray(np.memmap(self.path / ROWS, np.uint8, "r", shape=shape))
        self._marks = np.asarray(np.memmap(self.path / MARKS, MARK, "r", shape=shape[:1]))

    @classmethod
    def open(cls, root: Path, identity: CacheIdentity, layout: RowLayout) -> "TrunkCache":
        """Opens the cache of an identity under a root, and makes it where there is none.

        What is there and is not exactly the cache of this identity and layout, or is damaged, is deleted and
        begun anew.

        Raises:
            DeltapatchError: the layout stores otherwise than the identity says, files cannot be made there,
                or a file that is not ours lies in the folder of a damaged cache.
        """
        if layout.stored_as != identity.stored_as:
            raise DeltapatchError(
                f"the layout stores {layout.stored_as}, but the cache's identity says {identity.stored_as};"
                " give both the same"
            )
        folder = root / identity.digest
        try:
            root.mkdir(parents=True, exist_ok=True)
            with lock_root(root):
                if not is_whole(folder, identity, layout):
                    begin(folder, identity, layout)
                os.utime(folder / MANIFEST)
                return cls(folder, identity, layout)
        except OSError as error:
            raise CacheError(
                f"{error.filename or folder}: the trunk cache cannot be opened: {error.strerror}; set"
                " DELTAPATCH_CACHE to a folder where files can be written"
            ) from error

    def missing(self, image_rows: np.ndarray, view: int) -> np.ndarray:
        """Those of the images that have no filled row for a view, in the order given; bad ones are among
        them, since they have none either.
        """
        images = np.asarray(image_rows, np.int64)
        return images[self._marks["state"][self._places(images, view)] != FILLED]

    def bad(self, image_rows: np.ndarray) -> np.ndarray:
        """Which of the images are marked bad in any of their views: bool, shape (N,)."""
        places = self._places(np.asarray(image_rows)[:, None], np.arange(self.identity.views))
        return (self._marks["state"][places] == BAD).any(axis=1)

    def write(
        self, image_rows: np.ndarray, view: int, activations: Sequence[Tensor], features: Tensor
    ) -> None:
        """Fills one row for each image.

        The rows are on the disk before they are marked as filled, so whatever ends the process leaves none
        that is marked and not there.

        Args:
            image_rows: rows of the image store, shape (N,).
            view: which view of these images.
            activations: what the divergence is given, tensors of shape (N, ...).
            features: pooled features, shape (N, features).

        Raises:
            DeltapatchError: the disk is full, or the tensors are not of the cache's layout; rows that were
                filled before stay.
        """
        places = self._places(image_rows, view)
        if len(places) != len(features):
            raise DeltapatchError(
                f"{len(places)} image rows and {len(features)} rows of features were given; give as many"
            )
        rows = self.layout.encode(activations, features)
        with self._explained():
            # A row that is written over is missing until the new one is whole.
            self._mark(places[self._marks["state"][places] == FILLED], MISSING)
            _write_at(self._rows_file, places, rows)
            os.fsync(self._rows_file.fileno())
            self._mark(places, FILLED, [zlib.crc32(row) for row in rows])

    def mark_bad(self, image_rows: np.ndarray, view: int) -> None:
        """Notes images that cannot be read; writing their rows takes the note away."""
        with self._explained():
            self._mark(self._places(image_rows, view), BAD)

    def read(self, image_rows: np.ndarray, views: np.ndarray) -> tuple[list[Tensor], Tensor]:
        """Fetches one row for each pair of an image and a view, in the order given.

        Args:
            image_rows: rows of the image store, shape (N,).
            views: the view of each, shape (N,).

        Returns:
            The activations, tensors of shape (N, ...), and the features, fp32, shape (N, features); see
            `RowLayout.decode` for their dtypes.

        Raises:
            DeltapatchError: a row is not filled.
        """
        return self.layout.decode(self._rows, self._filled(image_rows, views))

    def read_features(self, image_rows: np.ndarray, views: np.ndarray) -> Tensor:
        """As `read`, but only the features; the activations are not touched."""
        return self.layout.decode_features(self._rows, self._filled(image_rows, views))

    def _filled(self, image_rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The row of each image and view in the files, all of them filled."""
        places = self._places(image_rows, views)
        empty = self._marks["state"][places] != FILLED
        if empty.any():
            image, view = divmod(int(places[empty][0]), self.identity.views)
            raise DeltapatchError(
                f"{self.path} has no row for image {image} in view {view}; fill what `missing` names first"
            )
        return places

    def verify(self, image_rows: np.ndarray, views: np.ndarray) -> int:
        """Compares filled rows with their checksums, and marks those that differ as missing.

        Args:
            image_rows: rows of the image store, shape (N,).
            views: the view of each, shape (N,).

        Returns:
            How many were damaged.
        """
        places = np.unique(self._places(image_rows, views))
        places = places[self._marks["state"][places] == FILLED]
        damaged = 0
        step = max(1, _VERIFIED_AT_ONCE // self.layout.stride)
        for start in range(0, len(places), step):
            chunk = places[start : start + step]
            sums = np.array([zlib.crc32(row) for row in self._rows[chunk]], np.uint32)
            wrong = chunk[sums != self._marks["crc32"][chunk]]
            with self._explained():
                self._mark(wrong, MISSING)
            damaged += len(wrong)
        return damaged

    @contextmanager
    def filling(self) -> Generator[None]:
        """Holds the cache's lock, so that two fits do not compute the same rows; the second one waits.

        Raises:
            DeltapatchError: the cache was deleted after it was opened.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("%s: another fit is filling this trunk cache; waiting for it.", self.path)
            lock.acquire()
        try:
            self._check_still_there()
            yield
        finally:
            lock.release()

    @property
    def bytes_on_disk(self) -> int:
        """What the cache takes of the disk; rows that are missing take nothing."""
        return disk_bytes(self.path)

    def close(self) -> None:
        """Lets go of the files; tensors that were read stay."""
        self._rows_file.close()
        self._marks_file.close()
        self._rows, self._marks = self._rows[:0].copy(), self._marks[:0].copy()

    def _places(self, image_rows: np.ndarray, views: np.ndarray | int) -> np.ndarray:
        """The row of each image and view in the files."""
        images, views = np.asarray(image_rows, np.int64), np.asarray(views, np.int64)
        for name, numbers, count in (
            ("image row", images, self.identity.count),
            ("view", views, self.identity.views),
        ):
            wrong = numbers[(numbers < 0) | (numbers >= count)]
            if wrong.size:
                raise DeltapatchError(
                    f"{self.path}: {name} {wrong[0]} is not possible; this cache has 0 to {count - 1}"
                )
        return images * self.identity.views + views

    def _check_still_there(self) -> None:
        """Rows that are written into a deleted file are lost with the end of the process."""
        try:
            same = os.path.samestat(os.fstat(self._rows_file.fileno()), (self.path / ROWS).stat())
        except FileNotFoundError:
            same = False
        if not same:
            raise CacheError(f"{self.path}: the trunk cache was deleted after it was opened; fit again")

    def _mark(self, places: np.ndarray, state: int, sums: Sequence[int] = ()) -> None:
        marks = np.zeros(len(places), MARK)
        marks["state"] = state
        if len(sums):
            marks["crc32"] = sums
        _write_at(self._marks_file, places, marks.view(np.uint8).reshape(len(marks), MARK.itemsize))

    @contextmanager
    def _explained(self) -> Generator[None]:
        """Turns a failure to write into a sentence."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise CacheError(
                    f"{self.path}: the trunk cache cannot be written: {error.strerror}; check the disk"
                ) from error
            needed = int((self._marks["state"] == MISSING).sum()) * self.layout.stride
            raise CacheError(
                f"{self.path}: the disk is full: {shutil.disk_usage(self.path).free:,} bytes are free, and"
                f" the rest of the trunk cache needs {needed:,}; free some space (deltapatch cache clear) or"
                " set DELTAPATCH_CACHE to a folder on a larger disk; what is filled stays"
            ) from error


def _write_at(file: FileIO, places: np.ndarray, records: np.ndarray) -> None:
    """Writes the records, uint8 of shape (N, size), each at its place; neighbours go together."""
    ends = np.flatnonzero(np.diff(places) != 1) + 1
    for first, last in pairwise([0, *ends.tolist(), len(places)]):
        content = records[first:last].reshape(-1).data
        position = int(places[first]) * records.shape[1] if len(content) else 0
        while len(content):
            written = os.pwrite(file.fileno(), content, position)
            content, position = content[written:], position + written
