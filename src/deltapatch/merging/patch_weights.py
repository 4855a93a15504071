"""What patches make of their base's own weights, as models that can be merged, and a patch of the result.

Where everything that a patch does is to put other tensors in the place of the base's (`full`, `interpolate`,
`lora`, `norm` and the like), the patched base is a model like any other and every merge applies to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..base import Base
from ..differences import DifferencePart, own_tensor
from ..exchange import Exchange
from ..layers import Layer
from ..methods.full import Full
from ..normalising import NormPart
from ..patch import Patch
from .sources import MemorySource, MergeError, Source, TensorSpec


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the base is exchanged: by what, in which module, and what that calls it."""

    exchange: Exchange
    module: nn.Module
    name: str

    def tensor(self) -> Tensor:
        return self.exchange.tensors(self.module)[self.name]


class PatchedWeights(Source):
    """Tensors of a base as a patch changes them; each is computed when it is read.

    Args:
        base: the base.
        patch: a patch of it.
        label: what messages call it.
        names: which of the base's tensors; left out, those that the patch exchanges.
    """

    def __init__(self, base: Base, patch: Patch, label: str, names: Sequence[str] | None = None) -> None:
        self.label = label
        self._own = base.module.state_dict()
        self._places = _places(base, patch)
        chosen = [name for name in self._own if name in self._places] if names is None else names
        self.specs = {name: _spec(self._own[name]) for name in chosen}

    @torch.no_grad()
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        place = self._places.get(name)
        tensor = self._own[name] if place is None else place.tensor().to(self._own[name].dtype)
        return tensor.detach().reshape(-1)[start:stop].cpu()


def changes_weights(base: Base, patch: Patch) -> bool:
    """Whether all that a patch does, besides its head, is to exchange tensors of its base."""
    touches = [
        touch
        for site, part in zip(patch.sites, patch.parts, strict=True)
        for touch in patch.method.touches(site, part).values()
    ]
    return bool(touches) and all(isinstance(touch, Exchange) for touch in touches)


def weights_of(
    base: Base, patches: Sequence[Patch], labels: Sequence[str]
) -> tuple[tuple[PatchedWeights, ...], Source]:
    """The patched models and the base, with those tensors that some patch changes, in the base's order."""
    changed = {name for patch in patches for name in _places(base, patch)}
    own = {name: tensor for name, tensor in base.module.state_dict().items() if name in changed}
    models = tuple(
        PatchedWeights(base, patch, label, list(own)) for patch, label in zip(patches, labels, strict=True)
    )
    return models, MemorySource(own, f"base {base.name}")


@torch.no_grad()
def patch_of_weights(base: Base, merged: Mapping[str, Tensor], like: Sequence[Patch]) -> Patch:
    """A patch without a head that puts merged tensors in the place of the base's.

    Patches of one norm-like method give a patch of that method, which is small; all others one of `Full`,
    from the first stage on that has a merged tensor. Variances that a merge made negative become the
    smallest positive number.

    Args:
        base: the base.
        merged: tensors by their names in the base's state dict.
        like: the patches that were merged.
    """
    patch = _holder(base, merged, like)
    left = dict(merged)
    for site, part in zip(patch.sites, patch.parts, strict=True):
        assert isinstance(site, Layer)
        prefix = f"{site.path}." if site.path else ""
        if isinstance(part, NormPart):
            for name, mine in part.tensors().items():
                value = left.pop(prefix + name, mine)
                tiny = torch.finfo(mine.dtype).tiny
                mine.copy_(value.clamp_min(tiny) if name == "running_var" else value)
            continue
        assert isinstance(part, DifferencePart)
        for name in part.names:
            if prefix + name in left:
                own = own_tensor(base.submodule(site.path), name).detach()
                part.put(name, left.pop(prefix + name).to(own.device).float() - own.float())
    if left:
        raise MergeError(
            f"tensor '{next(iter(left))}' of base {base.name} is merged, but no patch of weights can hold it"
        )
    return patch


def _holder(base: Base, merged: Mapping[str, Tensor], like: Sequence[Patch]) -> Patch:
    first = like[0]
    is_one_kind = all(patch.method == first.method and patch.sites == first.sites for patch in like)
    if is_one_kind and all(isinstance(part, NormPart) for part in first.parts):
        return first.method.build(base, seed=0)
    layers = base.anatomy.layers_from("all")
    prefixes = {layer.path: f"{layer.path}." if layer.path else "" for layer in layers}
    paths = {
        layer.path for layer in layers for own in layer.tensors if prefixes[layer.path] + own.name in merged
    }
    return Full(modules=_reach(base, paths)).build(base)


def _reach(base: Base, paths: set[str]) -> int | Literal["all"]:
    """The fewest stages, from the last, whose layers are all of these."""
    for modules in range(1, len(base.anatomy.stages) + 1):
        if paths <= {layer.path for layer in base.anatomy.layers_from(modules)}:
            return modules
    return "all"


@torch.no_grad()
def _places(base: Base, patch: Patch) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    for site, part in zip(patch.sites, patch.parts, strict=True):
        for path, touch in patch.method.touches(site, part).items():
            assert isinstance(touch, Exchange)
            module = base.submodule(path)
            for name, tensor in touch.tensors(module).items():
                # A counter of batches is none of what the layer computes with.
                if tensor.is_floating_point():
                    found[f"{path}.{name}".lstrip(".")] = _Place(touch, module, name)
    return found


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)
