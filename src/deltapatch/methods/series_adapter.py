"""Series residual adapters: a 1x1 convolution behind every 3x3 convolution (arXiv 1705.08045)."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..layers import Layer
from ..method import register_method
from ._residual_adapter import Adapter, AdapterPart, ResidualAdapter


@register_method("series-adapter")
@dataclass(frozen=True)
class SeriesAdapter(ResidualAdapter):
    """Behind each 3x3 convolution W a 1x1 convolution A with a shortcut, and the task's own norms::

        z = W * x        u = z + A * BN(z)        y = N_t( u )

    BN is the adapter's own batch normalisation, which is not in the base; N_t are the base's norms with the
    task's values. With BN the identity, z and A are one convolution with the weight (I + A) W. A has C_out²
    parameters and BN 2 · C_out.
    Source: Rebuffi, Bilen, Vedaldi, NeurIPS 2017 and CVPR 2018.

    Attributes:
        modules: from which of the last stages on layers are adapted; "all" adapts those of the whole base.
        kernel_size: of the convolutions that get an adapter (7 for ConvNeXt).
        statistics: of the base's norms that keep them: the task's "own", followed batch by batch during the
            fit as published; "re-estimated" once on the training images before it; or "kept" as in the
            base. All norms' scale and shift train, from the base's on.
        init: of A: "zero", so that a patch starts exactly at the base, or as "published" N(0, 2 / C_out),
            which starts far from it.
        dropout: share of the adapters' input channels that are zero in a training step.
    """

    def adapter(self, site: Layer) -> "SeriesPart":
        channels = site.out_channels
        return SeriesPart(
            nn.BatchNorm2d(channels), Adapter(channels, channels, (1, 1), self.init, self.dropout)
        )


class SeriesPart(AdapterPart):
    """BN and A, behind a convolution."""

    def __init__(self, norm: nn.BatchNorm2d, adapter: Adapter) -> None:
        super().__init__()
        self.norm = norm
        self.adapter = adapter

    def adapted(self, x: Tensor, z: Tensor) -> Tensor:
        normalised = self.norm(z.to(cast(Tensor, self.norm.weight).dtype))
        return z + self.adapter(normalised).to(z.dtype)
