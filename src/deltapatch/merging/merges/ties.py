"""TIES: trim, elect a sign, and average what agrees with it."""

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
from ._electing import Combine, check_combine, elected_rule
from ._norm_statistics import is_norm_statistic, mixed_statistics


@register_merge
@dataclass(frozen=True)
class Ties(Merge):
    """θ₀ + λ τ, where τ is the mean of the trimmed task vectors' entries that have the elected sign.

    Attributes:
        keep: the share of each task vector's entries that is kept, the largest ones of all tensors together.
        scale: λ.
        combine: "mean", "sum" or "max" (the largest magnitude) of the entries that agree.
    """

    name: ClassVar[str] = "ties"

    keep: float = 0.2
    scale: float = 1.0
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise MergeError(
                f"keep of a ties merge is {self.keep}; give a share above 0 and at most 1, such as 0.2"
            )
        check_combine(self.combine)

    def rule(self, inputs: Inputs) -> Rule:
        names = [name for name in inputs.merged if not is_norm_statistic(name)]
        task_vector = elected_rule(inputs, names, lambda chunk: chunk.deltas, self.keep, self.combine)
        share = self.scale / len(inputs.models)

        def elected(chunk: Chunk) -> Tensor:
            assert chunk.base is not None
            if is_norm_statistic(chunk.name):
                return mixed_statistics(chunk, [share] * len(chunk.models))
            return task_vector(chunk).mul_(self.scale).add_(chunk.base).to(chunk.base.dtype)

        return elected


def ties(
    models: Sequence[ModelLike],
    base: ModelLike,
    *,
    keep: float = 0.2,
    scale: float = 1.0,
    combine: Combine = "mean",
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Merges what models learned without letting them cancel each other (Yadav et al., "TIES-merging:
    resolving interference when merging models", NeurIPS 2023).

    1. Trim: of every task vector τ_t = θ_t - θ₀, over all of its tensors together, exactly the
       ⌊keep · total⌋ entries of the largest magnitude (in fp32) stay, and the others are 0. Of entries with
       the threshold's very magnitude the first ones stay, by the tensor's name and the place in it.
    2. Elect: each entry's sign is that of the sum of the trimmed task vectors. Where the sum is 0, it is the
       sign of the sum of all elected signs; where that is 0 too, the entry stays the base's.
    3. Merge: τ is the mean of the entries with the elected sign, zeros not counted; θ₀ + scale · τ.

    The authors' script keeps one entry more than asked and all ties, and another tool trims each tensor by
    itself; results therefore differ a little from theirs. Running means and variances are neither trimmed nor
    counted: they become the mean of the models', at a scale below 1 mixed with the base's. Re-estimate
    them on images where you can.

    Args:
        models: what was fine-tuned from the base, see `open_source`.
        base: θ₀.
        keep: the share of entries that is kept, above 0 and at most 1.
        scale: λ; 1 is usual without validation images, 0.8 to 2.5 are tried with them.
        combine: "mean", or "sum" (needs smaller scales), or "max", the entry of the largest magnitude.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out. The inputs are read three to five times.

    Raises:
        MergeError: the models do not fit together, or an option is out of range.

    Example:
        >>> base = {"w": torch.zeros(4)}
        >>> tasks = [[4.0, -3, 2, -1], [-1.0, 2, 3, 4], [3.0, 1, -2, -4]]
        >>> ties([{"w": torch.tensor(task)} for task in tasks], base, keep=0.5)
        {'w': tensor([ 3.5000, -3.0000,  3.0000,  4.0000])}
    """
    return merge(Ties(keep, scale, combine), models, base, out, run)
