"""LoRA: changes of low rank to the weights of linear layers and convolutions (arXiv 2106.09685)."""

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..base import Base
from ..errors import AnatomyError, DeltapatchError, DeltapatchWarning
from ..exchange import Exchange
from ..layers import Layer
from ..method import Method, check_modules, register_method
from ..patch import Patch
from ..touching import Touch
from ._peft import (
    PeftAdapter,
    PeftLayer,
    difference,
    from_peft_factors,
    is_supported,
    read_adapter,
    to_peft_factors,
    write_adapter,
)

Targets = Literal["all", "linear", "convolution"] | tuple[str, ...]
KINDS = ("linear", "convolution")


@register_method("lora")
@dataclass(frozen=True)
class Lora(Method):
    """Adds a matrix of low rank to each weight, viewed as a matrix with a row for each output::

        W' = W + (alpha / rank) · B A        A: rank x inputs, B: outputs x rank, B = 0 at the start

    The layer itself computes with W' in place of W, so it stays what it is: grouped, dilated, padded,
    strided or weight-standardised. ``inputs`` are the numbers that one output is made from: the features of
    a linear layer, and channels per group x height x width of a convolution's kernel. A layer that is
    smaller than the rank gets as many rows as it has inputs or outputs, with the same factor alpha / rank.
    A patch has (outputs + inputs) · rank parameters a layer, and starts exactly at the base.
    Source: Hu et al., ICLR 2022.

    Attributes:
        modules: from which of the last stages on layers are changed; "all" changes those of the whole base.
        rank: of the change.
        alpha: its factor is alpha / rank.
        targets: which layers: those of one kind, "all", or the last parts of their names (``"qkv"`` is
            every layer of that name, ``"blocks.3.attn.qkv"`` one).
    """

    modules: int | Literal["all"] = "all"
    rank: int = 8
    alpha: float = 8.0
    targets: Targets = "all"

    site_type: ClassVar[type] = Layer

    def __post_init__(self) -> None:
        check_modules(self.modules)
        if self.rank < 1:
            raise DeltapatchError(f"rank must be 1 or more, not {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise DeltapatchError(f"alpha must be a number above 0, not {self.alpha}")
        if not self.targets:
            raise DeltapatchError("targets must name a layer at least")

    @classmethod
    def sizes(cls) -> tuple[Method, ...]:
        return cls(rank=4), cls(rank=16)

    @property
    def scaling(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank

    def sites(self, anatomy: Anatomy) -> tuple[Layer, ...]:
        layers = anatomy.layers_from(self.modules)
        found = self.targeted(layers)
        names = self.targets if isinstance(self.targets, tuple) else ()
        missing = [name for name in names if not any(is_named(layer.path, name) for layer in found)]
        if missing:
            existing = _some([layer.path for layer in layers if layer.kind in KINDS])
            raise AnatomyError(
                f"no linear layer or convolution there is called '{missing[0]}'; there are {existing}"
            )
        if not found:
            kind = "linear layer or convolution" if self.targets == "all" else f"layer of kind {self.targets}"
            raise AnatomyError(
                f"this base has no {kind} there besides its classifier, so the lora method has nothing to"
                " change; give other targets or use the norm or head method"
            )
        return found

    def targeted(self, layers: Iterable[Layer]) -> tuple[Layer, ...]:
        """Which of some layers are changed."""
        if isinstance(self.targets, tuple):
            names = self.targets
            return tuple(
                layer
                for layer in layers
                if layer.kind in KINDS and any(is_named(layer.path, n) for n in names)
            )
        kinds = KINDS if self.targets == "all" else (self.targets,)
        return tuple(layer for layer in layers if layer.kind in kinds)

    def part(self, site: Layer) -> "Factors":
        outputs, inputs = matrix_shape(site)
        return Factors(outputs, inputs, min(self.rank, outputs, inputs), self.scaling)

    def touches(self, site: Layer, part: nn.Module) -> Mapping[str, Touch]:
        return {site.path: Exchange(partial(_changed, cast(Factors, part)))}


class Factors(nn.Module):
    """scaling · B A, the change of one weight as a matrix of shape (outputs, inputs).

    Attributes:
        a: A, shape (rank, inputs).
        b: B, shape (outputs, rank).
    """

    def __init__(self, outputs: int, inputs: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self) -> Tensor:
        return (self.scaling * self.b) @ self.a


def is_named(path: str, name: str) -> bool:
    """Whether ``name`` is a module's whole name or the last parts of it."""
    return f".{path}".endswith(f".{name}")


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """A weight's shape as a matrix: (first dimension, product of the others)."""
    weight = layer.tensor("weight")
    assert weight is not None
    return weight.shape[0], math.prod(weight.shape[1:])


def _changed(factors: Factors, module: nn.Module) -> Mapping[str, Tensor]:
    weight = cast(Tensor, module.weight)
    # Added in the finer precision of both; a layer in half precision needs its own again.
    return {"weight": (weight + factors().view(weight.shape)).to(weight.dtype)}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


# --- PEFT's format ----------------------------------------------------------------------------------------


def from_peft(folder: str | os.PathLike[str], base: Base, classes: Sequence[str] = ()) -> Patch:
    """A patch of a LoRA adapter that PEFT saved; PEFT itself is not needed.

    A classifier among its ``modules_to_save`` becomes the patch's head. The patch's rank is the largest of
    the adapter's. What PEFT computes differently (see `to_peft`) is said in a warning.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the model that it was trained on.
        classes: what its classes are called; PEFT does not store that. Without them the patch has no head.

    Raises:
        PatchFileError: the folder is not a LoRA adapter, or one of another kind (DoRA, say).
        DeltapatchError: it does not fit the base, or the number of classes is another one.

    Example:
        >>> patch = from_peft("pets-lora", load_base("timm/vit_tiny_patch16_224"), ["cat", "dog"])
    """
    adapter = read_adapter(Path(folder))
    layers = {layer.path: layer for layer in base.anatomy.layers_from("all") if layer.kind in KINDS}
    for path in adapter.layers:
        if path not in layers:
            raise DeltapatchError(
                f"{folder} changes '{path}', which is no linear layer or convolution before the classifier of"
                f" base {base.name}; import it with the base it was trained on"
            )
        reason = difference(base.submodule(path))
        if reason:
            warnings.warn(f"{path}: here it will answer otherwise: {reason}", DeltapatchWarning, stacklevel=2)
    factors = {
        path: from_peft_factors(base.submodule(path), path, layer) for path, layer in adapter.layers.items()
    }
    rank = max(len(a) for a, _ in factors.values())
    scaling = next((layer.scaling for layer in adapter.layers.values() if layer.scaling > 0), 1.0)
    targets = _targets_of(adapter, list(layers.values()))
    patch = Lora(rank=rank, alpha=rank * scaling, targets=targets).build(base, classes, seed=0)
    _take_over_head(patch, base, adapter, folder)
    with torch.no_grad():
        for site, part in zip(patch.sites, patch.parts, strict=True):
            (a, b), own = factors[site.path], cast(Factors, part)
            # Rows beyond the adapter's rank keep their random start, and their columns in B are zero.
            own.a[: len(a)] = a.to(own.a)
            own.b[:, : len(a)] = b.to(own.b) * (adapter.layers[site.path].scaling / scaling)
    return patch


def to_peft(patch: Patch, base: Base, folder: str | os.PathLike[str], skip_unsupported: bool = False) -> Path:
    """Writes a lora patch as a LoRA adapter that PEFT loads on the base's module; PEFT itself is not needed.

    The head is among its ``modules_to_save``: give PEFT the base with a classifier of as many classes. PEFT
    has no place for class names, preprocessing and the base's fingerprint. For each layer that it would
    compute differently (dilated, padded with other than zeros, weight-standardised) there is a warning.
    Grouped convolutions are exact, but take far more room: PEFT's factors are not grouped.

    Args:
        patch: a patch of the lora method.
        base: its base.
        folder: made if missing.
        skip_unsupported: leaves out layers for which PEFT has no LoRA (transposed convolutions).

    Returns:
        the folder.

    Raises:
        DeltapatchError: the patch is of another method or base, or has layers for which PEFT has no LoRA.
        PatchFileError: the folder cannot be written.
    """
    method = patch.method
    if not isinstance(method, Lora):
        raise DeltapatchError(f"only lora patches can be exported to PEFT, and this is a {method.name} patch")
    patch.check_base(base)
    layers: dict[str, PeftLayer] = {}
    skipped: list[str] = []
    enlarged: dict[str, float] = {}
    for site, part in zip(patch.sites, patch.parts, strict=True):
        module, own = base.submodule(site.path), cast(Factors, part)
        if not is_supported(module):
            skipped.append(site.path)
            continue
        reason = difference(module)
        if reason:
            warnings.warn(f"{site.path}: {reason}", DeltapatchWarning, stacklevel=2)
        a, b = to_peft_factors(module, own.a.detach(), own.b.detach())
        layers[site.path] = PeftLayer(a, b, method.scaling)
        factor = (a.numel() + b.numel()) / (own.a.numel() + own.b.numel())
        if factor > 1:
            enlarged[site.path] = factor
    if skipped and not (skip_unsupported and layers):
        raise DeltapatchError(
            f"PEFT has no LoRA for {_some(skipped)} (transposed convolutions); skip_unsupported=True exports"
            " the other layers"
        )
    if enlarged:
        warnings.warn(
            f"PEFT's factors of grouped convolutions are not grouped: those of {_some(list(enlarged))} have"
            f" up to {max(enlarged.values()):.0f} times as many numbers",
            DeltapatchWarning,
            stacklevel=2,
        )
    adapter = PeftAdapter(layers, _saved_head(patch, base), base=base.source or base.name)
    write_adapter(adapter, Path(folder), [name for name, _ in base.module.named_modules()])
    return Path(folder)


def _targets_of(adapter: PeftAdapter, layers: Sequence[Layer]) -> Targets:
    """The shortest way to name exactly the adapter's layers."""
    paths = set(adapter.layers)
    # PEFT's list may have names that stand for nothing here.
    names = tuple(name for name in adapter.names if any(is_named(path, name) for path in paths))
    candidates: tuple[Targets, ...] = ("all", "linear", "convolution", names)
    for targets in filter(None, candidates):
        if {layer.path for layer in Lora(targets=targets).targeted(layers)} == paths:
            return targets
    return tuple(layer.path for layer in layers if layer.path in paths)


def _take_over_head(patch: Patch, base: Base, adapter: PeftAdapter, folder: str | os.PathLike[str]) -> None:
    """Gives the patch's head the weights of the adapter's classifier; says so where there is none of two."""
    path = base.anatomy.head.path
    others = sorted(set(adapter.saved) - {path})
    if others:
        raise DeltapatchError(f"{folder} replaces '{others[0]}', but a patch can only replace the classifier")
    saved = adapter.saved.get(path or "")
    if saved is None or patch.head is None:
        if (saved is None) != (patch.head is None):
            which = (
                "a classifier, which needs classes=" if saved else "no classifier, so the head is untrained"
            )
            warnings.warn(f"{folder} has {which}", DeltapatchWarning, stacklevel=3)
        return
    weight = saved.get("weight", torch.empty(0))
    if weight.shape != patch.head.weight.shape:
        raise DeltapatchError(
            f"the classifier in {folder} has a weight of shape {tuple(weight.shape)}, but"
            f" {len(patch.classes)} classes on this base need {tuple(patch.head.weight.shape)}"
        )
    with torch.no_grad():
        patch.head.weight.copy_(weight)
        patch.head.bias.copy_(saved.get("bias", torch.zeros(len(weight))))


def _saved_head(patch: Patch, base: Base) -> Mapping[str, Mapping[str, Tensor]]:
    """The patch's head in place of the base's classifier; says so where PEFT cannot replace that by it."""
    if patch.head is None:
        return {}
    path, layout = base.anatomy.head.path, base.anatomy.head.layout
    if path is not None and layout == "NC":
        classifier = base.submodule(path)
        # PEFT replaces every module whose name ends so.
        replaced = [name for name, _ in base.module.named_modules() if name.endswith(path)]
        has_bias = "bias" in dict(classifier.named_parameters())
        if isinstance(classifier, nn.Linear) and has_bias and replaced == [path]:
            return {path: {"weight": patch.head.weight, "bias": patch.head.bias}}
    warnings.warn(
        "the head is left out: PEFT could not put it in the place of this base's classifier, which is no"
        " linear layer with a bias and a name of its own on pooled features",
        DeltapatchWarning,
        stacklevel=3,
    )
    return {}
