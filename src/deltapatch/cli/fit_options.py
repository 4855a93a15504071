"""How options become configurations; several commands have those of a fit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import DeltapatchError

if TYPE_CHECKING:
    from ..fitting.config import FitConfig

_Config = TypeVar("_Config")

LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", "--lr", help="Left out: the method's own.", show_default=False),
]
AugmentName = Annotated[str, typer.Option(help="none, flip, crop or standard.")]
Views = Annotated[
    int | None,
    typer.Option(help="Fixed versions of each image to augment with; 1: none.", show_default=False),
]
CacheUse = Annotated[str, typer.Option(help="Keep trunk activations on disk: auto, on or off.")]
Balance = Annotated[bool, typer.Option(help="Weigh rare classes up.")]
Patience = Annotated[int, typer.Option(help="Stop after so many epochs without gain; 0: never.")]
PrecisionName = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
ValidationShare = Annotated[float, typer.Option(help="Share held out where there is no validation split.")]


def fit_config(patience: int, **fields: Any) -> "FitConfig":
    """The configuration of a fit; a patience of 0 never ends it early.

    Raises:
        DeltapatchError: a value is not allowed; the message names the option.
    """
    from ..fitting.config import FitConfig

    return checked(FitConfig, {**fields, "patience": patience or None}, {})


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
