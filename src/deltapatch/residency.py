"""Patches that wait in files until they are asked for, and leave memory when others need the room.

A file is attached by its header alone. Its tensors are read at the first use, into a row of a `Shelf`: one
tensor for each parameter of all patches of one kind, so that many patches can compute as one without being
copied together. A row is never written again while anybody holds the patch that lies in it; eviction drops
our hold, and the row is free when the last computation that runs with the patch has ended.
"""

import os
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor, nn

from .errors import PatchFileError
from .file import read_patch_header
from .info import PatchInfo
from .patch import Patch

_SHELF_BYTES = 64 * 2**20
"""The most that a shelf takes; one of larger patches has a single row."""
_FIRST_ROWS = 4
"""Rows of the first shelf of a kind; each further one has twice as many as the one before."""


class Shelf:
    """Rows for the parameters of patches of one kind.

    Attributes:
        tensors: name of a parameter or buffer -> tensor of shape (rows, ...).
        bytes: that they take.
        free: rows that nobody uses.
    """

    def __init__(self, example: Patch, rows: int) -> None:
        state = example.state_dict()
        self.tensors = {name: tensor.new_empty((rows, *tensor.shape)) for name, tensor in state.items()}
        self.bytes = rows * patch_bytes(example)
        self.rows = rows
        self.free = list(reversed(range(rows)))

    @property
    def is_empty(self) -> bool:
        """Whether all rows are free."""
        return len(self.free) == self.rows

    def place(self, patch: Patch) -> Patch:
        """Moves a patch's tensors into a free row; from then on they do not train."""
        row = self.free.pop()
        state = {name: self.tensors[name][row].copy_(tensor) for name, tensor in patch.state_dict().items()}
        patch.load_state_dict(state, assign=True)
        patch.requires_grad_(False)
        # Only an append: the collector may run it at any moment, in any thread.
        weakref.finalize(patch, self.free.append, row)
        return patch


def patch_bytes(patch: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in patch.state_dict().values())


@dataclass(eq=False)
class Attached:
    """A patch file under a name.

    Attributes:
        path: the file.
        info: what its header says.
        stamp: size and modification time when it was attached.
        patch: the patch while it is in memory.
        last_used: a number that grows with every use.
    """

    path: Path
    info: PatchInfo
    stamp: tuple[int, int]
    patch: Patch | None = None
    last_used: int = 0


@dataclass
class Residency:
    """Which attached patches are in memory.

    Attributes:
        device: where they are computed.
        budget: bytes that their tensors may take; None for no limit. A single patch is always loaded.
        conversions: applied to every tensor that is loaded, such as a change of type; see
            `nn.Module._apply`.
        changing: held while the set of patches is exchanged for another one.
    """

    device: Callable[[], torch.device]
    budget: int | None = None
    conversions: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    _shelves: dict[Hashable, list[Shelf]] = field(default_factory=dict)
    _resident: list[Attached] = field(default_factory=list)
    _clock: count = field(default_factory=lambda: count(1))
    _lock: Lock = field(default_factory=Lock)
    changing: Lock = field(default_factory=Lock)

    @property
    def bytes(self) -> int:
        """Bytes of all shelves, free rows included."""
        with self._lock:
            self._discard_empty_shelves()
            return self._taken()

    def patch(self, attached: Attached) -> Patch:
        """The patch of a file, from memory or read now. Who only takes it from memory never waits.

        Raises:
            PatchFileError: the file is damaged, gone, or another one than was attached.
        """
        attached.last_used = next(self._clock)
        patch = attached.patch
        if patch is not None:
            return patch
        with self._lock:
            if attached.patch is None:
                patch = self._load(attached)
                self._resident.append(attached)
                attached.patch = patch
            return attached.patch

    def release(self, attached: Attached) -> None:
        """Lets a patch leave memory as soon as no computation runs with it."""
        with self._lock:
            self._drop(attached)
            self._discard_empty_shelves()

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies a conversion to all patches: they leave memory, and are converted when read again."""
        with self._lock:
            self.conversions.append(fn)
            for attached in list(self._resident):
                self._drop(attached)
            self._discard_empty_shelves()

    def _load(self, attached: Attached) -> Patch:
        if _stamp(attached.path) != attached.stamp:
            raise PatchFileError(
                f"{attached.path} has changed since it was attached; attach it again to use what it is now"
            )
        patch = Patch.load(attached.path)
        for convert in self.conversions:
            patch._apply(convert)  # pyright: ignore[reportPrivateUsage]
        patch.to(self.device())
        return self._shelf_for(patch).place(patch)

    def _shelf_for(self, patch: Patch) -> Shelf:
        """A shelf with a free row; patches that were not used for longest make room for it."""
        shelves = self._shelves.setdefault(_kind(patch), [])
        size = max(patch_bytes(patch), 1)
        rows = max(1, min(_SHELF_BYTES // size, _FIRST_ROWS * 2 ** len(shelves)))
        self._discard_empty_shelves()
        while self.budget is not None and self._taken() > self.budget and self._evict():
            continue
        while True:
            found = next((shelf for shelf in shelves if shelf.free), None)
            if found is not None:
                return found
            room = rows if self.budget is None else min(rows, (self.budget - self._taken()) // size)
            if room >= 1 or not self._evict():
                # A patch that runs when nothing else can leave takes what it needs.
                shelves.append(Shelf(patch, max(room, 1)))

    def _taken(self) -> int:
        return sum(shelf.bytes for shelves in self._shelves.values() for shelf in shelves)

    def _evict(self) -> bool:
        """Drops the patch that was not used for longest; False if there is none."""
        if not self._resident:
            return False
        self._drop(min(self._resident, key=lambda attached: attached.last_used))
        self._discard_empty_shelves()
        return True

    def _drop(self, attached: Attached) -> None:
        if attached in self._resident:
            self._resident.remove(attached)
        attached.patch = None

    def _discard_empty_shelves(self) -> None:
        for shelves in self._shelves.values():
            shelves[:] = [shelf for shelf in shelves if not shelf.is_empty]


def attach_file(path: str | os.PathLike[str]) -> Attached:
    """Reads a patch file's header.

    Raises:
        PatchFileError: the file cannot be read, or its header is not that of a patch.
    """
    path = Path(path)
    stamp = _stamp(path)
    return Attached(path, read_patch_header(path).info, stamp)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise PatchFileError(f"{path} cannot be read: {error.strerror}; check the path") from error
    return status.st_size, status.st_mtime_ns


def _kind(patch: Patch) -> Hashable:
    """Patches of one kind have tensors of the same names, shapes and types."""
    described = tuple((name, t.shape, t.dtype, t.device) for name, t in patch.state_dict().items())
    return (patch.method, patch.sites, described)
