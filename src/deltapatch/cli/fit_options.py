"""How options become configurations; several commands have those of a fit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DeltapatchError

if TYPE_CHECKING:
    from ..fitting.config import FitConfig

_Config = TypeVar("_Config")


def fit_config(learning_rate: float | None, patience: int, **fields: Any) -> "FitConfig":
    """The configuration of a fit; a learning rate of None is the usual one, and a patience of 0 never ends.

    Raises:
        DeltapatchError: a value is not allowed; the message names the option.
    """
    from ..fitting.config import FitConfig

    fields |= {"patience": patience or None}
    fields |= {} if learning_rate is None else {"learning_rate": learning_rate}
    return checked(FitConfig, fields, {})


def checked(kind: type[_Config], fields: Mapping[str, Any], options: Mapping[str, str]) -> _Config:
    """A configuration from what the command line says.

    Args:
        kind: its class.
        fields: name and value.
        options: field -> what its option is called, where it is not called as the field is.

    Raises:
        DeltapatchError: a value is not allowed; the message names the option.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        # What the class itself refuses has no location: its message names the field.
        field = next((str(part) for part in first["loc"]), "")
        option = options.get(field, f"--{field}".replace("_", "-"))
        message = first["msg"].removeprefix("Value error, ")
        raise DeltapatchError(f"{option}: {message}" if field else message) from error
