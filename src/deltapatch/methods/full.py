"""Full fine-tuning: a copy of the base for one task, kept as its difference. The upper reference."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

from torch import nn

from ..anatomy import Anatomy
from ..base import Base
from ..differences import DifferencePart, Storage, difference_part, stored_as
from ..layers import Layer
from ..method import Bench, Method, check_modules, register_method
from ..normalising import NormPart
from ..patch import Patch
from ..touching import Touch


@register_method("full")
@dataclass(frozen=True)
class Full(Method):
    """Trains every weight of the base, as θ = θ_0 + difference; the base itself is not touched.

    Attributes:
        modules: from which of the last stages on weights are trained; "all" trains the whole base.
        statistics: of batch normalisation: "own" ones follow the fit, as in ordinary fine-tuning; "kept"
            leaves the base's.
        storage: how the file keeps the differences of matrices and convolutions: in "fp32", in "bf16" (half
            the size), or in "int8" with a scale for each output channel (a quarter). What that loses stands
            in the file as the figure "storage/relative_error".
    """

    modules: int | Literal["all"] = "all"
    statistics: Literal["kept", "own"] = "own"
    storage: Storage = "fp32"

    site_type: ClassVar[type] = Layer
    learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        check_modules(self.modules)

    def sites(self, anatomy: Anatomy) -> tuple[Layer, ...]:
        return anatomy.layers_from(self.modules)

    def part(self, site: Layer) -> nn.Module:
        return difference_part(site, self.statistics, self.storage)

    def initialise(self, site: Layer, part: nn.Module, base: Base) -> None:
        if isinstance(part, NormPart):
            part.start_from(base.submodule(site.path))

    def touches(self, site: Layer, part: nn.Module) -> Mapping[str, Touch]:
        return {site.path: cast(DifferencePart | NormPart, part).touch()}

    def fitted_as(self) -> "Full":
        return replace(self, storage="fp32")

    def finished(self, patch: Patch, base: Base, bench: Bench) -> Patch:
        return patch if self.storage == "fp32" else stored_as(patch, self, base)
