"""Layers that answer, in least squares, what each model's layer answers to its own inputs (RegMean)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..inputs import Inputs
from ..rules import Chunk, Merge, Rule, register_merge
from ..running import RunOptions, merge
from ..sources import MergeError, ModelLike, Source
from ._statistics import check_numbers, open_statistics, read_statistic, weighted_mean


@register_merge
@dataclass(frozen=True, eq=False)
class RegMean(Merge):
    """W = (Σ G_t)⁻¹ Σ G_t W_t for the weights of linear and convolution layers; the rest is averaged.

    W_t has inputs as rows and outputs as columns, each group of a convolution on its own, and G_t is
    X_tᵀX_t / rows of the layer's inputs in model t. It minimises Σ_t ‖X_t W - X_t W_t‖² / rows.

    Attributes:
        grams: G_t of each model: layer name -> (d, d), or (groups, d, d).
        off_diagonal: what entries beside the diagonal of G_t are multiplied by; 1 leaves them, 0 keeps the
            diagonal only.
        ridge: how much of the mean of its diagonal is added to the diagonal of Σ G_t, and as much to the
            other side: an input that is 0 in all models has the plain average, and a sum that has no inverse
            gets one.
    """

    name: ClassVar[str] = "regmean"
    needs_base: ClassVar[bool] = False

    grams: Sequence[ModelLike]
    off_diagonal: float = 0.9
    ridge: float = 1e-6

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The matrices, opened."""
        return open_statistics(self.grams, "Gram matrices")

    def options(self) -> dict[str, Any]:
        return {
            "grams": [source.label for source in self.sources],
            "off_diagonal": self.off_diagonal,
            "ridge": self.ridge,
        }

    def rule(self, inputs: Inputs) -> Rule:
        check_numbers(inputs, self.sources, "sets of Gram matrices")
        if not 0 <= self.off_diagonal <= 1:
            raise MergeError(
                f"off_diagonal is {self.off_diagonal}, but it lies between 0 and 1; 0.9 is usual"
            )
        if not self.ridge >= 0:
            raise MergeError(f"ridge is {self.ridge}, but it cannot be negative; 1e-6 is usual")
        layers = {
            tensor: layer for layer in self.sources[0].specs if (tensor := _weight(layer)) in inputs.merged
        }
        if not layers:
            raise MergeError(
                f"{self.sources[0].label} names no layer of the merged tensors; gather it of these models"
            )
        for tensor, layer in layers.items():
            _check(layer, inputs.merged[tensor].shape, self.sources)
        shares = [1 / len(inputs.models)] * len(inputs.models)

        def solved_or_averaged(chunk: Chunk) -> Tensor:
            layer = layers.get(chunk.name)
            merged = weighted_mean(chunk.models, shares) if layer is None else self._solved(chunk, layer)
            return merged.to(chunk.models[0].dtype)

        return solved_or_averaged

    def whole(self, inputs: Inputs, name: str) -> bool:
        return any(_weight(layer) == name for layer in self.sources[0].specs)

    def _solved(self, chunk: Chunk, layer: str) -> Tensor:
        """The weights of one layer, row-major, in fp64."""
        shape = self.sources[0].specs[layer].shape
        groups, width = shape[0] if len(shape) == 3 else 1, shape[-1]
        weights = [model.to(torch.float64).view(groups, -1, width).mT for model in chunk.models]
        # Only what differs from the mean is solved for: models that agree stay as they are, and a ridge pulls
        # towards the mean, not towards 0.
        mean = sum(weights[1:], weights[0]) / len(weights)
        left, right = mean.new_zeros(groups, width, width), torch.zeros_like(mean)
        for source, weight in zip(self.sources, weights, strict=True):
            gram = self._shrunk(read_statistic(source, layer).view(groups, width, width))
            left += gram
            right += gram @ (weight - mean)
        diagonal = left.diagonal(dim1=-2, dim2=-1)
        scale = diagonal.mean(-1, keepdim=True)
        # A group into which nothing but zeros goes, as into a dead channel, keeps the mean.
        diagonal += torch.where(scale > 0, self.ridge * scale, 1.0)
        factor, failed = torch.linalg.cholesky_ex(left)
        if bool(failed.any()):
            raise MergeError(
                f"the Gram matrices of layer '{layer}' have no stable inverse; gather more images,"
                " or give a larger ridge"
            )
        return (mean + torch.cholesky_solve(right, factor)).mT.reshape(-1)

    def _shrunk(self, gram: Tensor) -> Tensor:
        """A copy with smaller entries beside the diagonal."""
        shrunk = gram * self.off_diagonal
        shrunk.diagonal(dim1=-2, dim2=-1).copy_(gram.diagonal(dim1=-2, dim2=-1))
        return shrunk


def _weight(layer: str) -> str:
    """The name of a layer's weight in the state dict; the model itself may be the layer."""
    return f"{layer}.weight" if layer else "weight"


def _check(layer: str, weight: tuple[int, ...], sources: Sequence[Source]) -> None:
    """Raises a MergeError unless every model has a matrix that fits the layer's weight."""
    first = sources[0].specs[layer].shape
    outputs, *inputs = weight
    width = prod(inputs)
    groups = first[0] if len(first) == 3 else 1
    fits = len(weight) >= 2 and first[-2:] == (width, width) and len(first) in (2, 3)
    if not fits or groups < 1 or outputs % groups:
        raise MergeError(
            f"{sources[0].label}: layer '{layer}' has a Gram matrix of shape {first}, which does not fit its"
            f" weight of shape {weight}; gather it of these models"
        )
    for source in sources[1:]:
        if layer not in source.specs:
            raise MergeError(
                f"{source.label} has no layer '{layer}', which {sources[0].label} has; gather it again"
            )
        if source.specs[layer].shape != first:
            raise MergeError(
                f"layer '{layer}' has a Gram matrix of shape {source.specs[layer].shape} in {source.label}"
                f" and {first} in {sources[0].label}; gather both of models of one architecture"
            )


def regmean(
    models: Sequence[ModelLike],
    base: ModelLike | None = None,
    *,
    grams: Sequence[ModelLike],
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Solves for the weights of each layer by what enters it in each model (Jin et al., "Dataless knowledge
    fusion by merging weights of language models", ICLR 2023), for linear and for convolution layers.

    Each layer that is solved for is in memory as a whole in fp64, with one of its d x d matrices; d is the
    number of inputs, or of input channels times kernel height times kernel width, in a group. Leave heads of
    different tasks out with ``run=RunOptions(skip=...)``.

    Args:
        models: what is merged, see `open_source`.
        base: what they were fine-tuned from; only skipped tensors are taken from it.
        grams: G_t of each model, in the same order: what `layer_grams` gathers, or files of it.
        off_diagonal: what entries beside the diagonal are multiplied by.
        ridge: how much of the mean of its diagonal is added to the diagonal of Σ G_t.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: how to carry it out.

    Raises:
        MergeError: the models or matrices do not fit together, or a sum of matrices has no inverse.

    Example:
        >>> models = [{"fc.weight": torch.tensor([[2.0]])}, {"fc.weight": torch.tensor([[6.0]])}]
        >>> regmean(models, grams=[{"fc": torch.tensor([[1.0]])}, {"fc": torch.tensor([[3.0]])}])
        {'fc.weight': tensor([[5.0000]])}
    """
    return merge(RegMean(tuple(grams), off_diagonal, ridge), models, base, out, run)
