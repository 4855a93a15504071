"""How far a patch moves the base's own tensors, layer by layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...base import Base
from ...differences import own_tensor
from ...exchange import Exchange
from ...layers import LayerKind
from ...loading import load_base, read_state_dict
from ...patch import Patch
from .parameter_distance import ESTIMATED, ParameterDistance, Weights, parameter_distance, weights_by_type

_LIBRARIES = ("timm/", "torchvision/")


@dataclass(frozen=True)
class LayerChange:
    """What a patch does to one layer.

    Attributes:
        path: the layer's name.
        kind: what the layer is.
        tensors: which of its tensors the patch changes, statistics of normalisation among them.
        relative: Σ |patched - base| / Σ |base| over all entries of these tensors; 0 for no change.
        transferability: T = D(r, B) / D(A, B) of the weight of a convolution or linear layer, or the mean of
            those inside torch's attention; None for other layers, and where nothing moved.
    """

    path: str
    kind: LayerKind
    tensors: tuple[str, ...]
    relative: float
    transferability: float | None


@dataclass(frozen=True)
class WeightChanges:
    """What a patch does to the base's own tensors.

    Attributes:
        layers: the layers that it changes, in the order in which they run.
        unchanged: how many other layers the base has, its classifier left out.
        transferability: T, the mean over convolutions and linear layers that moved; None if none did.
        notes: what has to be known about T, one sentence each.
    """

    layers: tuple[LayerChange, ...]
    unchanged: int
    transferability: float | None
    notes: tuple[str, ...]


@torch.no_grad()
def changed_tensors(base: Base, patch: Patch) -> dict[str, dict[str, Tensor]]:
    """Layer -> name of its tensor -> what stands in its place while the patch is active.

    Found by asking the patch's touches, so that it holds for every method that exchanges tensors.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for site, part in zip(patch.sites, patch.parts, strict=True):
        for path, touch in patch.method.touches(site, part).items():
            if isinstance(touch, Exchange):
                tensors = touch.tensors(base.submodule(path))
                # A counter of batches is none of what the layer computes with.
                kept = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
                found.setdefault(path, {}).update(kept)
    return found


@torch.no_grad()
def weight_changes(base: Base, patch: Patch, random: Path | None = None) -> WeightChanges | None:
    """How far each layer is from the base's; None for a patch that changes no tensor of the base.

    Args:
        base: the base.
        patch: a patch of it, on the same device.
        random: file of the weights that the pre-training began from.

    Raises:
        DeltapatchError: the file cannot be read, or holds weights of another model.
    """
    changed = changed_tensors(base, patch)
    if not changed:
        return None
    by_name = {
        f"{path}.{name}".lstrip("."): tensor for path, own in changed.items() for name, tensor in own.items()
    }
    state = base.module.state_dict()
    moved = {name for name, tensor in by_name.items() if not torch.equal(tensor, state[name])}
    distance = None
    notes: tuple[str, ...] = ()
    if moved & set(weights_by_type(base.module)):
        distance, notes = _distance(base, {**state, **by_name}, random)
    of_tensor = _transferability_by_tensor(distance)
    layers = [layer for layer in base.anatomy.layers_from("all") if layer.path in changed]
    changes = tuple(
        LayerChange(
            layer.path,
            layer.kind,
            tuple(changed[layer.path]),
            _relative(base, layer.path, changed[layer.path]),
            _mean([of_tensor[n] for n in _full_names(layer.path, changed) if n in of_tensor]),
        )
        for layer in layers
    )
    unchanged = len(base.anatomy.layers_from("all")) - len(changes)
    return WeightChanges(changes, unchanged, None if distance is None else distance.transferability, notes)


def _distance(
    base: Base, patched: Mapping[str, Tensor], file: Path | None
) -> tuple[ParameterDistance, tuple[str, ...]]:
    random = _random_start(base, file)
    classifier = base.anatomy.head.path or ""
    distance = parameter_distance(random, base.module, patched, classifier=classifier)
    notes = distance.warnings
    if file is None and random is not None:
        notes += (ESTIMATED,)
    return distance, notes


def _random_start(base: Base, file: Path | None) -> Weights | None:
    """Where the pre-training began: a file, or what the library draws; None leaves it to the layers."""
    if file is not None:
        return read_state_dict(file)
    if not base.source.startswith(_LIBRARIES):
        return None
    # Architectures initialise layers in their own way, which is nearer to the truth than the layers' own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_base(base.source, weights="random", size=base.preprocessing.input_size[1:]).module


def _transferability_by_tensor(distance: ParameterDistance | None) -> dict[str, float]:
    layers = () if distance is None else distance.layers
    return {name: layer.transferability for layer in layers for name in layer.tensors}


def _mean(values: list[float]) -> float | None:
    """torch's attention is one layer with two weights."""
    return math.fsum(values) / len(values) if values else None


def _full_names(path: str, changed: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    return [f"{path}.{name}".lstrip(".") for name in changed[path]]


def _relative(base: Base, path: str, tensors: Mapping[str, Tensor]) -> float:
    module = base.submodule(path)
    moved = whole = 0.0
    for name, tensor in tensors.items():
        own = own_tensor(module, name).double()
        moved += float((tensor.double() - own).abs().sum())
        whole += float(own.abs().sum())
    return moved / whole if whole else math.inf if moved else 0.0
