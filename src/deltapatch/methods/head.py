"""Linear probing: a new output layer on the base's own features, nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..anatomy import Anatomy
from ..method import Method, register_method
from ..touching import Touch


@register_method("head")
@dataclass(frozen=True)
class Head(Method):
    """A new head on the frozen base's pooled features; no module inside the base is touched.

    Features of an image are what the base's own classifier is given, in eval mode, pooled over positions.
    """

    site_type: ClassVar[type] = object

    def sites(self, anatomy: Anatomy) -> tuple[Any, ...]:
        return ()

    def part(self, site: Any) -> nn.Module:
        raise TypeError("the head method has no parts")

    def touches(self, site: Any, part: nn.Module) -> Mapping[str, Touch]:
        return {}
