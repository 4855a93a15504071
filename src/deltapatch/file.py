"""The patch file: one ``.safetensors`` file that is read with suspicion and replaced as a whole.

The tensors are read into memory of their own. A mapped file would be quicker to open, but whoever overwrites
it would change, or crash, a model that is serving.
"""

import errno
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from deltapatch.errors import PatchFileError
from deltapatch.header import (
    DEFAULT_LIMITS,
    DTYPES,
    LENGTH_BYTES,
    FileLimits,
    PatchHeader,
    TensorEntry,
    build_header,
    check_header,
)
from deltapatch.info import DAMAGED, PatchInfo, shown

__all__ = [
    "DEFAULT_LIMITS",
    "FileLimits",
    "PatchHeader",
    "TensorEntry",
    "check_patch_name",
    "file_digest",
    "read_patch_file",
    "read_patch_header",
    "sweep_temporary_files",
    "write_patch_file",
]

_STARTS_OF_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PATCH_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{16}\.deltapatch-tmp", re.DOTALL)


def read_patch_file(path: Path, limits: FileLimits = DEFAULT_LIMITS) -> tuple[PatchInfo, dict[str, Tensor]]:
    """Reads a whole patch.

    Args:
        path: the file; a symbolic link is followed.
        limits: how much is accepted.

    Returns:
        The patch's description and its tensors, which share no memory with the file.

    Raises:
        PatchFileError: the file cannot be read, is damaged or hostile, holds NaN or infinite values, is from
            a newer version of deltapatch, or was changed while it was being read.
    """
    with _opened(path) as file:
        before = os.fstat(file.fileno())
        header = _read_header(file, path, limits)
        tensors = {name: _read_tensor(file, path, name, entry) for name, entry in header.tensors.items()}
        after = os.fstat(file.fileno())
    # Not the inode's change time: that also moves when another writer properly replaces the file.
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise PatchFileError(f"{path} was changed while it was being read; read it again")
    for name, tensor in tensors.items():
        _check_values(path, name, tensor)
    return header.info, tensors


def read_patch_header(path: Path, limits: FileLimits = DEFAULT_LIMITS) -> PatchHeader:
    """Reads and checks what a patch file says about itself and its tensors, and none of the tensors.

    Raises:
        PatchFileError: as for :func:`read_patch_file`, except for what only the tensors' values can show.
    """
    with _opened(path) as file:
        return _read_header(file, path, limits)


def write_patch_file(path: Path, tensors: Mapping[str, Tensor], info: PatchInfo) -> None:
    """Writes a patch so that the path holds either the old file or the whole new one, whatever happens.

    Equal patches give equal bytes. Every tensor is stored in full, also where two share memory.

    Args:
        path: the file; an existing file is replaced. A symbolic link is refused: neither followed nor
            replaced.
        tensors: by name, on any device and in any dense memory layout.
        info: the patch's description.

    Raises:
        PatchFileError: the patch could not be read back, or the file cannot be written.
    """
    _check_target(path)
    plain = {name: _plain_tensor(path, name, tensor) for name, tensor in tensors.items()}
    # The widest dtypes come first, so that every tensor starts at a multiple of its item size.
    stored = dict(sorted(plain.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header = build_header(stored, info)
    file_bytes = LENGTH_BYTES + len(header) + sum(tensor.nbytes for tensor in stored.values())
    try:
        check_header(header, path, file_bytes, DEFAULT_LIMITS)
    except PatchFileError as error:
        raise PatchFileError(f"the patch was not saved because it could not be read back: {error}") from error
    start = len(header).to_bytes(LENGTH_BYTES, "little") + header
    _replace_file(path, start, map(_memory, stored.values()))


def file_digest(path: Path) -> str:
    """Returns ``sha256:`` and the hexadecimal digest of a file's bytes."""
    with _opened(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def check_patch_name(name: str) -> str:
    """Returns a name under which a patch may be stored or served, and refuses every other.

    A good name is a safe file name on every system: it cannot lead out of its folder, and two good names
    differ also where upper and lower case are the same.
    """
    if not _PATCH_NAME.fullmatch(name):
        reason = (
            "must be 1 to 64 of the characters a-z, 0-9, '.', '_' and '-' and start with a letter or digit"
        )
    elif name.endswith("."):
        reason = "must not end with a dot, which Windows drops"
    elif _WINDOWS_DEVICE.fullmatch(name):
        reason = "must not be the name of a device on Windows"
    else:
        return name
    raise PatchFileError(f"the patch name {shown(name)} {reason}; choose another name")


def sweep_temporary_files(directory: Path, older_than_seconds: float = 3600) -> list[Path]:
    """Removes what interrupted saves have left in a folder.

    Args:
        directory: the folder, not its sub-folders.
        older_than_seconds: younger files stay, since another process may still be writing them.

    Returns:
        The removed files, sorted. A file that the system does not let go stays and is not among them.
    """
    removed: list[Path] = []
    newest = time.time() - older_than_seconds
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise PatchFileError(f"{directory} cannot be swept: {_reason(error, directory)}") from error
    for path in paths:
        if not _TEMPORARY_NAME.fullmatch(path.name):
            continue
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime <= newest:
                path.unlink()
                removed.append(path)
    return removed


@contextmanager
def _opened(path: Path) -> Generator[BufferedReader]:
    _refuse_nul(path)
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PatchFileError(f"{path} is not a regular file; give the path of a patch file")
            yield file
    except OSError as error:
        raise PatchFileError(f"{path} cannot be read: {_reason(error, path)}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    # A plain open of a named pipe waits until somebody writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_header(file: BufferedReader, path: Path, limits: FileLimits) -> PatchHeader:
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes == 0:
        raise PatchFileError(f"{path} is empty; {DAMAGED}")
    if file_bytes > limits.max_file_bytes:
        raise PatchFileError(
            f"{path} has {file_bytes} bytes where at most {limits.max_file_bytes} are accepted; {DAMAGED}"
        )
    start = file.read(LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    room = min(file_bytes - LENGTH_BYTES, limits.max_header_bytes)
    header = file.read(length) if length <= room else b""
    if header.startswith(b"{"):
        return check_header(header, path, file_bytes, limits)
    # Only now: the length of an honest header can begin with the same bytes as a pickle.
    if start.startswith(_STARTS_OF_PICKLES):
        raise PatchFileError(
            f"{path} looks like a pickle or a zip archive (from torch.save?), and deltapatch never unpickles,"
            " since that can run code from the file; ask for a .safetensors patch"
        )
    raise PatchFileError(
        f"{path} is truncated or no safetensors file: its first 8 bytes announce a header of {length} bytes,"
        f" of which at most {max(room, 0)} are possible, and which should start with '{{'; {DAMAGED}"
    )


def _read_tensor(file: BufferedReader, path: Path, name: str, entry: TensorEntry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    if file.readinto(_memory(tensor)) != entry.bytes:
        raise PatchFileError(f"{path} became shorter while {shown(name)} was being read; read it again")
    return tensor


def _memory(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor on the CPU, and does not copy those of a contiguous one."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _check_values(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise PatchFileError(
            f"{path}: tensor {shown(name)} holds NaN or infinite values, with which every answer is nonsense;"
            " fit the patch again"
        )
    if tensor.dtype is torch.bool and (tensor.view(torch.uint8) > 1).any():
        raise PatchFileError(
            f"{path}: tensor {shown(name)} holds bytes that are neither true nor false; {DAMAGED}"
        )


def _plain_tensor(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES.values() or tensor.layout is not torch.strided or tensor.is_meta:
        raise PatchFileError(
            f"{path}: tensor {shown(name)} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) cannot be"
            f" stored; give a dense tensor with values, of one of the types {', '.join(DTYPES)}"
        )
    plain = tensor.detach().cpu()
    _check_values(path, name, plain)
    return plain


def _check_target(path: Path) -> None:
    _refuse_nul(path)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise PatchFileError(f"{path} cannot be written: {_reason(error, path)}") from error
    if stat.S_ISLNK(mode):
        raise PatchFileError(f"{path} is a symbolic link; remove it or give the path of the file itself")
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise PatchFileError(f"{path} is {kind}; give the path of the file to be written")


def _replace_file(path: Path, start: bytes, contents: Iterable[memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.deltapatch-tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(start)
            for content in contents:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise PatchFileError(f"{path} cannot be written: {_reason(error, path)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    """Makes a renaming durable: without it a power cut can bring the old file back."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_nul(path: Path) -> None:
    if "\0" in str(path):
        raise PatchFileError(f"the path {shown(str(path))} contains a NUL character; give another path")


def _reason(error: OSError, path: Path) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR if not path.parent.is_dir():
            return f"the folder {path.parent} does not exist; create it first"
        case errno.ENOENT:
            return "it does not exist; check the path"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"the system does not permit it ({error.strerror}); check the permissions of {path.parent}"
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return f"there is no room for it ({error.strerror}); free some space or choose another folder"
        case _:
            return f"{error.strerror}; check the path"
