"""Running means and variances of batch norms, which are no weights and are merged with care."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rules import Chunk


def is_norm_statistic(name: str) -> bool:
    """Whether a tensor is a running mean or variance, by the name that torch gives it."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def mixed_statistics(chunk: Chunk, coefficients: Sequence[float]) -> Tensor:
    """v₀ + Σ_t c_t (v_t - v₀) with coefficients moved to where the sum is a mean of v₀ and all v_t.

    That is where none is negative and their sum is at most 1; inside it the formula is that of the weights.
    Outside of it a variance could go below 0, and the network would answer NaN.

    Args:
        chunk: of a running mean or variance, with the base's.
        coefficients: what each model's difference from the base counts.
    """
    assert chunk.base is not None
    positive = [max(coefficient, 0.0) for coefficient in coefficients]
    total = max(sum(positive), 1.0)
    merged = chunk.base.to(torch.float64, copy=True)
    for coefficient, delta in zip(positive, chunk.deltas, strict=True):
        merged.add_(delta, alpha=coefficient / total)
    return merged.to(chunk.base.dtype)
