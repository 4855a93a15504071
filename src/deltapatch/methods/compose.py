"""Several methods in one patch: delta with norm, norm with lora, delta with everything trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from ..anatomy import Anatomy
from ..base import Base
from ..errors import AnatomyError, DeltapatchError
from ..joint import Rows
from ..method import Method, make_method, parse_method, register_method
from ..normalising import Gathering
from ..touching import Touch


@dataclass(frozen=True)
class Member:
    """A site of one of the methods.

    Attributes:
        method: which of them, from 0.
        site: as that method describes it.
    """

    method: int
    site: Any


@register_method("compose")
@dataclass(frozen=True)
class Compose(Method):
    """Every method's parameters train at once, and one file holds them all.

    Where two methods touch one module, the first one acts around the second. Two that change the weights of
    one layer cannot be composed.

    Attributes:
        methods: the methods, each with options where wanted: ``("delta:modules=1", "norm:statistics=own")``.
    """

    methods: tuple[str, ...] = ("delta:modules=1", "norm")

    site_type: ClassVar[type] = Member

    def __post_init__(self) -> None:
        if len(self.methods) < 2:
            raise DeltapatchError(f"compose takes two methods or more, not {len(self.methods)}")
        for text, member in zip(self.methods, self.members, strict=True):
            if isinstance(member, Compose) or member.fitted_as() != member or member.shares_weights:
                raise DeltapatchError(f"'{text}' cannot be composed with other methods; fit it alone")

    @classmethod
    def sizes(cls) -> tuple[Method, ...]:
        return cls(), cls(("delta:modules=1", "lora"))

    @cached_property
    def members(self) -> tuple[Method, ...]:
        """The methods themselves."""
        return tuple(make_method(*parse_method(text)) for text in self.methods)

    def sites(self, anatomy: Anatomy) -> tuple[Member, ...]:
        found = tuple(
            Member(index, site) for index, method in enumerate(self.members) for site in method.sites(anatomy)
        )
        if not found:
            raise AnatomyError(f"none of {', '.join(self.methods)} touches anything in this base")
        return found

    def site_from(self, values: Mapping[str, Any]) -> Member:
        index = int(values["method"])
        if not 0 <= index < len(self.members):
            raise DeltapatchError(f"a site names method {index}, but there are {len(self.members)}")
        return Member(index, self.members[index].site_from(values["site"]))

    def part(self, site: Member) -> nn.Module:
        return self.members[site.method].part(site.site)

    def initialise(self, site: Member, part: nn.Module, base: Base) -> None:
        self.members[site.method].initialise(site.site, part, base)

    def touches(self, site: Member, part: nn.Module) -> Mapping[str, Touch]:
        return self.members[site.method].touches(site.site, part)

    def joint_part(self, site: Member, parts: Sequence[nn.Module], rows: Rows) -> Any:
        return self.members[site.method].joint_part(site.site, parts, rows)

    def gathering(self) -> Gathering | None:
        wanted = (method.gathering() for method in self.members)
        return next((gathering for gathering in wanted if gathering is not None), None)

    def learning_rate_of(self, site: Member) -> float:
        return self.members[site.method].learning_rate_of(site.site)
