"""The mean of models in which each weight counts as much as it matters to its model (Fisher information)."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..chunks import Part, parts_of
from ..inputs import CHUNK_ELEMENTS, Inputs, in_order
from ..rules import Chunk, Merge, Rule, register_merge
from ..running import RunOptions, merge
from ..sources import MergeError, ModelLike, Source
from ._statistics import check_numbers, open_statistics, read_statistic, weighted_mean


@register_merge
@dataclass(frozen=True, eq=False)
class FisherWeighted(Merge):
    """Σ λ_t F_t θ_t / Σ λ_t F_t, entry by entry.

    Tensors without Fisher information, such as running statistics, are averaged with the weights λ. So are
    entries whose Fisher information is 0 in all models.

    Attributes:
        fishers: the diagonal Fisher information F_t of each model: tensor name -> tensor of the same shape.
        weights: λ_t, not negative; all alike where left out.
        floor: the least Fisher information of an entry in the *first* model, whose value therefore stays
            where no model has any.
        normalise: whether λ_t is divided by the L2 norm of F_t over all merged tensors, so that a model that
            is less sure, or was looked at with fewer images, does not count more.
    """

    name: ClassVar[str] = "fisher"
    needs_base: ClassVar[bool] = False

    fishers: Sequence[ModelLike]
    weights: tuple[float, ...] | None = None
    floor: float = 1e-6
    normalise: bool = True

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The Fisher information, opened."""
        return open_statistics(self.fishers, "Fisher information")

    def options(self) -> dict[str, Any]:
        return {
            "fishers": [source.label for source in self.sources],
            "weights": None if self.weights is None else list(self.weights),
            "floor": self.floor,
            "normalise": self.normalise,
        }

    def rule(self, inputs: Inputs) -> Rule:
        check_numbers(inputs, self.sources, "Fisher informations")
        if not self.floor >= 0:
            raise MergeError(f"floor is {self.floor}, but it cannot be negative; 1e-6 is usual")
        known = _known(inputs, self.sources)
        shares = self._shares(len(inputs.models))
        scales = shares
        if self.normalise:
            scales = [
                share / _length(source, known, inputs)
                for share, source in zip(shares, self.sources, strict=True)
            ]

        def weighted(chunk: Chunk) -> Tensor:
            mean = weighted_mean(chunk.models, shares)
            if chunk.name not in known:
                return mean.to(chunk.models[0].dtype)
            above, below = torch.zeros_like(mean), torch.zeros_like(mean)
            for number, (scale, source, model) in enumerate(
                zip(scales, self.sources, chunk.models, strict=True)
            ):
                fisher = _read(source, chunk.name, chunk.start, chunk.start + len(mean))
                weight = (fisher.clamp(min=self.floor) if number == 0 else fisher) * scale
                above += weight * model
                below += weight
            return torch.where(below > 0, above / below, mean).to(chunk.models[0].dtype)

        return weighted

    def _shares(self, count: int) -> list[float]:
        """λ_t with a sum of 1."""
        weights = (1.0,) * count if self.weights is None else self.weights
        if len(weights) != count:
            raise MergeError(f"{len(weights)} weights were given for {count} models; give as many")
        if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise MergeError("weights of a mean must not be negative, and one has to be larger than 0")
        return [weight / sum(weights) for weight in weights]


def _known(inputs: Inputs, sources: Sequence[Source]) -> frozenset[str]:
    """The merged tensors that all models have Fisher information of."""
    for name, spec in inputs.merged.items():
        having = [source for source in sources if name in source.specs]
        lacking = [source for source in sources if name not in source.specs]
        if having and lacking:
            raise MergeError(
                f"{lacking[0].label} has no tensor '{name}', which {having[0].label} has; gather it again"
            )
        for source in having:
            if source.specs[name].shape != spec.shape:
                raise MergeError(
                    f"tensor '{name}' has shape {source.specs[name].shape} in {source.label} and {spec.shape}"
                    " in the models; gather it of these models"
                )
    known = frozenset(name for name in inputs.merged if name in sources[0].specs)
    if not known:
        raise MergeError(f"{sources[0].label} names none of the merged tensors; gather it of these models")
    return known


def _read(source: Source, name: str, start: int, stop: int) -> Tensor:
    values = read_statistic(source, name, start, stop)
    if bool((values < 0).any()):
        raise MergeError(
            f"{source.label}: tensor '{name}' holds negative values, but Fisher information has none"
        )
    return values


def _length(source: Source, known: frozenset[str], inputs: Inputs) -> float:
    """The L2 norm over all these tensors.

    Parts of one fixed length are added up by numpy, which uses one thread, and then without rounding, so that
    not a bit of it depends on how the merge is carried out.
    """

    def squares(part: Part) -> float:
        values = _read(source, part.name, part.start, part.stop).numpy()
        return float(np.square(values).sum())

    parts = parts_of({name: spec for name, spec in inputs.merged.items() if name in known}, CHUNK_ELEMENTS)
    length = math.sqrt(math.fsum(in_order(squares, parts, inputs.threads)))
    if length == 0:
        raise MergeError(f"{source.label} is 0 everywhere, so it cannot be normalised; gather it again")
    return length


def fisher(
    models: Sequence[ModelLike],
    base: ModelLike | None = None,
    *,
    fishers: Sequence[ModelLike],
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    normalise: bool = True,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Averages models entry by entry with their Fisher information as weights (Matena and Raffel, "Merging
    models with Fisher-weighted averaging", NeurIPS 2022).

    θ = Σ_t λ_t F_t θ_t / Σ_t λ_t F_t. Leave heads of different tasks out with ``run=RunOptions(skip=...)``.

    Args:
        models: what is merged, see `open_source`.
        base: what they were fine-tuned from; only skipped tensors are taken from it.
        fishers: F_t of each model, in the same order: what `diagonal_fisher` gathers, or files of it.
        weights: λ_t, chosen on validation images; all alike where left out.
        floor: the least Fisher information of an entry in the first model.
        normalise: whether λ_t is divided by the L2 norm of F_t.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out.

    Raises:
        MergeError: the models, Fisher informations or weights do not fit together.

    Example:
        >>> models = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}]
        >>> fisher(models, fishers=[{"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}], normalise=False)
        {'w': tensor([2.])}
    """
    how = FisherWeighted(tuple(fishers), None if weights is None else tuple(weights), floor, normalise)
    return merge(how, models, base, out, run)
