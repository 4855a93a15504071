"""The header of a patch file: the patch's description and where its tensors lie, checked before use.

A file is 8 bytes with the length of the header (little-endian), the header in JSON, then the tensors' bytes.
No file is opened here: :mod:`deltapatch.file` hands over the header's bytes and the size of the file, and
every number in the header is checked against that size before anything is allocated for it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from deltapatch.errors import PatchFileError
from deltapatch.info import (
    DAMAGED,
    MAX_JSON_DEPTH,
    PatchInfo,
    explain,
    info_from_json,
    info_to_json,
    outside_strings,
    parse_json,
    shown,
)

LENGTH_BYTES = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA_KEY = "__metadata__"
_MAX_DIMENSIONS = 8
# A tensor's object and its two lists, what they hold, and the comma after it.
_MAX_VALUES_PER_TENSOR = 8 + _MAX_DIMENSIONS


@dataclass(frozen=True)
class FileLimits:
    """How much of an untrusted file is believed before it is refused."""

    max_header_bytes: int = 8 * 2**20
    max_metadata_bytes: int = 4 * 2**20
    max_tensors: int = 20_000
    max_file_bytes: int = 8 * 2**30
    max_json_depth: int = MAX_JSON_DEPTH


DEFAULT_LIMITS = FileLimits()


@dataclass(frozen=True)
class TensorEntry:
    """What a header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class PatchHeader:
    """Everything that can be known about a patch file without reading its tensors.

    Attributes:
        info: the patch's description of itself.
        tensors: by name, in the order in which they lie in the file.
        file_bytes: the size of the whole file.
    """

    info: PatchInfo
    tensors: Mapping[str, TensorEntry]
    file_bytes: int


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a tensor's name should be printable")
    return name


_Extent = Annotated[int, Field(ge=0, le=2**63 - 1)]
_TensorName = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_printable)]


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["pt"]
    deltapatch: str


class _StoredTensor(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[_Extent], Field(max_length=_MAX_DIMENSIONS)]
    data_offsets: Annotated[list[_Extent], Field(min_length=2, max_length=2)]


_STORED_TENSORS = TypeAdapter(dict[_TensorName, _StoredTensor])


def build_header(tensors: Mapping[str, Tensor], info: PatchInfo) -> bytes:
    """Describes a patch whose tensors will follow in the given order; equal patches give equal bytes."""
    metadata = {"format": "pt", "deltapatch": info_to_json(info).decode()}
    document: dict[str, object] = {_METADATA_KEY: metadata}
    position = 0
    for name, tensor in tensors.items():
        if name == _METADATA_KEY:
            raise PatchFileError(
                f"a tensor of a patch cannot be named {_METADATA_KEY!r}; give it another name"
            )
        end = position + tensor.nbytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        document[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    # The format asks that the tensors begin at a multiple of 8.
    return header + b" " * (-len(header) % 8)


def check_header(header: bytes, path: Path, file_bytes: int, limits: FileLimits) -> PatchHeader:
    """Reads a header that nobody has checked yet.

    Args:
        header: the JSON text.
        path: the file that it came from, for messages.
        file_bytes: the size of that file.
        limits: how much is accepted.

    Raises:
        PatchFileError: the header is not that of a patch, contradicts itself or the file's size, or exceeds a
            limit.
    """
    if len(header) > limits.max_header_bytes:
        raise PatchFileError(
            f"{path} has a header of {len(header)} bytes where at most {limits.max_header_bytes} are"
            " accepted; shorten the class names or the note"
        )
    # One object per tensor, the header itself and its metadata; counted before they cost time to build.
    if outside_strings(header).count(b"{") > limits.max_tensors + 2:
        raise PatchFileError(
            f"{path} holds more than {limits.max_tensors} tensors, which no patch needs; {DAMAGED}"
        )
    max_values = _MAX_VALUES_PER_TENSOR * (limits.max_tensors + 2)
    document = parse_json(header, f"the header of {path}", limits.max_json_depth, max_values)
    info = _check_metadata(document.pop(_METADATA_KEY, None), path, limits)
    entries = _check_tensors(document, path, file_bytes - LENGTH_BYTES - len(header), limits)
    return PatchHeader(info, entries, file_bytes)


def _check_metadata(metadata: object, path: Path, limits: FileLimits) -> PatchInfo:
    if not isinstance(metadata, dict) or "deltapatch" not in metadata:
        raise PatchFileError(
            f"{path} is a safetensors file but not a patch, since its metadata has no 'deltapatch'; give a"
            " file that deltapatch has written"
        )
    try:
        text = _Metadata.model_validate(metadata).deltapatch
    except ValidationError as error:
        raise PatchFileError(f"the metadata of {path}: {explain(error)}; {DAMAGED}") from error
    # A surrogate, which JSON can name but UTF-8 cannot hold, is left for the description's reader to refuse.
    description = text.encode(errors="surrogatepass")
    if len(description) > limits.max_metadata_bytes:
        raise PatchFileError(
            f"{path} has a description of {len(description)} bytes where at most {limits.max_metadata_bytes}"
            " are accepted; shorten the class names or the note"
        )
    return info_from_json(description, str(path), limits.max_json_depth)


def _check_tensors(
    document: Mapping[str, object], path: Path, data_bytes: int, limits: FileLimits
) -> dict[str, TensorEntry]:
    """Checks that the tensors fill the file's data exactly: no hole, no overlap, nothing before or after."""
    try:
        stored = _STORED_TENSORS.validate_python(document)
    except ValidationError as error:
        raise PatchFileError(f"the header of {path}: {explain(error)}; {DAMAGED}") from error
    entries: dict[str, TensorEntry] = {}
    position = 0
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].data_offsets):
        dtype = DTYPES[tensor.dtype]
        # A zero among the sizes must not hide others whose product overflows.
        if math.prod(size or 1 for size in tensor.shape) * dtype.itemsize > limits.max_file_bytes:
            raise PatchFileError(f"{path}: tensor {shown(name)} claims the shape {tensor.shape}; {DAMAGED}")
        end = position + math.prod(tensor.shape) * dtype.itemsize
        if tensor.data_offsets != [position, end]:
            raise PatchFileError(
                f"{path}: tensor {shown(name)} ({tensor.dtype}, shape {tensor.shape}) should fill the bytes"
                f" {[position, end]} but claims {tensor.data_offsets}; {DAMAGED}"
            )
        entries[name] = TensorEntry(dtype, tuple(tensor.shape), end - position)
        position = end
    if position != data_bytes:
        fault = "is truncated" if data_bytes < position else "has trailing bytes"
        raise PatchFileError(
            f"{path} {fault}: its tensors need {position} bytes after the header, which is followed by"
            f" {data_bytes}; {DAMAGED}"
        )
    return entries
