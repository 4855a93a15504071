"""The folder of one trunk cache: what it belongs to, how it is made, and how it is deleted."""

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from filelock import FileLock

from ..errors import DeltapatchError

if TYPE_CHECKING:
    from .cache_rows import RowLayout

StoredAs = Literal["bf16", "fp32", "int8"]

# Goes up when rows, marks or manifest change their form: caches of another form are not read.
FORMAT = 1
MANIFEST, ROWS, MARKS, LOCK = "manifest.json", "rows.bin", "marks.bin", "lock"
# Eight aligned bytes, so that no mark lies across two pages of a file: it is written whole or not at all.
MARK = np.dtype([("state", np.uint8), ("crc32", np.uint32)], align=True)
MISSING, FILLED, BAD = 0, 1, 2

DIGEST_NAME = re.compile(r"[0-9a-f]{64}")
UNFINISHED_NAME = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.(new|removed)")
_OURS = frozenset({MANIFEST, ROWS, MARKS, LOCK})


@dataclass(frozen=True)
class CacheIdentity:
    """All that the rows of a trunk cache depend on; where one value differs, it is another cache.

    Attributes:
        base: fingerprint of the base, ``sha256:...``.
        divergence: name of the module whose inputs are kept; empty where only features are.
        preprocessing: the base's preprocessing as canonical JSON.
        augment: how the views of an image are made.
        views: how many rows an image has, at least 1.
        images: ``version()`` of the image store.
        count: number of rows of the image store, at least 1.
        compute: what the trunk was computed in, such as "float32" or "bfloat16".
        stored_as: how floating activations are stored.
        torch: version of torch.
    """

    base: str
    divergence: str
    preprocessing: str
    augment: str
    views: int
    images: str
    count: int
    compute: str
    stored_as: StoredAs
    torch: str

    def __post_init__(self) -> None:
        if self.views < 1 or self.count < 1:
            raise DeltapatchError(
                f"a trunk cache of {self.count} images with {self.views} views each is not possible; give at"
                " least one of both"
            )
        if self.stored_as not in get_args(StoredAs):
            raise DeltapatchError(
                f"stored_as is '{self.stored_as}'; choose one of {', '.join(get_args(StoredAs))}"
            )

    @property
    def rows(self) -> int:
        """Number of rows: one for each image and view."""
        return self.count * self.views

    @property
    def digest(self) -> str:
        """sha256, in hexadecimal digits, over all fields and the version of the format."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


def cache_root() -> Path:
    """Where trunk caches are kept: DELTAPATCH_CACHE, else ``deltapatch/trunk`` in the user's cache folder."""
    if own := os.environ.get("DELTAPATCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deltapatch" / "trunk"


@contextmanager
def lock_root(root: Path) -> Generator[None]:
    """Keeps other processes from making and deleting caches under a root; held for moments only."""
    with FileLock(root / ".lock"):
        yield


def _manifest_content(identity: CacheIdentity, layout: "RowLayout") -> str:
    """The text of a new cache's manifest."""
    content = {
        "format": FORMAT,
        "identity": asdict(identity),
        "layout": layout.description,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(content, indent=2) + "\n"


def read_manifest(folder: Path) -> tuple[CacheIdentity, object, datetime] | None:
    """Identity, layout and time of creation of the cache in a folder; None where its manifest is no manifest.

    Raises:
        OSError: there is a manifest, but it cannot be read.
    """
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None
        identity = CacheIdentity(**content["identity"])
        created = datetime.fromisoformat(content["created"])
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return (identity, content.get("layout"), created) if identity.digest == folder.name else None


def is_whole(folder: Path, identity: CacheIdentity, layout: "RowLayout") -> bool:
    """Whether a folder holds the cache of exactly this identity and layout, in files of the right length."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    manifest = read_manifest(folder)
    if manifest is None or manifest[:2] != (identity, layout.description):
        return False
    sizes = {ROWS: identity.rows * layout.stride, MARKS: identity.rows * MARK.itemsize}
    files = {name: folder / name for name in sizes}
    return all(files[name].is_file() and files[name].stat().st_size == size for name, size in sizes.items())


def begin(folder: Path, identity: CacheIdentity, layout: "RowLayout") -> None:
    """Makes an empty cache under another name and gives it its own once it is whole.

    What stands there is deleted, unless it is not ours.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DeltapatchError(f"{folder} is in the way of a trunk cache, and is no folder; move it away")
    if folder.exists():
        if strange := foreign_file(folder):
            raise DeltapatchError(
                f"{strange} lies in the folder of a damaged trunk cache, which is to be deleted; move that"
                " file away"
            )
        remove_folder(folder)
    new = _unfinished_name(folder, "new")
    new.mkdir()
    with (new / ROWS).open("xb") as file:
        file.truncate(identity.rows * layout.stride)
    # Not sparse: on a full disk in memory, looking through a map at a hole ends the process with a signal.
    (new / MARKS).write_bytes(bytes(identity.rows * MARK.itemsize))
    with (new / MANIFEST).open("x", encoding="utf-8") as file:
        file.write(_manifest_content(identity, layout))
        file.flush()
        os.fsync(file.fileno())
    new.rename(folder)


def _unfinished_name(folder: Path, what: Literal["new", "removed"]) -> Path:
    """A name for a folder that is being made or deleted, under which it is never taken for a cache."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.{what}")


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take of the disk; holes in sparse files take nothing."""
    return sum(file.lstat().st_blocks * 512 for file in folder.iterdir())


def foreign_file(folder: Path) -> Path | None:
    """Something in a folder that no cache has; None where there is nothing of the kind."""
    strange = (
        path for path in folder.iterdir() if path.name not in _OURS or not stat.S_ISREG(path.lstat().st_mode)
    )
    return next(strange, None)


def remove_folder(folder: Path) -> None:
    """Deletes a cache. Its folder is renamed first, so that half a cache is never taken for a whole one."""
    removed = _unfinished_name(folder, "removed")
    folder.rename(removed)
    erase(removed)


def erase(folder: Path) -> None:
    """Deletes a folder with a cache's files in it and no others."""
    for name in _OURS:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
