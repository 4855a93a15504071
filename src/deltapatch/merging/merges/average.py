"""The (weighted) mean of models."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..inputs import Inputs
from ..rules import Chunk, Merge, Rule, register_merge
from ..running import RunOptions, merge
from ..sources import MergeError, ModelLike


@register_merge
@dataclass(frozen=True)
class Average(Merge):
    """Σ w_t θ_t / Σ w_t.

    Attributes:
        weights: one for each model, not negative; all alike where left out.
    """

    name: ClassVar[str] = "average"
    needs_base: ClassVar[bool] = False

    weights: tuple[float, ...] | None = None

    def rule(self, inputs: Inputs) -> Rule:
        weights = (1.0,) * len(inputs.models) if self.weights is None else tuple(self.weights)
        if len(weights) != len(inputs.models):
            raise MergeError(
                f"{len(weights)} weights were given for {len(inputs.models)} models; give as many"
            )
        if not all(0 <= weight < inf for weight in weights) or sum(weights) == 0:
            raise MergeError("weights of an average must not be negative, and one has to be larger than 0")
        shares = [weight / sum(weights) for weight in weights]

        def averaged(chunk: Chunk) -> Tensor:
            merged = torch.zeros_like(chunk.models[0])
            for share, model in zip(shares, chunk.models, strict=True):
                merged.add_(model, alpha=share)
            return merged

        return averaged


def average(
    models: Sequence[ModelLike],
    base: ModelLike | None = None,
    *,
    weights: Sequence[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """The (weighted) mean of models, tensor by tensor ("model soup").

    Args:
        models: what is averaged, see `open_source`.
        base: what they were fine-tuned from; only skipped tensors are taken from it.
        weights: one for each model; all alike where left out.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out.

    Raises:
        MergeError: the models do not fit together, or the weights do not fit them.

    Example:
        >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
        {'w': tensor([2.])}
    """
    how = Average(None if weights is None else tuple(weights))
    return merge(how, models, base, out, run)
