"""Which base is worth patching: transferability scores and how they are computed, compared and believed.

Every score of the folder ``scores`` is a function of this package by its own name:

    >>> from deltapatch import selection
    >>> selection.logme(features, labels).value

"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import scores as _scores
from .score import Diagnostics, Score, SelectionError
from .statistics import Statistics, sum_of

if TYPE_CHECKING:  # for editors; what there is, is what the folder holds
    from .scores.h_score import h_score as h_score
    from .scores.logme import logme as logme
    from .scores.sfda import sfda as sfda
    from .scores.shrinkage_h_score import shrinkage_h_score as shrinkage_h_score
    from .scores.transrate import transrate as transrate

# Name -> file, for what only some need.
_HOMES: dict[str, str] = {}

__all__ = ["Diagnostics", "Score", "SelectionError", "Statistics", "sum_of"]  # and every score


def __getattr__(name: str) -> Any:
    """A score's function, or one of the names above."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _scores.NAMES:
        return getattr(import_module(f".scores.{name}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted((*__all__, *_scores.NAMES))
