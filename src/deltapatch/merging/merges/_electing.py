"""The second half of a TIES merge: one sign for each entry, and the mean of the task vectors that have it."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..inputs import Inputs
from ..rules import Chunk
from ..sources import MergeError
from ._trimming import TaskVectors, find_trims

Combine = Literal["mean", "sum", "max"]


def elected_rule(
    inputs: Inputs, names: Sequence[str], vectors: TaskVectors, keep: float, combine: Combine
) -> Callable[[Chunk], Tensor]:
    """Trims task vectors, elects signs, and gives what makes the merged task vector of a chunk, in fp64.

    Args:
        inputs: the models.
        names: the tensors that make up the task vectors.
        vectors: the task vectors.
        keep: the share of entries of each whole task vector that is kept.
        combine: what becomes of the entries that have the elected sign.
    """
    trims = find_trims(inputs, names, vectors, keep)

    def trimmed(chunk: Chunk) -> list[Tensor]:
        return [trim(chunk, values) for trim, values in zip(trims, vectors(chunk), strict=True)]

    def count(chunk: Chunk) -> int:
        return int(elected_signs(trimmed(chunk)).sum(dtype=torch.float64))

    majority = _Once(lambda: float(np.sign(sum(inputs.over_chunks(count, sorted(names))))))

    def rule(chunk: Chunk) -> Tensor:
        parts = trimmed(chunk)
        signs = elected_signs(parts)
        is_undecided = (signs == 0) & torch.stack([part != 0 for part in parts]).any(0)
        if bool(is_undecided.any()):
            signs = torch.where(is_undecided, majority(), signs)
        return combined(parts, signs, combine)

    return rule


class _Once:
    """A number that takes a pass over all models, found when a thread first asks for it."""

    def __init__(self, find: Callable[[], float]) -> None:
        self._find = find
        self._found: float | None = None
        self._lock = Lock()

    def __call__(self) -> float:
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found


def elected_signs(parts: Sequence[Tensor]) -> Tensor:
    """The sign of each entry's sum over the task vectors, shape (n,): -1, 0 or 1, in the parts' dtype."""
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for part in parts:
        total.add_(part)
    return total.sign_().to(parts[0].dtype)


def combined(parts: Sequence[Tensor], signs: Tensor, combine: Combine) -> Tensor:
    """Mean, sum or largest of the entries that have the elected sign; 0 where none has, shape (n,), fp64."""
    magnitude = torch.zeros_like(signs, dtype=torch.float64)
    number = torch.zeros_like(signs)
    for part in parts:
        agreeing = (part * signs).clamp_(min=0)
        if combine == "max":
            torch.maximum(magnitude, agreeing.to(torch.float64), out=magnitude)
        else:
            magnitude.add_(agreeing)
            number.add_(agreeing.sign_())
    if combine == "mean":
        magnitude.div_(number.clamp_(min=1))
    return magnitude.mul_(signs)


def check_combine(combine: str) -> None:
    """Refuses what is none of the ways to combine.

    Raises:
        MergeError: it is none.
    """
    if combine not in get_args(Combine):
        raise MergeError(f"combine is '{combine}'; give one of {', '.join(get_args(Combine))}")
