"""Skips of a stage: weighted sums of earlier states that enter its joins, whoever gives the weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .anatomy import Layout, Stage, SubBlock
from .joining import Junction, run_sub_block, state_in
from .touching import Touch

_FEWEST_CHANNELS = 16
"""A light Δ-module of a narrow stage would have too few channels to tell images apart."""


class Skips(Protocol):
    """What a stage's run asks for the skips: their weights, and the sum that enters each join."""

    def skip_weights(self, x: Tensor) -> Tensor:
        """The stage's input -> the weights of all its skips, of shape (N, skips)."""
        ...

    def summed(self, index: int, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """What enters the join of sub-block ``index`` (from 0).

        Args:
            index: of the sub-block.
            weights: a_ij, of shape (N, len(states)).
            states: f_0 ... f_{i-1}.
        """
        ...

    def fold(self, tensor: Tensor) -> Tensor:
        """The tensor with a row for each patch and image."""
        ...


def skip_touches(stage: Stage, skips: Skips, keeps_join: bool) -> Mapping[str, Touch]:
    """What the stage's sub-blocks compute with these skips.

    Args:
        stage: the stage.
        skips: gives weights and sums.
        keeps_join: whether the base's own join stays as it is and the sum is added to it; otherwise the sum
            takes the place of the base's own skip.
    """
    run = _StageRun(stage, skips, keeps_join)
    return {sub_block.path: run.touch(index) for index, sub_block in enumerate(stage.sub_blocks)}


def weighted_sum(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Σ_j a_j f_j for each image.

    Args:
        weights: shape (N, len(states)), or (1, len(states)) for weights that all images share.
        states: each of shape (N, ...).
    """
    per_row = (-1, *[1] * (states[0].ndim - 1))
    total = weights[:, 0].view(per_row) * states[0]
    for source in range(1, len(states)):
        total = torch.addcmul(total, weights[:, source].view(per_row), states[source])
    return total


def existing_skips(stage: Stage) -> Tensor:
    """Which of the stage's skips the base has already, bool of shape (n (n + 1) / 2,): those from f_{i-1}
    to f_i.
    """
    flags = [
        sub_block.join.has_shortcut and source == target - 1
        for target, sub_block in enumerate(stage.sub_blocks, start=1)
        for source in range(target)
    ]
    return torch.tensor(flags, dtype=torch.bool)


class LastAxisBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis, for states whose channels stand there: (N, ..., C) -> (N,
    ..., C).
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.reshape(-1, input.shape[-1])).reshape(input.shape)


def sum_norm(channels: int, layout: Layout) -> nn.Module:
    """Batch normalisation on maps, as published; layer normalisation on tokens, as transformers have it."""
    if layout == "NCHW":
        return nn.BatchNorm2d(channels)
    return LastAxisBatchNorm(channels) if layout == "NHWC" else nn.LayerNorm(channels)


class DeltaModule(nn.Module):
    """Δ(x): two convolutions, a global average and a linear layer give one number for each skip.

    FC(GAP(ReLU(Norm(conv(ReLU(Norm(conv(x))))))) with 3x3 convolutions C -> C/2 -> C/2 on maps and 1x1 ones
    (linear layers) on tokens, without bias. A light one has C/8 instead of C/2, though no fewer than 16
    where C/2 is not, and its first convolution has stride 2. Input as the stage's layout says; output (N,
    skips), before the sigmoid.
    """

    def __init__(
        self, channels: int, skips: int, layout: Layout, normalise: bool, light: bool = False
    ) -> None:
        super().__init__()
        self.layout: Layout = layout
        width = max(channels // 2, 1)
        if light:
            width = max(channels // 8, min(width, _FEWEST_CHANNELS))
        if layout == "NLC":
            first, second = nn.Linear(channels, width, bias=False), nn.Linear(width, width, bias=False)
        else:
            first = nn.Conv2d(channels, width, 3, stride=2 if light else 1, padding=1, bias=False)
            second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        inner: Layout = "NLC" if layout == "NLC" else "NCHW"
        norms = [sum_norm(width, inner) if normalise else nn.Identity() for _ in range(2)]
        self.layers = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())
        self.fc = nn.Linear(width, skips)
        for layer in (first, second):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=1e-2 / math.sqrt(width))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc.weight.dtype)
        maps = self.layers(x.permute(0, 3, 1, 2) if self.layout == "NHWC" else x)
        return self.fc(maps.mean(1) if self.layout == "NLC" else maps.mean((2, 3)))


class _StageRun:
    """One use of a stage: the skip weights for the images at hand and the states that have been computed."""

    def __init__(self, stage: Stage, skips: Skips, keeps_join: bool) -> None:
        self.stage = stage
        self.skips = skips
        self.keeps_join = keeps_join
        self.weights = torch.empty(0)
        self.states: list[Tensor] = []

    def touch(self, index: int) -> Touch:
        """What sub-block ``index`` (from 0) computes."""
        sub_block = self.stage.sub_blocks[index]

        def touched(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state = state_in(sub_block, args, kwargs)
            if index == 0:
                self.weights = self.skips.skip_weights(state).to(state.dtype)
                self.states = []
            if index > 0 or not self.stage.projects:
                self.states.append(self._kept(sub_block, state))
            return run_sub_block(
                sub_block, forward, args, kwargs, lambda junction: self._joined(index, junction)
            )

        return touched

    def _kept(self, sub_block: SubBlock, state: Tensor) -> Tensor:
        return state.clone() if sub_block.overwrites_input else state

    def _joined(self, index: int, junction: Junction) -> Tensor:
        if index == 0 and self.stage.projects:
            self.states.append(cast(Tensor, junction.shortcut))
        if index == 0:
            self.states[0] = self.skips.fold(self.states[0])
        first = index * (index + 1) // 2
        skips = self.skips.summed(index, self.weights[:, first : first + index + 1], self.states)
        own = junction.total if self.keeps_join else junction.residual
        return self.skips.fold(own) + skips
