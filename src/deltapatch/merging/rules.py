"""What a merge is: a small configuration, and a rule for one part of one tensor at a time."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from .inputs import Inputs
from .sources import MergeError


@dataclass(frozen=True)
class Chunk:
    """A part of one tensor in all models, in fp32 (fp64 where the models are).

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: the number of the part's first element in the whole tensor, in row-major order.
        models: the part in each model, shape (n,) each; never to be written to.
        base: the same of the base; None where the merge was given none.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    models: tuple[Tensor, ...]
    base: Tensor | None

    @cached_property
    def deltas(self) -> tuple[Tensor, ...]:
        """What each model adds to the base."""
        assert self.base is not None
        return tuple(model - self.base for model in self.models)


Rule = Callable[[Chunk], Tensor]
"""The merged values of a chunk, shape (n,), from nothing but the chunk: called from any thread, in any order,
for parts of any length."""


class Merge(ABC):
    """A kind of merge. Subclasses are frozen dataclasses with plain fields, each in a file of ``merges``."""

    # For options out of recipes, which are read strictly by the fields' types.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    name: ClassVar[str]
    needs_base: ClassVar[bool] = True
    title: ClassVar[str] = ""

    @abstractmethod
    def rule(self, inputs: Inputs) -> Rule:
        """The rule for these inputs. What has to be known of whole models first, such as a threshold over all
        of their values, is found here, in passes of ``inputs.over_chunks``.

        Raises:
            MergeError: the models or options do not suit the merge.
        """

    def whole(self, inputs: Inputs, name: str) -> bool:
        """Whether a tensor has to be given to the rule in one piece, as one that is solved for has to."""
        del inputs, name
        return False

    def options(self) -> dict[str, Any]:
        """The configuration as plain values, as recipes store it."""
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]


_M = TypeVar("_M", bound=type[Merge])
_MERGES: dict[str, type[Merge]] = {}


def register_merge(cls: _M) -> _M:
    """Makes a merge known by its name."""
    _MERGES[cls.name] = cls
    return cls


def registered_merges() -> Mapping[str, type[Merge]]:
    """Every merge by name."""
    from . import merges  # the files register themselves

    assert merges is not None
    return dict(sorted(_MERGES.items()))


def make_merge(name: str, options: Mapping[str, Any]) -> Merge:
    """A merge from its name and plain options, as a recipe has them.

    Raises:
        MergeError: there is no such merge or option.
    """
    known = registered_merges()
    if name not in known:
        raise MergeError(f"there is no merge '{name}'; choose one of {', '.join(known)}")
    fields = {one.name for one in dataclasses.fields(known[name])}  # pyright: ignore[reportArgumentType]
    unknown = [option for option in options if option not in fields]
    if unknown:
        choices = ", ".join(sorted(fields)) or "none"
        raise MergeError(f"{name} has no option '{unknown[0]}'; it has {choices}")
    try:
        return TypeAdapter(known[name]).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # the merge's own words
            raise MergeError(str(first["ctx"]["error"])) from error  # pyright: ignore[reportTypedDictNotRequiredAccess]
        place = ".".join(map(str, first["loc"])) or "its options"
        raise MergeError(f"{name}: {place}: {first['msg']}; see docs/merging.md") from error
