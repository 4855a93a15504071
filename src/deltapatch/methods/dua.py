"""BatchNormAdapt: the statistics of batch normalisation follow the task's images, without labels (DUA)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from torch import nn

from ..anatomy import Anatomy
from ..base import Base
from ..errors import AnatomyError, DeltapatchError
from ..layers import Layer
from ..method import Method, register_method
from ..normalising import Gathering, NormPart
from ..touching import Touch


@register_method("dua")
@dataclass(frozen=True)
class BatchNormAdapt(Method):
    """Only the running mean and variance of batch normalisation move; then a head is solved on the features.

    For each of ``images`` unlabelled training images, a batch of ``copies`` random versions of it runs with
    the norms in train mode, where the k-th batch has the weight m_k = momentum · decay^k + floor::

        μ <- (1 - m_k) μ + m_k μ_batch        v <- (1 - m_k) v + m_k v_batch

    Source: Mirza et al., CVPR 2022 ("The Norm Must Go On"). Its source picks the best step on test labels;
    here all steps are taken. That a patch holds the statistics of one task is our reading of it.

    Attributes:
        images: how many images are looked at, one a step; "all" takes the average over all training images
            as they are instead, in batches.
        copies: random crops, flips and quarter turns of the image in a step.
        momentum: p_0.
        decay: ω.
        floor: ζ.
    """

    images: int | Literal["all"] = 80
    copies: int = 64
    momentum: float = 0.1
    decay: float = 0.94
    floor: float = 0.005

    site_type: ClassVar[type] = Layer

    def __post_init__(self) -> None:
        if self.images != "all" and self.images < 1:
            raise DeltapatchError(f"images must be 1 or more, or 'all', not {self.images!r}")
        if self.copies < 2:
            raise DeltapatchError(f"copies must be 2 or more, not {self.copies}: one has no variance")
        for field in ("momentum", "decay", "floor"):
            if not 0 <= getattr(self, field) <= 1:
                raise DeltapatchError(f"{field} must be between 0 and 1, not {getattr(self, field)}")

    def sites(self, anatomy: Anatomy) -> tuple[Layer, ...]:
        found = tuple(layer for layer in anatomy.layers_from("all") if layer.has_statistics)
        if not found:
            raise AnatomyError(
                "this base keeps no batch statistics (its norms are of another kind), so the dua method has"
                " nothing to adapt; the norm method trains scale and shift of every kind of norm"
            )
        return found

    def part(self, site: Layer) -> NormPart:
        return NormPart(site, affine=False, statistics="re-estimated")

    def initialise(self, site: Layer, part: nn.Module, base: Base) -> None:
        cast(NormPart, part).start_from(base.submodule(site.path))

    def gathering(self) -> Gathering:
        images = None if self.images == "all" else self.images
        return Gathering(images, self.copies, self.momentum, self.decay, self.floor)

    def touches(self, site: Layer, part: nn.Module) -> Mapping[str, Touch]:
        return {site.path: cast(NormPart, part).touch()}
