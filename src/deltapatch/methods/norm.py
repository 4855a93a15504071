"""Norm adaptation: the scale and shift of the normalisation layers, and where wanted their statistics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import nn

from ..anatomy import Anatomy
from ..base import Base
from ..errors import AnatomyError
from ..layers import Layer
from ..method import Method, check_modules, register_method
from ..normalising import AFFINE, Gathering, NormPart, Statistics
from ..touching import Touch


@register_method("norm")
@dataclass(frozen=True)
class Norm(Method):
    """Trains γ and β of y = γ (x - μ) / √(v + ε) + β, in normalisation layers of every kind.

    A patch starts with the base's own γ and β, so that with kept statistics it starts exactly at the base.
    Source: Frankle, Schwab, Morcos, ICLR 2021 (arXiv 2003.00152), there on random features.

    Attributes:
        modules: from which of the last stages on layers are trained; "all" trains those of the whole base.
        statistics: μ and v of layers that keep them (batch normalisation): "kept" as in the base,
            "re-estimated" once on the task's training images before the fit, or "own": followed batch by
            batch during the fit, as in ordinary training. Those that are not kept are in the patch.
        gain: where γ and β start: "base" at the base's own; "uniform" with γ from U(0, 1) and β = 0, as in
            the source, for a base whose weights are random (with ``statistics="own"``).
    """

    modules: int | Literal["all"] = "all"
    statistics: Statistics = "kept"
    gain: Literal["base", "uniform"] = "base"

    site_type: ClassVar[type] = Layer

    def __post_init__(self) -> None:
        check_modules(self.modules)

    @classmethod
    def sizes(cls) -> tuple[Method, ...]:
        return cls(modules=1), cls(), cls(statistics="own")

    def sites(self, anatomy: Anatomy) -> tuple[Layer, ...]:
        layers = anatomy.layers_from(self.modules)
        found = tuple(layer for layer in layers if layer.kind == "normalisation")
        if not found:
            raise AnatomyError(
                "this base has no normalisation layer with parameters there, so the norm method has"
                " nothing to train; use another method"
            )
        return found

    def part(self, site: Layer) -> NormPart:
        part = NormPart(site, affine=True, statistics=self.statistics)
        gain = part.tensors().get("weight")
        if self.gain == "uniform" and gain is not None:
            # Here and not in `initialise`: parts are drawn under the seed of the patch.
            nn.init.uniform_(gain)
        return part

    @torch.no_grad()
    def initialise(self, site: Layer, part: nn.Module, base: Base) -> None:
        own = cast(NormPart, part)
        drawn = {name: tensor.clone() for name, tensor in own.tensors().items() if name in AFFINE}
        own.start_from(base.submodule(site.path))
        if self.gain == "uniform":
            for name, tensor in drawn.items():
                own.tensors()[name].copy_(tensor if name == "weight" else torch.zeros_like(tensor))

    def gathering(self) -> Gathering | None:
        return Gathering() if self.statistics == "re-estimated" else None

    def touches(self, site: Layer, part: nn.Module) -> Mapping[str, Touch]:
        return {site.path: cast(NormPart, part).touch()}
