"""Robust weight signatures, added to a model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..inputs import Inputs
from ..rules import Chunk, Merge, Rule, register_merge
from ..running import RunOptions, merge
from ..signature_files import open_signature
from ..sources import MergeError, ModelLike, Source


@register_merge
@dataclass(frozen=True, eq=False)
class WeightSignature(Merge):
    """θ + Σ_i α_i S_i for the tensors that the signatures have; the others stay as they are.

    Attributes:
        signatures: S_i, from `extract_signature` or files of `save_signature`.
        scale: α of all, or of each.
    """

    name: ClassVar[str] = "weight_signature"
    needs_base: ClassVar[bool] = False

    signatures: Sequence[ModelLike]
    scale: float | Sequence[float] = 1.0

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The signatures, opened."""
        return tuple(open_signature(one, f"signature {n}") for n, one in enumerate(self.signatures, 1))

    def options(self) -> dict[str, Any]:
        scale = list(self.scale) if isinstance(self.scale, Sequence) else self.scale
        return {"signatures": [source.label for source in self.sources], "scale": scale}

    def rule(self, inputs: Inputs) -> Rule:
        if len(inputs.models) != 1:
            raise MergeError(
                f"signatures are added to one model, and {len(inputs.models)} were given; merge these first"
            )
        scales = list(self.scale) if isinstance(self.scale, Sequence) else [self.scale] * len(self.sources)
        if len(scales) != len(self.sources):
            raise MergeError(
                f"{len(scales)} scales were given for {len(self.sources)} signatures; give one, or as many"
            )
        for source in self.sources:
            _check(source, inputs)

        def added(chunk: Chunk) -> Tensor:
            model = chunk.models[0]
            total = torch.zeros_like(model)
            own = [
                (one, scale)
                for one, scale in zip(self.sources, scales, strict=True)
                if chunk.name in one.specs
            ]
            for source, scale in own:
                part = source.read(chunk.name, chunk.start, chunk.start + len(model)).to(model)
                total.add_(_finite(part, source, chunk.name), alpha=scale)
            return total.add_(model) if own else model

        return added


def _check(source: Source, inputs: Inputs) -> None:
    model = inputs.models[0]
    for name, spec in source.specs.items():
        if name not in inputs.merged:
            raise MergeError(
                f"{source.label} has a tensor '{name}', and {model.label} has no floating tensor of this"
                " name that is merged; take signatures of models of its architecture"
            )
        if inputs.merged[name].shape != spec.shape or not spec.is_floating:
            raise MergeError(
                f"tensor '{name}' has shape {spec.shape} and is {spec.dtype} in {source.label}, and has shape"
                f" {inputs.merged[name].shape} in {model.label}; take signatures of models of its"
                " architecture"
            )


def _finite(part: Tensor, source: Source, name: str) -> Tensor:
    if not bool(torch.isfinite(part).all()):
        raise MergeError(f"{source.label}: tensor '{name}' holds NaN or infinite values; extract it again")
    return part


def weight_signature(
    models: Sequence[ModelLike],
    base: ModelLike | None = None,
    *,
    signatures: Sequence[ModelLike],
    scale: float | Sequence[float] = 1.0,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Makes a model robust by adding weight signatures to it (Cai et al., "Robust weight signatures", ICML
    2023).

    θ + Σ_i α_i S_i, for the tensors that the signatures have. A signature is what `extract_signature` finds
    from a clean and a robust model of one start, usually for the first layers only, and may be added to any
    model of that start. Several corruptions are composed by adding several; α = -1 takes one off, up to
    rounding (`put_on_signatures` and `take_off_signatures` do it to the last bit).

    α counts once: the released script multiplies it both into the projection and into the sum, so that 0.5
    acts as 0.25. It also overwrites norms and downsampling convolutions all over the network, which is not
    done here. Networks with batch norm need their statistics re-estimated afterwards, on corrupted images.

    Args:
        models: the one model that is made robust.
        base: only skipped tensors are taken from it.
        signatures: mappings or files, quantised or not.
        scale: α of all, or of each.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out.

    Raises:
        MergeError: there is not one model, or a signature does not fit it.

    Example:
        >>> weight_signature([{"w": torch.tensor([1.0])}], signatures=[{"w": torch.tensor([3.0])}], scale=0.5)
        {'w': tensor([2.5000])}
    """
    if not isinstance(scale, (int, float)):
        scale = tuple(scale)
    return merge(WeightSignature(tuple(signatures), scale), models, base, out, run)
