"""Weights as differences from the base: what a fine-tuned copy is when only what changed is kept.

The difference itself is what trains, from zero. Adding it to the base's weights is the layer's only extra
work, and weight decay pulls towards the base instead of towards zero.
"""

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .base import Base
from .errors import DeltapatchError
from .exchange import Exchange
from .layers import Layer
from .method import Method
from .normalising import NormPart, Statistics
from .patch import Patch

Storage = Literal["fp32", "bf16", "int8"]
"""How matrices and convolutions are kept in a file. Vectors, which are few, stay in fp32."""

_LEVELS = 127
_SCALE = "__scale"


class DifferencePart(nn.Module):
    """A patch's differences for the parameters of one layer."""

    def __init__(self, layer: Layer, storage: Storage = "fp32") -> None:
        super().__init__()
        self.names = tuple(own.name for own in layer.parameters)
        for own in layer.parameters:
            is_large = len(own.shape) > 1
            if storage == "int8" and is_large:
                self.register_buffer(_key(own.name), torch.zeros(own.shape, dtype=torch.int8))
                self.register_buffer(_key(own.name) + _SCALE, torch.zeros(own.shape[0]))
            else:
                dtype = torch.bfloat16 if storage == "bf16" and is_large else torch.float32
                self.register_parameter(_key(own.name), nn.Parameter(torch.zeros(own.shape, dtype=dtype)))

    def difference(self, name: str) -> Tensor:
        """The difference for one of the layer's tensors, in fp32."""
        values = cast(Tensor, getattr(self, _key(name)))
        scale = cast(Tensor | None, getattr(self, _key(name) + _SCALE, None))
        return values.float() if scale is None else values.float() * _per_channel(scale, values)

    @torch.no_grad()
    def put(self, name: str, difference: Tensor) -> None:
        """Stores a difference of fp32; what this part's kind of storage rounds away is lost."""
        values = cast(Tensor, getattr(self, _key(name)))
        scale = cast(Tensor | None, getattr(self, _key(name) + _SCALE, None))
        if scale is not None:
            scale.copy_(difference.flatten(1).abs().amax(1) / _LEVELS)
            step = _per_channel(scale.clamp_min(torch.finfo(scale.dtype).tiny), values)
            difference = (difference / step).round()
        values.copy_(difference)

    def touch(self, alpha: float = 1.0) -> Exchange:
        """The layer with the base's weights + alpha · difference."""
        return Exchange(partial(self._in_place_of, alpha))

    def _in_place_of(self, alpha: float, module: nn.Module) -> Mapping[str, Tensor]:
        exchanged: dict[str, Tensor] = {}
        for name in self.names:
            base = own_tensor(module, name)
            # Added in fp32: a base in bf16 would lose small differences.
            exchanged[name] = torch.add(base.float(), self.difference(name), alpha=alpha).to(base.dtype)
        return exchanged


def own_tensor(module: nn.Module, name: str) -> Tensor:
    """A tensor of a layer by the name that `OwnTensor` gives it."""
    path, _, own = name.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(path), own))


def difference_part(layer: Layer, statistics: Statistics, storage: Storage) -> "DifferencePart | NormPart":
    """The part of a fine-tuned copy for one layer; norms keep their few numbers as they are."""
    if layer.kind == "normalisation":
        return NormPart(layer, affine=True, statistics=statistics)
    return DifferencePart(layer, storage)


def stored_as(patch: Patch, method: Method, base: Base) -> Patch:
    """The patch with its differences in another kind of storage, and what that loses among its figures."""
    stored = method.build(base, patch.classes)
    stored.info = stored.info.model_copy(update={"fitted_on": patch.info.fitted_on})
    for new, fitted in zip(stored.parts, patch.parts, strict=True):
        if isinstance(new, DifferencePart) and isinstance(fitted, DifferencePart):
            for name in fitted.names:
                new.put(name, fitted.difference(name))
        else:
            new.load_state_dict(fitted.state_dict())
    if stored.head is not None and patch.head is not None:
        stored.head.load_state_dict(patch.head.state_dict())
    error = storage_error(patch.parts, stored.parts)
    figures = {**patch.info.figures, "storage/relative_error": error}
    stored.info = stored.info.model_copy(update={"figures": figures})
    return stored


@torch.no_grad()
def storage_error(fitted: Iterable[nn.Module], stored: Iterable[nn.Module]) -> float:
    """‖d - d_stored‖ / ‖d‖ over all differences of the parts of two patches; 0 where nothing changed."""
    error = _Error()
    for first, second in zip(fitted, stored, strict=True):
        if isinstance(first, DifferencePart) and isinstance(second, DifferencePart):
            for name in first.names:
                error.add(first.difference(name), second.difference(name))
    return error.relative


def _key(name: str) -> str:
    """A module's own names have no dots; layers' names of inner tensors have."""
    return name.replace(".", "__")


def _per_channel(scale: Tensor, values: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (values.ndim - 1))


def patch_of_copy(
    method: Method, base: Base, weights: str | os.PathLike[str], classes: Sequence[str] = ()
) -> Patch:
    """The patch that makes a base out of which a fine-tuned copy came answer as the copy does.

    Tensor by tensor, so that the copy is never in memory as a whole.

    Args:
        method: one whose parts are differences, such as `Full`.
        base: what the copy was fine-tuned from.
        weights: the copy's ``.safetensors`` file, with the names of the base's own state dict.
        classes: names of the copy's classes; its classifier becomes the patch's head.

    Raises:
        DeltapatchError: a tensor is missing or has another shape, or the classifier is no linear layer for
            these classes.

    Example:
        >>> patch = patch_of_copy(Full(storage="bf16"), base, "birds_finetuned.safetensors", bird_names)
        >>> patch.info.figures["storage/relative_error"]
    """
    patch = method.build(base, classes)
    exact = _Error()
    with _opened_copy(Path(weights)) as read:
        for site, part in zip(patch.sites, patch.parts, strict=True):
            prefix = f"{site.path}." if site.path else ""
            if isinstance(part, NormPart):
                for name, mine in part.tensors().items():
                    mine.detach().copy_(read(prefix + name, mine))
                continue
            assert isinstance(part, DifferencePart)
            for name in part.names:
                own = own_tensor(base.submodule(site.path), name).detach()
                difference = read(prefix + name, own).to(own.device) - own.float()
                part.put(name, difference)
                exact.add(difference, part.difference(name).detach())
        for name, mine in patch.head.named_parameters() if patch.head is not None else ():
            mine.detach().copy_(read(f"{base.anatomy.head.path}.{name}", mine))
    patch.info = patch.info.model_copy(update={"figures": {"storage/relative_error": exact.relative}})
    return patch


@contextmanager
def _opened_copy(path: Path) -> Generator[Callable[[str, Tensor], Tensor]]:
    """What reads one tensor of a file by name, in fp32, and checks that it has the shape of another."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise DeltapatchError(f"{path}: not a safetensors file that can be read ({error})") from error
    with file as copy:
        names = set(copy.keys())

        def read(name: str, like: Tensor) -> Tensor:
            if name not in names:
                raise DeltapatchError(f"{path} has no tensor '{name}', so it is no copy of this base")
            found = copy.get_tensor(name)
            if found.shape != like.shape:
                raise DeltapatchError(
                    f"'{name}' has shape {tuple(found.shape)} in {path}, but {tuple(like.shape)} was expected"
                )
            return found.float()

        yield read


@dataclass
class _Error:
    """Sums of squares: of what storage lost, and of what was stored."""

    lost: float = 0.0
    length: float = 0.0

    def add(self, difference: Tensor, stored: Tensor) -> None:
        self.lost += float((difference - stored).double().square().sum())
        self.length += float(difference.double().square().sum())

    @property
    def relative(self) -> float:
        return (self.lost / self.length) ** 0.5 if self.length else 0.0
