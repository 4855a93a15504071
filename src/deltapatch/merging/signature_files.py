"""Files of weight signatures: a few tensors, whole or as codes of one byte for each entry."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from .safetensors_files import read_metadata, writing
from .sources import MergeError, ModelLike, Source, TensorSpec, open_source

Form = Literal["linear", "log2", "tanh"]

_ENTRY = "deltapatch_signature"


@dataclass(frozen=True)
class Quantiser:
    """How the values of one tensor become whole numbers from 0 to levels - 1, and come back.

    "linear": levels evenly over [min x, max x], round((x - min) / (max - min) · (levels - 1)).
    "tanh": the same for tanh x, which is finer where x is small.
    "log2": the same for log₂|x|, with the sign and a level for 0; (levels - 1) // 2 magnitudes of each sign.

    Attributes:
        levels: how many values there are, 2 to 256 (3 to 256 for "log2"): levels, not bits.
        form: what is divided evenly.
        low: the smallest of the values that are divided evenly.
        high: the largest of them.
    """

    levels: int
    form: Form
    low: float
    high: float

    def __post_init__(self) -> None:
        least = 3 if self.form == "log2" else 2
        if self.form not in get_args(Form):
            raise MergeError(f"form is '{self.form}'; give one of {', '.join(get_args(Form))}")
        if not least <= self.levels <= 256:
            raise MergeError(f"levels is {self.levels}; give {least} to 256 levels for form '{self.form}'")

    @classmethod
    def of(cls, values: Tensor, levels: int, form: Form = "linear") -> "Quantiser":
        """The one whose range the values fill.

        Raises:
            MergeError: levels or form cannot be had.
        """
        given = values.double().reshape(-1)
        if form == "log2":
            given = given[given != 0].abs().log2()
        elif form == "tanh":
            given = given.tanh()
        if not len(given):
            return cls(levels, form, 0.0, 0.0)
        return cls(levels, form, float(given.min()), float(given.max()))

    def encode(self, values: Tensor) -> Tensor:
        """Codes of the values, uint8, of their shape."""
        given = values.double()
        if self.form == "linear":
            codes = self._even(given, self.levels)
        elif self.form == "tanh":
            codes = self._even(given.tanh(), self.levels)
        else:
            half = self._half
            codes = 1 + self._even(given.abs().log2().clamp_min(self.low), half) + half * (given < 0)
            codes = torch.where(given == 0, 0, codes)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, fp32, of their shape."""
        given = codes.double()
        if self.form == "linear":
            values = self._uneven(given, self.levels)
        elif self.form == "tanh":
            largest = math.nextafter(1.0, 0.0)  # the inverse of 1 is infinite
            values = self._uneven(given, self.levels).clamp(-largest, largest).atanh()
        else:
            half = self._half
            sign = torch.where(given > half, -1.0, 1.0)
            values = sign * self._uneven((given - 1) % half, half).exp2()
            values = torch.where(given == 0, 0.0, values)
        return values.float()

    @property
    def _half(self) -> int:
        return (self.levels - 1) // 2

    def _even(self, values: Tensor, levels: int) -> Tensor:
        if self.high == self.low or levels == 1:
            return torch.zeros_like(values)
        return ((values - self.low) / (self.high - self.low) * (levels - 1)).round()

    def _uneven(self, codes: Tensor, levels: int) -> Tensor:
        if levels == 1:
            return torch.full_like(codes, self.high)
        return codes / (levels - 1) * (self.high - self.low) + self.low


def save_signature(
    signature: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    levels: int | None = None,
    form: Form = "linear",
) -> Path:
    """Writes a signature to a ``.safetensors`` file; a file that was there is replaced in one step.

    Args:
        signature: from `extract_signature`.
        path: the file.
        levels: into how many values each tensor is quantised, which takes a byte for each entry; left out,
            the file has fp32.
        form: how, see `Quantiser`.

    Raises:
        MergeError: levels or form cannot be had, or a value is not finite.
        DeltapatchError: the file cannot be written.
    """
    quantisers: dict[str, Quantiser] = {}
    for name, values in signature.items():
        if not bool(torch.isfinite(values).all()):
            raise MergeError(
                f"the signature's tensor '{name}' holds NaN or infinite values; extract it again"
            )
        if levels is not None:
            quantisers[name] = Quantiser.of(values, levels, form)
    dtype = torch.float32 if levels is None else torch.uint8
    layout = {name: (tuple(values.shape), dtype) for name, values in signature.items()}
    ranges = {name: [one.low, one.high] for name, one in quantisers.items()}
    entry = json.dumps({"version": 1, "levels": levels, "form": form, "ranges": ranges})
    with writing(Path(path), layout, {"format": "pt", _ENTRY: entry}) as target:
        for name, values in signature.items():
            flat = values.detach().cpu().reshape(-1)
            stored = flat.float() if levels is None else quantisers[name].encode(flat)
            target.write(name, 0, stored)
    return Path(path)


def open_signature(signature: ModelLike, label: str = "the signature") -> Source:
    """Opens a signature, whose tensors are read part by part: a file, quantised or not, or a mapping.

    Raises:
        MergeError: the file is missing, damaged or of another kind.
    """
    source = open_source(signature, label)
    path = None if isinstance(signature, (Mapping, Source, torch.nn.Module)) else Path(source.label)
    text = read_metadata(path).get(_ENTRY) if path is not None and path.suffix == ".safetensors" else None
    if text is None:
        return source
    try:
        entry = json.loads(text)
        if entry["levels"] is None:
            return source
        return _QuantisedSource(
            source,
            {
                name: Quantiser(entry["levels"], entry["form"], *entry["ranges"][name])
                for name in source.specs
            },
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, MergeError):
            raise
        raise MergeError(
            f"{path}: the signature's ranges cannot be read ({error}); write it again"
        ) from error


class _QuantisedSource(Source):
    """Values of the codes of another source."""

    def __init__(self, codes: Source, quantisers: Mapping[str, Quantiser]) -> None:
        self.label = codes.label
        self.specs = {name: TensorSpec(spec.shape, torch.float32) for name, spec in codes.specs.items()}
        self._codes = codes
        self._quantisers = quantisers

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._quantisers[name].decode(self._codes.read(name, start, stop))


@dataclass(frozen=True)
class SignatureSize:
    """What a signature takes, in bytes.

    Attributes:
        file: the signature's file.
        model: all tensors of a full copy of the model.
    """

    file: int
    model: int

    @property
    def times_smaller(self) -> float:
        """How often the file fits in a full copy."""
        return self.model / self.file


def signature_size(path: str | os.PathLike[str], model: ModelLike) -> SignatureSize:
    """How large a signature's file is beside a full copy of a model.

    Raises:
        MergeError: the model cannot be opened, or the file is missing.
    """
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise MergeError(f"{path}: there is no such file; give a signature that was saved") from error
    specs = open_source(model).specs.values()
    return SignatureSize(size, sum(spec.elements * spec.dtype.itemsize for spec in specs))
