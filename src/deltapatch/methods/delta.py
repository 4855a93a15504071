"""Δ-Networks: input-conditioned skip connections between all sub-blocks of a stage (arXiv 2303.14772)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Layout, Stage
from ..errors import DeltapatchError
from ..joint import Rows
from ..method import Method, check_modules, register_method
from ..skipping import DeltaModule, existing_skips, skip_touches, sum_norm, weighted_sum
from ..touching import Touch

_SURE = 4.0
"""A weight of sigmoid(±4), 0.982 or 0.018: as good as present or absent, and still with a gradient."""


@register_method("delta")
@dataclass(frozen=True)
class Delta(Method):
    """Skip connections from every earlier state of a stage into every join, weighted by a small Δ-module.

    For a stage with input x, sub-blocks 1..n, residual branches F_i and projected input f_0 (section 2, eq.
    4)::

        f_i = act( F_i(f_{i-1}) + N_i( Σ_{j<i} a_ij(x) f_j ) ),      a(x) = sigmoid(Δ(x)) ∈ (0, 1)^{n(n+1)/2}

    and with the start ``zero-gain`` the base's own join stays as it is::

        f_i = act( F_i(f_{i-1}) + f_{i-1} + g_i ⊙ N_i( Σ_{j<i} a_ij(x) f_j ) + b_i ),      g_i = b_i = 0 at
        the start

    Attributes:
        modules: how many stages get a Δ-module, counted from the last; or "all".
        norm: where normalisation stands: "module" inside the Δ-module (as counted in the paper), "sum" on
        each
            summed skip (the "+BN" of table 8), or "both". The start "zero-gain" needs it on the sums.
        module: which Δ-module: "published", or "light" with an eighth of the channels at half the
            resolution, which is as accurate (docs/methods.md) and costs a fifth of the parameters and a
            twentieth of the multiply-adds.
        start: "plain" as published, all weights near 0.5; "identity": the base's own skips start near 1 and
        the
            new ones near 0; "zero-gain": the patched network starts exactly as the base.
    """

    modules: int | Literal["all"] = "all"
    norm: Literal["module", "sum", "both"] = "both"
    start: Literal["plain", "identity", "zero-gain"] = "zero-gain"
    module: Literal["published", "light"] = "light"

    # Files from before there was a choice.
    absent: ClassVar[Mapping[str, Any]] = {"module": "published"}
    site_type: ClassVar[type] = Stage

    def __post_init__(self) -> None:
        check_modules(self.modules)
        if self.start == "zero-gain" and self.norm == "module":
            raise DeltapatchError(
                "start='zero-gain' scales the normalised sums, so norm must be 'sum' or 'both'"
            )

    @classmethod
    def sizes(cls) -> tuple[Method, ...]:
        return cls(modules=1), cls()

    def sites(self, anatomy: Anatomy) -> tuple[Stage, ...]:
        return anatomy.last_stages(self.modules)

    def part(self, site: Stage) -> nn.Module:
        return StagePart(site, self)

    def delta_module(self, stage: Stage) -> nn.Module:
        """Δ(x): the stage's input -> one number for each skip, of shape (N, skips), before the sigmoid."""
        normalise, light = self.norm != "sum", self.module == "light"
        return DeltaModule(stage.in_channels, stage.skips, stage.layout, normalise, light)

    def joint_part(self, site: Stage, parts: Sequence[nn.Module], rows: Rows) -> "JointStagePart":
        return JointStagePart(cast(Sequence[StagePart], parts), site.layout, rows)

    def touches(self, site: Stage, part: "nn.Module | JointStagePart") -> Mapping[str, Touch]:
        return skip_touches(site, cast(StagePart | JointStagePart, part), self.start == "zero-gain")


class StagePart(nn.Module):
    """What a patch owns for one stage: the Δ-module and, where wanted, a normalisation for each summed
    skip.
    """

    def __init__(self, stage: Stage, config: Delta) -> None:
        super().__init__()
        self.stage = stage
        self.delta = config.delta_module(stage)
        self.sum_norms = nn.ModuleList()
        if config.norm != "module":
            self.sum_norms.extend(sum_norm(stage.channels, stage.layout) for _ in stage.sub_blocks)
        if config.start == "zero-gain":
            for norm in self.sum_norms:
                nn.init.zeros_(cast(Tensor, norm.weight))
        if config.start == "identity":
            existing = existing_skips(stage)
            with torch.no_grad():
                cast(nn.Linear, self.delta.get_submodule("fc")).bias.copy_(
                    torch.where(existing, _SURE, -_SURE)
                )

    def skip_weights(self, x: Tensor) -> Tensor:
        """a(x) in (0, 1), of shape (N, skips)."""
        return torch.sigmoid(self.delta(x))

    def summed(self, index: int, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """N_i( Σ_j a_ij f_j ) for sub-block ``index``, with its gain and shift.

        Args:
            index: of the sub-block, from 0.
            weights: a_ij, of shape (N, len(states)).
            states: f_0 ... f_{i-1}.
        """
        total = weighted_sum(weights, states)
        if not self.sum_norms:
            return total
        norm = self.sum_norms[index]
        return norm(total.to(cast(Tensor, norm.weight).dtype)).to(total.dtype)

    def fold(self, tensor: Tensor) -> Tensor:
        """The tensor itself: one patch has the rows that the base has."""
        return tensor


class JointStagePart:
    """The parts of many patches for one stage, each acting on its own rows of the batch; in eval mode."""

    def __init__(self, parts: Sequence[StagePart], layout: Layout, rows: Rows) -> None:
        self.parts = parts
        self.layout: Layout = layout
        self.rows = rows

    def skip_weights(self, x: Tensor) -> Tensor:
        """Each patch's a(x) for its own rows, of shape (rows, skips)."""
        return torch.sigmoid(self.rows.each([part.delta for part in self.parts], x))

    def summed(self, index: int, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """As `StagePart.summed`, with each row's own weights, gain and shift; the states are folded.

        In eval mode batch normalisation is a scale and a shift for each channel: the scale goes into the
        weights, so that the states are read once.
        """
        if not self.parts[0].sum_norms:
            return self._weighted(weights, states)
        norms = [part.sum_norms[index] for part in self.parts]
        if isinstance(norms[0], nn.LayerNorm):
            total = self._weighted(weights, states)
            plain = nn.functional.layer_norm(total, norms[0].normalized_shape, eps=norms[0].eps)
            scale, shift = (self._per_channel(norms, name) for name in ("weight", "bias"))
            return torch.addcmul(shift, plain, scale).to(total.dtype)
        scale, shift = zip(*(_scale_and_shift(norm) for norm in norms), strict=True)
        scales = self.rows.spread(torch.stack(scale))
        joined = self._weighted(weights[:, :, None] * scales[:, None], states)
        return joined.add_(self._on_channels(self.rows.spread(torch.stack(shift))).to(joined.dtype))

    def fold(self, tensor: Tensor) -> Tensor:
        """The tensor with a row for each patch and image."""
        return self.rows.fold(tensor)

    def _weighted(self, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Σ_j w_j f_j, with w of shape (rows, states) or (rows, states, channels)."""
        factors = weights if weights.ndim == 3 else weights[:, :, None]
        factors = factors.to(states[0].dtype)
        total = self._on_channels(factors[:, 0]) * states[0]
        for source in range(1, len(states)):
            total = total.addcmul_(self._on_channels(factors[:, source]), states[source])
        return total

    def _per_channel(self, norms: Sequence[nn.Module], name: str) -> Tensor:
        values = torch.stack([cast(Tensor, getattr(norm, name)) for norm in norms])
        return self._on_channels(self.rows.spread(values))

    def _on_channels(self, values: Tensor) -> Tensor:
        """Shape (rows, channels or 1) -> the same with axes for the positions."""
        if self.layout == "NCHW":
            return values[:, :, None, None]
        return values[:, None, None] if self.layout == "NHWC" else values[:, None]


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Batch normalisation in eval mode as y = scale · x + shift, each of shape (channels,)."""
    batch_norm = cast(nn.BatchNorm2d, norm)
    mean, variance = cast(Tensor, batch_norm.running_mean), cast(Tensor, batch_norm.running_var)
    scale = batch_norm.weight * torch.rsqrt(variance + batch_norm.eps)
    return scale, batch_norm.bias - mean * scale
