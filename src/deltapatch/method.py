"""What a patch method is: one frozen configuration, the sites it touches, the parameters it owns, what it
computes.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import nn

from .anatomy import Anatomy
from .errors import DeltapatchError
from .joint import Rows
from .normalising import Gathering
from .touching import Touch

if TYPE_CHECKING:
    from .base import Base
    from .patch import Patch


class Method(ABC):
    """A kind of patch. A subclass is a frozen dataclass of plain values, registered with `register_method`.

    `site_type` is a frozen dataclass of plain values too: sites are stored in the patch file, so that a
    patch can be built again without its base, and compared with the base's anatomy when it is added to one.
    `absent` gives the values of options that files lack because they were written before there was such an
    option. `learning_rate` is what a fit uses where its configuration names none. `shares_weights` is True
    for methods that change the weights with which the base answers for its own task, too.
    """

    name: ClassVar[str]
    site_type: ClassVar[type]
    absent: ClassVar[Mapping[str, Any]] = {}
    learning_rate: ClassVar[float] = 3e-3
    shares_weights: ClassVar[bool] = False

    @abstractmethod
    def sites(self, anatomy: Anatomy) -> tuple[Any, ...]:
        """The places of a base that this method touches, in a fixed order.

        Raises:
            AnatomyError: the base has no such places.
        """

    @abstractmethod
    def part(self, site: Any) -> nn.Module:
        """New parameters for one site: exactly what trains there and exactly what the file holds."""

    @abstractmethod
    def touches(self, site: Any, part: nn.Module) -> Mapping[str, Touch]:
        """Module name -> what it computes while the patch is active. Made anew for each call, so it may
        keep state.
        """

    def initialise(self, site: Any, part: nn.Module, base: "Base") -> None:  # noqa: B027
        """Gives a new part those starting values that come from the base; by default there are none."""

    def site_from(self, values: Mapping[str, Any]) -> Any:
        """The site that a patch file describes.

        Raises:
            ValidationError: there is no such site.
        """
        adapter: TypeAdapter[Any] = TypeAdapter(self.site_type)
        return adapter.validate_python(values)

    def gathering(self) -> Gathering | None:
        """How the statistics of its `NormPart` parts are gathered before the fit; None if they are not."""
        return None

    def fitted_as(self) -> "Method":
        """The method that a fit trains: another one where `finished` turns its patch into one of this."""
        return self

    def finished(self, patch: "Patch", base: "Base", bench: "Bench") -> "Patch":
        """The patch of this method that a fitted patch of `fitted_as` becomes.

        Args:
            patch: in eval mode, with the parameters of its best epoch.
            base: its base.
            bench: the task's images, as far as a method may look at them.
        """
        return patch

    def starting_head(self, base: "Base", classes: Sequence[str]) -> nn.Linear | None:
        """The head that a fit starts from, where it is not to be solved on the base's features."""
        return None

    def learning_rate_of(self, site: Any) -> float:
        """What the parameters of one site are fitted with where the configuration of the fit names none."""
        return self.learning_rate

    def joint_part(self, site: Any, parts: Sequence[nn.Module], rows: Rows) -> Any:
        """What `touches` is given in place of a part when many patches answer at once, each for its own rows.

        Its touches get and return batches whose rows are laid out as ``rows`` says. None, the default, means
        that patches of this method run one after the other.

        Args:
            site: the site that all of them touch.
            parts: each patch's part for it, in eval mode.
            rows: whose the rows are.
        """
        return None

    def build(self, base: "Base", classes: Sequence[str] = (), seed: int | None = None) -> "Patch":
        """A new, unfitted patch of this method for a base; without ``classes`` it has no head.

        ``seed`` makes the starting parameters the same every time; the caller's random state is left as it
        was.
        """
        from .patch import Patch

        return Patch.build(self, base, classes, seed=seed)

    @classmethod
    def sizes(cls) -> "tuple[Method, ...]":
        """The configurations that a search over methods tries, small ones first; the default one alone
        unless a method has several, and none for an experiment.
        """
        return (cls(),)

    def configuration(self) -> dict[str, Any]:
        """The configuration as plain values, for the patch file."""
        return asdict(self)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Judgement:
    """Validation accuracies of one patch, from 0 to 1.

    Attributes:
        task: on the patch's own task.
        supporting: of the base on its own task while the patch is active; None where there are no images.
    """

    task: float
    supporting: float | None


class Bench(Protocol):
    """What a method may ask about a patch once it is fitted."""

    def judge(self, patch: "Patch") -> Judgement | None:
        """How good a patch is on the validation images; None if there are none."""
        ...

    def gather(self, patch: "Patch", gathering: Gathering) -> None:
        """Gathers the statistics of the patch's norms on the training and the supporting images."""
        ...


def check_modules(modules: int | Literal["all"]) -> None:
    """Raises DeltapatchError unless it is a number of stages or "all"."""
    if modules != "all" and modules < 1:
        raise DeltapatchError(f"modules must be 1 or more stages or 'all', not {modules!r}")


_AnyMethod = TypeVar("_AnyMethod", bound=type[Method])
_registry: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[_AnyMethod], _AnyMethod]:
    """Class decorator: makes a method known by ``name`` to the command line and to patch files."""

    def register(cls: _AnyMethod) -> _AnyMethod:
        cls.name = name
        _registry[name] = cls
        return cls

    return register


def registered_methods() -> Mapping[str, type[Method]]:
    """Name -> class of every method: those in `deltapatch.methods` and those registered by others."""
    from importlib import import_module

    import_module("deltapatch.methods")
    return dict(sorted(_registry.items()))


def make_method(name: str, configuration: Mapping[str, Any] | None = None) -> Method:
    """The method of that name with a configuration of plain values, checked field by field.

    Raises:
        DeltapatchError: the name or a field is not known, or a value is not allowed.
    """
    methods = registered_methods()
    if name not in methods:
        raise DeltapatchError(f"there is no method '{name}'; known methods are: {', '.join(methods)}")
    cls = methods[name]
    unknown = set(configuration or {}) - set(_options(cls))
    if unknown:
        raise DeltapatchError(
            f"method '{name}' has no option '{min(unknown)}'; it has: {', '.join(_options(cls)) or 'none'}"
        )
    try:
        return TypeAdapter(cls).validate_python(dict(configuration or {}))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if not field:
            raise DeltapatchError(f"method '{name}': {first['msg'].removeprefix('Value error, ')}") from error
        if first["type"] == "tuple_type":
            raise DeltapatchError(
                f'method \'{name}\': {field} takes a list, as in {field}=["a","b"], not {first["input"]!r}'
            ) from error
        raise DeltapatchError(f"method '{name}': {field}: {first['msg']} (was {first['input']!r})") from error


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """``delta:modules=1+start=plain`` -> name and configuration, for `make_method`.

    Raises:
        DeltapatchError: an option is not of the form KEY=VALUE.
    """
    name, _, options = text.partition(":")
    return name, dict(parse_option(option) for option in options.split("+") if option)


def parse_option(text: str) -> tuple[str, Any]:
    """``modules=1`` -> ("modules", 1): true, 3, 0.5 and the like as what they are, anything else as text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise DeltapatchError(f"method option '{text}' is not of the form KEY=VALUE")
    try:
        return key.replace("-", "_"), json.loads(value)
    except ValueError:
        return key.replace("-", "_"), value


def method_of_file(name: str, configuration: Mapping[str, Any]) -> Method:
    """As `make_method`, for a configuration that may be older than some of the method's options."""
    known = registered_methods().get(name)
    return make_method(name, {**({} if known is None else known.absent), **configuration})


def _options(cls: type[Method]) -> list[str]:
    return [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
