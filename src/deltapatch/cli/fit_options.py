"""How the options of a fit become its configuration; several commands have them."""

from typing import TYPE_CHECKING, Any

from ..errors import DeltapatchError

if TYPE_CHECKING:
    from ..fitting.config import FitConfig


def fit_config(learning_rate: float | None, patience: int, **fields: Any) -> "FitConfig":
    """The configuration of a fit; a learning rate of None is the usual one, and a patience of 0 never ends.

    Raises:
        DeltapatchError: a value is not allowed; the message names the option.
    """
    from pydantic import TypeAdapter, ValidationError

    from ..fitting.config import FitConfig

    fields |= {"patience": patience or None}
    fields |= {} if learning_rate is None else {"learning_rate": learning_rate}
    try:
        return TypeAdapter(FitConfig).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        # What `FitConfig` itself refuses has no location: its message names the field.
        place = "".join(f"--{field}: ".replace("_", "-") for field in first["loc"][:1])
        raise DeltapatchError(place + first["msg"].removeprefix("Value error, ")) from error
