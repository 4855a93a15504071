"""Where tensors lie in safetensors files, and files of tensors that are written part by part."""

import json
import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DeltapatchError
from ..file import sweep_temporary_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        path: the file.
        offset: of its first byte in the file.
        shape: its shape.
        dtype: its dtype.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_layout(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of one file lies; no tensor is read.

    Raises:
        DeltapatchError: the file is no whole safetensors file, or has a dtype that is not known here.
    """
    length, content = _header(path)
    start = _LENGTH_BYTES + length
    found: dict[str, StoredTensor] = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise DeltapatchError(
                f"{path}: tensor '{name}' has dtype {entry['dtype']}, which is not known here; convert it"
            )
        found[name] = StoredTensor(
            path, start + entry["data_offsets"][0], tuple(entry["shape"]), _DTYPES[entry["dtype"]]
        )
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a file's header.

    Raises:
        DeltapatchError: the file is no whole safetensors file.
    """
    return dict(_header(path)[1].get("__metadata__", {}))


def read_index(path: Path) -> dict[str, StoredTensor]:
    """The same of a model in shards, by its ``.safetensors.index.json``.

    Raises:
        DeltapatchError: the index or a shard is missing or damaged, or a shard lacks a tensor.
    """
    try:
        places: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: read_layout(path.parent / Path(name).name) for name in dict.fromkeys(places.values())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DeltapatchError):
            raise
        raise DeltapatchError(
            f"{path} is no index of shards: {error}; give the model's index file"
        ) from error
    missing = next((name for name, shard in places.items() if name not in shards[shard]), None)
    if missing is not None:
        raise DeltapatchError(f"{path}: shard {places[missing]} lacks tensor '{missing}'; download it again")
    return {name: shards[shard][name] for name, shard in places.items()}


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of a file's header, which safetensors' own reader has found good."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            return length, json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DeltapatchError(
            f"{path} is truncated or no safetensors file ({reason}); download or write it again"
        ) from error


class TensorWriter:
    """A safetensors file under way: any part of any tensor can be put in its place, from any thread."""

    def __init__(self, path: Path, descriptor: int, places: Mapping[str, StoredTensor]) -> None:
        self._path = path
        self._descriptor = descriptor
        self.places = places

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Puts elements, shape (n,), in a tensor's place from element ``start`` on, cast to its dtype.

        Raises:
            DeltapatchError: the disk is full or broken.
        """
        place = self.places[name]
        content = values.to(place.dtype).contiguous().view(torch.uint8).numpy().data
        with _told_of(self._path):
            _write_all(self._descriptor, content, place.offset + start * place.dtype.itemsize)


@contextmanager
def writing(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> Generator[TensorWriter]:
    """Makes a safetensors file that appears under its name when the block ends well, and leaves nothing
    otherwise.

    What a process that was killed has left in the folder is removed by the next one, after an hour.

    Args:
        path: the file; one that is there is replaced.
        tensors: name -> shape and dtype.
        metadata: text entries of the header.

    Raises:
        DeltapatchError: it cannot be written; a file that was there before stays.
    """
    if path.exists() and not path.is_file():
        raise DeltapatchError(f"{path} is no file that could be replaced; give the path of a file")
    header, places = _layout(path, tensors, metadata)
    end = max((_end(place) for place in places.values()), default=len(header))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.deltapatch-tmp")
    with _told_of(path):
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            sweep_temporary_files(path.parent)
            with _told_of(path):
                _write_all(descriptor, memoryview(header), 0)
                os.ftruncate(descriptor, end)
            yield TensorWriter(path, descriptor, places)
            with _told_of(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with _told_of(path):
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _told_of(path: Path) -> Generator[None]:
    """Turns the system's errors of writing into those that name the file; not those of other work."""
    try:
        yield
    except OSError as error:
        raise DeltapatchError(
            f"{path} cannot be written: {error.strerror}; check the folder and disk"
        ) from error


def _write_all(descriptor: int, content: memoryview, position: int) -> None:
    while len(content):
        count = os.pwrite(descriptor, content, position)
        content, position = content[count:], position + count


def _layout(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header's bytes, and where tensors lie behind it: the widest dtypes first, so all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        if dtype not in _NAMES:
            raise DeltapatchError(
                f"tensor '{name}' has dtype {dtype}, which is not written here; convert it or leave it out"
            )
        if name == "__metadata__":
            raise DeltapatchError(f"a tensor must not be called '{name}' in a safetensors file; rename it")
        offsets[name] = end
        end += prod(shape) * dtype.itemsize
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {
        name: StoredTensor(path, len(header) + offsets[name], tensors[name][0], tensors[name][1])
        for name in order
    }


def _end(place: StoredTensor) -> int:
    return place.offset + prod(place.shape) * place.dtype.itemsize
