"""Task arithmetic: adding, taking off and transferring what fine-tuning added."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ..inputs import Inputs
from ..rules import Chunk, Merge, Rule, register_merge
from ..running import RunOptions, merge
from ..sources import MergeError, ModelLike
from ._norm_statistics import is_norm_statistic, mixed_statistics


@register_merge
@dataclass(frozen=True)
class TaskArithmetic(Merge):
    """θ₀ + λ Σ_t s_t (θ_t - θ₀).

    Attributes:
        scale: λ; it multiplies the sum, not the mean.
        signs: s_t of each model: 1 adds, -1 takes off; all 1 where left out. (1, 1, -1) is the analogy "C and
            B without A".
    """

    name: ClassVar[str] = "task_arithmetic"

    scale: float = 0.3
    signs: tuple[float, ...] | None = None

    def rule(self, inputs: Inputs) -> Rule:
        signs = (1.0,) * len(inputs.models) if self.signs is None else tuple(self.signs)
        if len(signs) != len(inputs.models):
            raise MergeError(f"{len(signs)} signs were given for {len(inputs.models)} models; give as many")

        def summed(chunk: Chunk) -> Tensor:
            assert chunk.base is not None
            if is_norm_statistic(chunk.name):
                return mixed_statistics(chunk, [self.scale * sign for sign in signs])
            merged = chunk.base.clone()
            for sign, delta in zip(signs, chunk.deltas, strict=True):
                merged.add_(delta, alpha=self.scale * sign)
            return merged

        return summed


def task_arithmetic(
    models: Sequence[ModelLike],
    base: ModelLike,
    *,
    scale: float = 0.3,
    signs: Sequence[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Adds what models learned to their base (Ilharco et al., "Editing models with task arithmetic", ICLR
    2023).

    θ₀ + scale · Σ_t s_t (θ_t - θ₀): addition with s = 1, negation with -1, an analogy C + B - A with
    (1, 1, -1). Usual scales are 0.3 to 0.4 for eight tasks; choose it on validation images. Running means and
    variances follow the formula where that mixes the base's with the models', and where it does not (a
    variance could go below 0) they become the mix that comes nearest.

    Args:
        models: what was fine-tuned from the base.
        base: θ₀.
        scale: λ; 0 gives the base.
        signs: one for each model; all 1 where left out.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out.

    Raises:
        MergeError: the models do not fit together, or the signs do not fit them.

    Example:
        >>> base, models = {"w": torch.ones(1)}, [{"w": torch.full((1,), 3.0)}, {"w": torch.zeros(1)}]
        >>> task_arithmetic(models, base, scale=0.5)
        {'w': tensor([1.5000])}
    """
    how = TaskArithmetic(scale, None if signs is None else tuple(signs))
    return merge(how, models, base, out, run)
