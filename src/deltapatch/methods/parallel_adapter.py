"""Parallel residual adapters: a 1x1 convolution beside every 3x3 convolution (arXiv 1803.10082)."""

from dataclasses import dataclass

from torch import Tensor

from ..layers import Layer
from ..method import register_method
from ._residual_adapter import Adapter, AdapterPart, ResidualAdapter


@register_method("parallel-adapter")
@dataclass(frozen=True)
class ParallelAdapter(ResidualAdapter):
    """Beside each 3x3 convolution W a 1x1 convolution A of the same stride, and the task's own norms::

        y = N_t( W * x + A * x )

    Until the norm that is one convolution, whose centre tap is W[:, :, 1, 1] + A (where W is not grouped and
    pads both sides alike). A has C_in · C_out parameters, a ninth of W; also where W is depthwise, so that
    for networks of depthwise convolutions a patch can be larger than its base.
    Source: Rebuffi, Bilen, Vedaldi, CVPR 2018.

    Attributes:
        modules: from which of the last stages on layers are adapted; "all" adapts those of the whole base.
        kernel_size: of the convolutions that get an adapter (7 for ConvNeXt).
        statistics: of the norms that keep them: the task's "own", followed batch by batch during the fit as
            published; "re-estimated" once on the training images before it; or "kept" as in the
            base. All norms' scale and shift train, from the base's on.
        init: of A: "zero", so that a patch starts exactly at the base, or as "published" N(0, 2 / C_out),
            which starts far from it.
        dropout: share of the adapters' input channels that are zero in a training step; the source has 0.5
            as an option.
    """

    def adapter(self, site: Layer) -> "ParallelPart":
        assert site.grid is not None
        return ParallelPart(
            Adapter(site.in_channels, site.out_channels, site.grid.stride, self.init, self.dropout)
        )


class ParallelPart(AdapterPart):
    """A, beside a convolution."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def adapted(self, x: Tensor, z: Tensor) -> Tensor:
        return z + self.adapter(x)
