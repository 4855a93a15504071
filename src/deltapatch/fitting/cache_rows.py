"""How what the trunk made of one image becomes a row of bytes, and becomes tensors again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import DeltapatchError
from .cache_folders import StoredAs

# Every tensor of a row starts at a multiple of this many bytes: whole lines of the processor's cache.
_ALIGNMENT = 64
_LARGEST_INT8 = 127
_DTYPES: dict[StoredAs, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


@dataclass(frozen=True)
class _Section:
    """Where one tensor lies in a row.

    Attributes:
        start: first byte.
        shape: of the tensor, without the batch axis.
        dtype: of the values as stored.
        scaled: whether one fp32 scale stands before the values.
    """

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scaled: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def values_start(self) -> int:
        return self.start + (torch.float32.itemsize if self.scaled else 0)

    @property
    def end(self) -> int:
        return self.values_start + self.count * self.dtype.itemsize

    def put(self, rows: np.ndarray, tensor: Tensor) -> None:
        flat = tensor.detach().reshape(len(tensor), self.count)
        if self.scaled:
            scales, flat = _quantised(flat.float())
            _put_bytes(rows, self.start, scales)
        _put_bytes(rows, self.values_start, flat.to(self.dtype))

    def take(self, rows: np.ndarray, places: np.ndarray) -> Tensor:
        values = _take_bytes(rows, places, self.values_start, self.end, self.dtype)
        if self.scaled:
            scales = _take_bytes(rows, places, self.start, self.values_start, torch.float32)
            values = values.float().mul_(scales)
        return values.reshape(len(places), *self.shape)


@dataclass(frozen=True)
class RowLayout:
    """What one row of a trunk cache holds: the activations of one image and its pooled features.

    Floating tensors are stored as bf16, fp32 or int8, other tensors as they are, and the features always as
    fp32. int8 is symmetric: each tensor of each image has one scale s = max|x| / 127 and is stored as
    round(x / s), so that no value is off by more than s / 2.

    Attributes:
        shapes: of each activation, without the batch axis; may be empty, to keep features only.
        dtypes: of each activation.
        features: number of pooled features.
        stored_as: how floating activations are stored.

    Example:
        >>> layout = RowLayout(shapes=((64, 7, 7),), dtypes=(torch.float32,), features=512, stored_as="bf16")
        >>> layout.stride
        8320
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    features: int
    stored_as: StoredAs

    def __post_init__(self) -> None:
        if len(self.shapes) != len(self.dtypes):
            raise DeltapatchError(
                f"a row of {len(self.shapes)} shapes and {len(self.dtypes)} dtypes is not possible; give one"
                " dtype for each shape"
            )
        if self.stored_as not in _DTYPES:
            raise DeltapatchError(f"stored_as is '{self.stored_as}'; choose one of {', '.join(_DTYPES)}")
        if self.stride == 0:
            raise DeltapatchError("a row without activations and without features holds nothing; give some")

    @classmethod
    def of(cls, activations: Sequence[Tensor], features: Tensor, stored_as: StoredAs) -> "RowLayout":
        """The layout for tensors such as these, each of shape (N, ...), with any N."""
        return cls(
            tuple(tuple(tensor.shape[1:]) for tensor in activations),
            tuple(tensor.dtype for tensor in activations),
            features.shape[1],
            stored_as,
        )

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return _aligned(self._sections[-1].end)

    @property
    def description(self) -> dict[str, object]:
        """The layout in plain values, for a JSON file."""
        return {
            "shapes": [list(shape) for shape in self.shapes],
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
            "features": self.features,
            "stored_as": self.stored_as,
            "stride": self.stride,
        }

    @cached_property
    def _sections(self) -> list[_Section]:
        """One for each activation and one, the last, for the features."""
        sections: list[_Section] = []
        start = 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stored = _DTYPES[self.stored_as] if dtype.is_floating_point else dtype
            scaled = dtype.is_floating_point and self.stored_as == "int8"
            sections.append(_Section(start, shape, stored, scaled))
            start = _aligned(sections[-1].end)
        return [*sections, _Section(start, (self.features,), torch.float32, scaled=False)]

    def encode(self, activations: Sequence[Tensor], features: Tensor) -> np.ndarray:
        """Makes rows of tensors.

        Args:
            activations: of the layout's shapes and dtypes, each (N, ...), on any device.
            features: shape (N, features).

        Returns:
            uint8, shape (N, stride). Equal tensors give equal rows.

        Raises:
            DeltapatchError: the tensors are not of this layout, or not finite where int8 is to store them.
        """
        self._check(activations, features)
        rows = np.zeros((len(features), self.stride), np.uint8)
        for section, tensor in zip(self._sections, [*activations, features], strict=True):
            section.put(rows, tensor)
        return rows

    def decode(self, rows: np.ndarray, places: np.ndarray | None = None) -> tuple[list[Tensor], Tensor]:
        """Makes tensors of rows, in memory of their own; each byte is copied once.

        Args:
            rows: uint8, shape (M, stride); may be a memory map.
            places: which of the rows, in this order, int64 of shape (N,); None takes all.

        Returns:
            The activations, each contiguous and of shape (N, ...): bf16 or fp32 as they are stored, fp32
            where that is int8. And the features, fp32, shape (N, features).
        """
        if places is None:
            places = np.arange(len(rows))
        *activations, features = (section.take(rows, places) for section in self._sections)
        return activations, features

    def decode_features(self, rows: np.ndarray, places: np.ndarray) -> Tensor:
        """As `decode`, but only the features, fp32 of shape (N, features)."""
        return self._sections[-1].take(rows, places)

    def _check(self, activations: Sequence[Tensor], features: Tensor) -> None:
        expected = [*zip(self.shapes, self.dtypes, strict=True)]
        found = [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in activations]
        if found != expected:
            raise DeltapatchError(
                f"activations {_listed(found)} do not fit into rows of {_listed(expected)}; open the cache"
                " with the layout of these activations"
            )
        if features.ndim != 2 or features.shape[1] != self.features:
            raise DeltapatchError(
                f"features of shape {tuple(features.shape)} do not fit into rows of {self.features} features"
            )
        counts = sorted({len(tensor) for tensor in (*activations, features)})
        if len(counts) > 1:
            raise DeltapatchError(
                f"tensors of {counts[0]} and of {counts[-1]} images cannot make rows together; give one entry"
                " for each image"
            )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _listed(tensors: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{shape} {str(dtype).removeprefix('torch.')}" for shape, dtype in tensors) or "none"


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each row of a matrix, shape (N, 1), and its values as whole numbers from -127 to 127."""
    if values.shape[1] == 0:
        return values.new_zeros(len(values), 1), values
    scales = values.abs().amax(dim=1, keepdim=True) / _LARGEST_INT8
    # A largest value that is finite leaves room for no other.
    if not torch.isfinite(scales).all():
        raise DeltapatchError(
            "the trunk gave NaN or infinite activations, which int8 cannot store; keep them as bf16 or fp32"
        )
    # A row of zeros has the scale zero; dividing by one instead keeps its zeros.
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    return scales, (values / divisors).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)


def _put_bytes(rows: np.ndarray, start: int, values: Tensor) -> None:
    """Writes a matrix (N, n) into N rows, from the byte ``start`` on."""
    size = values.shape[1] * values.itemsize
    # As one axis: of a matrix without entries, torch does not change the dtype.
    content = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    rows[:, start : start + size] = content.reshape(len(rows), size)


def _take_bytes(rows: np.ndarray, places: np.ndarray, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Copies the bytes from ``start`` to ``end`` of N rows into a matrix (N, n) of that dtype."""
    content = np.ascontiguousarray(rows[places, start:end])
    return (
        torch.from_numpy(content.reshape(-1))
        .view(dtype)
        .reshape(len(places), (end - start) // dtype.itemsize)
    )
