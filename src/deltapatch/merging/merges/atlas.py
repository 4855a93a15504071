"""aTLAS: task vectors scaled by a coefficient of their own for each block of parameters."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from ..inputs import Inputs
from ..rules import Chunk, Merge, Rule, register_merge
from ..running import RunOptions, merge
from ..sources import MergeError, ModelLike
from ._norm_statistics import is_norm_statistic, mixed_statistics
from ._places import random_groups

Coefficients = Mapping[str, Sequence[float | Sequence[float]]]
"""Block name -> for each model one number, or one for each group of the block's entries."""


@register_merge
@dataclass(frozen=True)
class Atlas(Merge):
    """θ₀ʲ + Σ_t λ_tʲ (θ_tʲ - θ₀ʲ) for every block j; a block is one tensor, of whatever kind.

    Attributes:
        coefficients: block name -> λ of each model; with ``partitions`` above 1, for each model a list of as
            many.
        partitions: in how many groups the entries of each tensor are split at random.
        seed: of that split.
    """

    name: ClassVar[str] = "atlas"

    coefficients: Coefficients = field(default_factory=dict[str, tuple[float, ...]])
    partitions: int = 1
    seed: int = 0

    def rule(self, inputs: Inputs) -> Rule:
        table = _table(self, inputs)

        def scaled(chunk: Chunk) -> Tensor:
            assert chunk.base is not None
            if is_norm_statistic(chunk.name):
                return mixed_statistics(chunk, [fmean(values) for values in table[chunk.name]])
            merged = chunk.base.clone()
            groups = self.groups(chunk) if self.partitions > 1 else None
            for values, delta in zip(table[chunk.name], chunk.deltas, strict=True):
                if groups is None:
                    merged.add_(delta, alpha=values[0])
                else:
                    merged.addcmul_(torch.tensor(values, dtype=delta.dtype)[groups], delta)
            return merged

        return scaled

    def groups(self, chunk: Chunk) -> Tensor:
        """Which of the ``partitions`` each entry of a chunk belongs to, int64, shape (n,)."""
        stop = chunk.start + len(chunk.models[0])
        return random_groups(f"{self.seed}/{chunk.name}", chunk.start, stop, self.partitions)


def _table(how: Atlas, inputs: Inputs) -> dict[str, list[list[float]]]:
    """Block name -> model -> the numbers of its groups."""
    if how.partitions < 1:
        raise MergeError(f"atlas cannot split tensors in {how.partitions} groups; give 1 or more partitions")
    known = {*inputs.merged, *inputs.copied, *(name for model in inputs.models for name in model.specs)}
    for name in how.coefficients:
        if name not in known:
            raise MergeError(f"coefficients are given for '{name}', and the models have no such tensor")
    table: dict[str, list[list[float]]] = {}
    for name in inputs.merged:
        if name not in how.coefficients:
            raise MergeError(
                f"tensor '{name}' has no coefficients; give one number for each model (0 keeps the base's"
                " values), or leave the tensor out with skip"
            )
        rows = [
            [float(number) for number in row] if isinstance(row, Sequence) else [float(row)]
            for row in how.coefficients[name]
        ]
        if len(rows) != len(inputs.models) or any(len(row) != how.partitions for row in rows):
            raise MergeError(
                f"the coefficients of '{name}' do not fit {len(inputs.models)} models and partitions="
                f"{how.partitions}; give {how.partitions} for each model"
            )
        table[name] = rows
    return table


def atlas(
    models: Sequence[ModelLike],
    base: ModelLike,
    *,
    coefficients: Coefficients,
    partitions: int = 1,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Adds what models learned to their base, each tensor with a coefficient of its own (Zhang et al.,
    "Knowledge composition using task vectors with learned anisotropic scaling", NeurIPS 2024).

    θʲ = θ₀ʲ + Σ_t λ_tʲ (θ_tʲ - θ₀ʲ) for every block j. A block is one tensor: each weight, each bias, each
    scale and shift of a norm. Every tensor that is merged needs coefficients, so that none is passed over
    unnoticed. The coefficients are learned by `learn_coefficients`. Those of norm statistics are not split in
    groups, and are moved to where the result is a mean of the base's and the models', so that no variance
    becomes negative; it is better to give 0 and to re-estimate them.

    Args:
        models: what was fine-tuned from the base.
        base: θ₀.
        coefficients: block name -> one number for each model; with partitions, that many for each model.
        partitions: in how many groups each tensor's entries are split at random; more fit more closely.
        seed: of that split; it has to be the one that the coefficients were learned with.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out.

    Raises:
        MergeError: the models do not fit together, or the coefficients do not fit them.

    Example:
        >>> atlas([{"w": torch.tensor([3.0])}], {"w": torch.tensor([1.0])}, coefficients={"w": [0.25]})
        {'w': tensor([1.5000])}
    """
    plain = {
        name: tuple(tuple(row) if isinstance(row, Sequence) else row for row in rows)
        for name, rows in coefficients.items()
    }
    return merge(Atlas(plain, partitions, seed), models, base, out, run)
