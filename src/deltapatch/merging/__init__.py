"""Several models or patches of one base into one, without loading them all.

Every merge of the folder ``merges`` is a function of this package by its own name:

    >>> from deltapatch import merging
    >>> merging.ties(["birds.safetensors", "cars.safetensors"], "base.safetensors", out="both.safetensors")

"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import merges as _merges

if TYPE_CHECKING:  # for editors; what there is, is what the folder holds
    from .merges.average import average as average
    from .merges.task_arithmetic import task_arithmetic as task_arithmetic

# Name -> file, for what is no merge.
_HOMES = {
    "Merge": "rules",
    "MergeError": "sources",
    "Recipe": "recipe",
    "RunOptions": "running",
    "merge": "running",
    "open_source": "sources",
}

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    """A merge's function, or one of the names above."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _merges.NAMES:
        return getattr(import_module(f".merges.{name}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted((*_HOMES, *_merges.NAMES))
