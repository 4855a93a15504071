"""Models to be merged, as named tensors of which any part can be read without loading the rest."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import DeltapatchError
from .safetensors_files import StoredTensor, read_index, read_layout


class MergeError(DeltapatchError):
    """Models that cannot be merged; the message names the tensor or file."""


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return self.dtype.is_floating_point


class Source(ABC):
    """A model's tensors.

    Attributes:
        label: what messages and recipes call it: a file's path, or "model 2".
        specs: tensor name -> shape and dtype, in the model's own order.
    """

    label: str
    specs: Mapping[str, TensorSpec]

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements start..stop of a tensor in row-major order, shape (stop - start,), in its own dtype.

        May be called from several threads. What is returned may be the model's own memory: never write to it.

        Raises:
            MergeError: the file cannot be read any more.
        """

    def whole(self, name: str) -> Tensor:
        """A tensor in its own shape."""
        return self.read(name).reshape(self.specs[name].shape)


ModelLike = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str] | Source
"""A state dict, a module, a file (safetensors, a sharded index, a plain torch checkpoint), or a hub id."""


class MemorySource(Source):
    """Tensors that are in memory already.

    Raises:
        MergeError: an entry is no tensor, or one without plain values (sparse, or of the meta device).
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise MergeError(
                    f"{label}: '{name}' is a {type(tensor).__name__}, no tensor; give names and tensors only"
                )
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                raise MergeError(
                    f"{label}: tensor '{name}' has no plain values ({tensor.dtype}, {tensor.layout},"
                    f" {tensor.device}); give a dense one"
                )
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.specs = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._tensors[name].reshape(-1)[start:stop].cpu()


class FileSource(Source):
    """Tensors of one or several safetensors files, read where they lie.

    Parts are read into memory of their own, not mapped: a mapped file that somebody truncates ends the
    process, and mapped pages count as the process's memory.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], label: str) -> None:
        self.label = label
        self._tensors = tensors
        self.specs = {name: TensorSpec(stored.shape, stored.dtype) for name, stored in tensors.items()}
        # Opened now, and not by name later: what is written under the name meanwhile is another file.
        self._files: dict[Path, int] = {}
        for stored in tensors.values():
            if stored.path not in self._files:
                self._files[stored.path] = _opened(stored.path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        stored = self._tensors[name]
        stop = self.specs[name].elements if stop is None else min(stop, self.specs[name].elements)
        part = torch.empty(max(stop - start, 0), dtype=stored.dtype)
        view = part.view(torch.uint8).numpy().data
        position = stored.offset + start * stored.dtype.itemsize
        while len(view):
            try:
                count = os.preadv(self._files[stored.path], [view], position)
            except OSError as error:
                raise MergeError(
                    f"{stored.path} cannot be read ({error.strerror}); check the disk"
                ) from error
            if count == 0:
                raise MergeError(f"{stored.path} became shorter while '{name}' was read; write it again")
            view, position = view[count:], position + count
        return part

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}); check the path") from error


def open_source(model: ModelLike, label: str = "the model") -> Source:
    """Opens a model to be merged; of files only the headers are read.

    Args:
        model: a state dict, a module, a ``.safetensors`` file, a ``.safetensors.index.json`` of shards, a
            folder with either, a file that ``torch.load(weights_only=True)`` reads, or ``owner/name`` of the
            hub.
        label: what messages and recipes call it; a file, folder or hub id is called as it was given.

    Raises:
        DeltapatchError: the file is missing, damaged or of another kind.
    """
    if isinstance(model, Source):
        return model
    if isinstance(model, nn.Module):
        return MemorySource(model.state_dict(), label)
    if isinstance(model, Mapping):
        return MemorySource(model, label)
    path = _found(Path(model), str(model))
    if path.name.endswith(".index.json"):
        return FileSource(read_index(path), str(model))
    if path.suffix == ".safetensors":
        return FileSource(read_layout(path), str(model))
    return MemorySource(_read_checkpoint(path), str(model))


def open_sources(models: Sequence[ModelLike]) -> tuple[Source, ...]:
    """Opens several models, called "model 1", "model 2", … where they are not files.

    Raises:
        DeltapatchError: one of them cannot be opened, or one model was given where a list belongs.
    """
    if isinstance(models, str | os.PathLike | Mapping | nn.Module | Source):
        raise MergeError("one model was given where a list of models belongs; put it in brackets")
    return tuple(open_source(model, f"model {number}") for number, model in enumerate(models, 1))


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".bin", ".ckpt")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _found(path: Path, given: str) -> Path:
    """The file that a path means; a folder's own, or one of the hub's."""
    if not path.exists() and _HUB_ID.fullmatch(given) and path.suffix not in _FILE_SUFFIXES:
        from huggingface_hub import snapshot_download

        try:
            path = Path(
                snapshot_download(given, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
            )
        except Exception as error:
            raise MergeError(
                f"{given} is neither a file nor found on the hub: {_first_line(error)}"
            ) from error
    if path.is_dir():
        indexes = sorted(path.glob("*.safetensors.index.json"))
        choices = indexes or sorted(path.glob("*.safetensors"))
        if not choices:
            raise MergeError(f"{given} holds no safetensors file; give the path of a checkpoint")
        if len(choices) > 1:
            kind = "indexes of shards" if indexes else "safetensors files and no index"
            raise MergeError(f"{given} holds {len(choices)} {kind}; give the path of one of them")
        return choices[0]
    if not path.is_file():
        raise MergeError(f"{path}: there is no such file; give the path of a checkpoint")
    return path


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch checkpoint, mapped from the file where its format allows it."""
    from ..loading import plain_state_dict

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)  # formats that cannot be mapped
        except Exception as error:
            raise MergeError(
                f"{path}: neither safetensors nor a plain torch checkpoint ({_first_line(error)}); give a"
                " file of tensors only"
            ) from error
    return plain_state_dict(state, path)
