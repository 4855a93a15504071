"""DARE: drop most of what models learned at random, and rescale the rest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..inputs import Inputs
from ..rules import Chunk, Merge, Rule, register_merge
from ..running import RunOptions, merge
from ..sources import MergeError, ModelLike
from ._electing import elected_rule
from ._norm_statistics import is_norm_statistic, mixed_statistics
from ._places import random_numbers

Then = Literal["average", "task_arithmetic", "ties"]


@register_merge
@dataclass(frozen=True)
class Dare(Merge):
    """θ₀ + λ · merged(δ'_t) with δ'_t = m_t (θ_t - θ₀) / (1 - p), m_t ~ Bernoulli(1 - p) for each entry.

    Attributes:
        drop: p.
        seed: of all masks; each depends on it, the task, the tensor's name and the place in the tensor only.
        then: how the rest is merged: "average", "task_arithmetic" (the sum) or "ties".
        scale: λ.
        keep: for "ties", the share of entries that its trim keeps.
        tasks: names that the models' masks are drawn for; their numbers in the list where left out.
    """

    name: ClassVar[str] = "dare"

    drop: float = 0.9
    seed: int = 0
    then: Then = "average"
    scale: float = 1.0
    keep: float = 0.2
    tasks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise MergeError(
                f"drop of a dare merge is {self.drop}; give a share from 0 to below 1, for what stays is"
                " divided by 1 - drop"
            )
        if not 0 < self.keep <= 1:
            raise MergeError(f"keep of a dare merge is {self.keep}; give a share above 0 and at most 1")
        if self.then not in get_args(Then):
            raise MergeError(f"then is '{self.then}'; give one of {', '.join(get_args(Then))}")

    def rule(self, inputs: Inputs) -> Rule:
        number = len(inputs.models)
        tasks = tuple(map(str, range(1, number + 1))) if self.tasks is None else tuple(self.tasks)
        if len(tasks) != number:
            raise MergeError(f"{len(tasks)} names of tasks were given for {number} models; give as many")
        if len(set(tasks)) < number:
            raise MergeError("two tasks have one name, and would drop the same entries; name them apart")

        def thinned(chunk: Chunk) -> list[Tensor]:
            return [
                self._thinned(chunk, delta, task) for delta, task in zip(chunk.deltas, tasks, strict=True)
            ]

        share = self.scale if self.then == "task_arithmetic" else self.scale / number
        elected = None
        if self.then == "ties":
            names = [name for name in inputs.merged if not is_norm_statistic(name)]
            elected = elected_rule(inputs, names, thinned, self.keep, "mean")

        def dropped(chunk: Chunk) -> Tensor:
            assert chunk.base is not None
            if is_norm_statistic(chunk.name):
                return mixed_statistics(chunk, [share] * number)
            if elected is not None:
                merged = elected(chunk).mul_(self.scale)
            else:
                merged = torch.zeros_like(chunk.base, dtype=torch.float64)
                for delta in thinned(chunk):
                    merged.add_(delta, alpha=share)
            return merged.add_(chunk.base).to(chunk.base.dtype)

        return dropped

    def _thinned(self, chunk: Chunk, delta: Tensor, task: str) -> Tensor:
        if self.drop == 0:
            return delta
        kept = keep_mask(self.seed, task, chunk.name, chunk.start, len(delta), self.drop)
        return torch.where(kept, delta / (1 - self.drop), torch.zeros_like(delta))


def keep_mask(seed: int, task: str, tensor: str, start: int, number: int, drop: float) -> Tensor:
    """Which of the entries start..start + number of a tensor are kept, bool (number,).

    Args:
        seed: of the merge.
        task: whose task vector it is.
        tensor: its name.
        start: the place of the first entry.
        number: how many entries.
        drop: how likely an entry is dropped, at a resolution of 2⁻³².
    """
    numbers = random_numbers(f"{seed}\0{task}\0{tensor}", start, start + number)
    return torch.from_numpy(numbers >= round(drop * 2**32))


def dare(
    models: Sequence[ModelLike],
    base: ModelLike,
    *,
    drop: float = 0.9,
    seed: int = 0,
    then: Then = "average",
    scale: float = 1.0,
    keep: float = 0.2,
    tasks: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Drops most of what each model learned at random, rescales the rest, and merges that (Yu et al.,
    "Language models are super Mario", ICML 2024).

    δ'_t = m_t (θ_t - θ₀) / (1 - drop) with m_t ~ Bernoulli(1 - drop) for each entry by itself. Its
    expectation is the task vector, its variance (θ_t - θ₀)² drop / (1 - drop). The result is θ₀ + scale times
    the mean, sum or TIES merge of the δ'_t. It suits small differences, as of short fine-tuning; large ones
    do not survive it. Running means and variances are never dropped: they follow the formula where that mixes
    the base's with the models', and where it does not they become the mix that comes nearest.

    Args:
        models: what was fine-tuned from the base, see `open_source`.
        base: θ₀.
        drop: the share that is dropped, from 0 (nothing) to below 1.
        seed: the same seed drops the same entries.
        then: "average"; "task_arithmetic", the sum, for which scales of 0.3 to 0.4 are usual; or "ties",
            which trims what the drop left, elects signs and averages what agrees.
        scale: λ.
        keep: for "ties" only: the share of entries that is kept, see `deltapatch.merging.ties`.
        tasks: a name for each model. A model's mask goes with its name, so that it stays the same in another
            order or company; their numbers in the list where left out.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out.

    Raises:
        MergeError: the models do not fit together, or an option is out of range.

    Example:
        >>> base, tuned = {"w": torch.zeros(6)}, {"w": torch.ones(6)}
        >>> dare([tuned], base, drop=0.5, seed=1)["w"].unique()
        tensor([0., 2.])
    """
    how = Dare(drop, seed, then, scale, keep, None if tasks is None else tuple(tasks))
    return merge(how, models, base, out, run)
