"""What a patch may own of a normalisation layer of any kind: scale, shift and statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .exchange import Exchange
from .layers import STATISTICS, Layer

Statistics = Literal["kept", "re-estimated", "own"]
"""The base's; gathered on the task's images before the fit; or followed during the fit, as in training."""

AFFINE = ("weight", "bias")


class NormPart(nn.Module):
    """A patch's own tensors for one normalisation layer, which takes them in place of the base's.

    Attributes:
        has_statistics: whether it owns statistics.
        follows: whether they follow the batches in train mode.
        momentum: while statistics are gathered from images, the weight of the batch at hand; else None.
    """

    def __init__(self, layer: Layer, affine: bool, statistics: Statistics) -> None:
        super().__init__()
        self.has_statistics = statistics != "kept" and layer.has_statistics
        self.follows = statistics == "own" and self.has_statistics
        self.momentum: float | None = None
        for name in AFFINE if affine else ():
            own = layer.tensor(name)
            if own is not None:
                self.register_parameter(name, nn.Parameter(torch.ones(own.shape)))
        for name in STATISTICS if self.has_statistics else ():
            self.register_buffer(name, torch.zeros(layer.out_channels))

    @torch.no_grad()
    def start_from(self, module: nn.Module) -> None:
        """Takes over what the base's layer has."""
        for name, tensor in self.tensors().items():
            tensor.copy_(cast(Tensor, getattr(module, name)))

    def tensors(self) -> Mapping[str, Tensor]:
        """Name in the layer -> tensor."""
        return cast(Mapping[str, Tensor], {**self._parameters, **self._buffers})

    def touch(self, alpha: float = 1.0, statistics: float = 1.0) -> Exchange:
        """What the layer computes while the patch is active.

        Args:
            alpha: how far scale and shift are on the way from the base's to the patch's.
            statistics: the same for the statistics, unless they follow the images at hand.
        """
        changes = self.momentum is not None or (self.training and self.follows)
        place = partial(self._in_place_of, alpha, None if changes else statistics)
        return Exchange(place, changes, self.momentum)

    def _in_place_of(self, alpha: float, statistics: float | None, module: nn.Module) -> Mapping[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, mine in self.tensors().items():
            share = statistics if name in STATISTICS else alpha
            own = cast(Tensor, getattr(module, name))
            # Statistics that follow must not be a copy; others are as precise as the base is.
            tensors[name] = mine if share is None else _on_the_way(own, mine.to(own.dtype), share)
        counter = module._buffers.get("num_batches_tracked")
        if counter is not None:
            # Counted up in train mode; the base's own must not be.
            tensors["num_batches_tracked"] = torch.zeros_like(counter)
        return tensors


def _on_the_way(start: Tensor, end: Tensor, share: float) -> Tensor:
    return end if share == 1 else torch.lerp(start, end, share)


@dataclass(frozen=True)
class Gathering:
    """How statistics are gathered from unlabelled images, without a gradient, before a patch is fitted.

    Attributes:
        images: how many images are looked at, one a step in many random versions; None looks at all of them
            once, as they are, in batches.
        copies: random versions of the one image of a step.
        momentum: p_0 of the decaying momentum; see `weight`.
        decay: its factor ω from step to step.
        floor: ζ, the smallest weight of a batch.
    """

    images: int | None = None
    copies: int = 1
    momentum: float = 0.1
    decay: float = 0.94
    floor: float = 0.005

    def weight(self, step: int, seen: int, count: int) -> float:
        """The weight of a batch in the running statistics.

        With all images the cumulative average, count / (seen + count); otherwise p_0 ω^step + ζ.

        Args:
            step: number of the batch, from 1.
            seen: images before it.
            count: images in it.
        """
        if self.images is None:
            return count / (seen + count)
        return self.momentum * self.decay**step + self.floor
