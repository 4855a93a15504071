"""Weights as differences from the base: what a fine-tuned copy is when only what changed is kept.

The difference itself is what trains, from zero. Adding it to the base's weights is the layer's only extra
work, and weight decay pulls towards the base instead of towards zero.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .base import Base
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
    lost = length = 0.0
    for first, second in zip(fitted, stored, strict=True):
        if not isinstance(first, DifferencePart) or not isinstance(second, DifferencePart):
            continue
        for name in first.names:
            difference = first.difference(name)
            lost += float((difference - second.difference(name)).double().square().sum())
            length += float(difference.double().square().sum())
    return (lost / length) ** 0.5 if length else 0.0


def _key(name: str) -> str:
    """A module's own names have no dots; layers' names of inner tensors have."""
    return name.replace(".", "__")


def _per_channel(scale: Tensor, values: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (values.ndim - 1))
