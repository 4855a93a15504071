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
    header = _header(path)
    length, content = header
    start = _LENGTH_BYTES + length
    found: dict[str, StoredTensor] = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise DeltapatchError(
                f"{path}: tensor '{name}' has dtype {entry['dtype']}, which is not known here"
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
        shards = {name: read_layout(path.parent / Path(name).name) for name in set(places.values())}
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

    def __init__(self, descriptor: int, places: Mapping[str, StoredTensor]) -> None:
        self._descriptor = descriptor
        self.places = places

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Puts elements, shape (n,), in a tensor's place from element ``start`` on, cast to its dtype."""
        place = self.places[name]
        content = values.to(place.dtype).contiguous().view(torch.uint8).numpy().data
        position = place.offset + start * place.dtype.itemsize
        while len(content):
            count = os.pwrite(self._descriptor, content, position)
            content, position = content[count:], position + count


@contextmanager
def writing(
    path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> Generator[TensorWriter]:
    """Makes a safetensors file that appears under its name when the block ends well, and leaves nothing
    otherwise.

    Args:
        path: the file; one that is there is replaced.
        tensors: name -> shape and dtype.
        metadata: text entries of the header.

    Raises:
        DeltapatchError: it cannot be written; a file that was there before stays.
    """
    header, places = _layout(path, tensors, metadata)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.deltapatch-tmp")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.pwrite(descriptor, header, 0)
            end = max((_end(place) for place in places.values()), default=len(header))
            os.ftruncate(descriptor, end)
            yield TensorWriter(descriptor, places)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        raise DeltapatchError(
            f"{path} cannot be written: {error.strerror}; check the folder and disk"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


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
            raise DeltapatchError(f"tensor '{name}' has dtype {dtype}, which safetensors cannot hold")
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
