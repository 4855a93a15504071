"""deltapatch: patch a frozen vision model to new tasks; its own answers stay bit-identical."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import methods
    from .base import Base
    from .errors import DeltapatchError
    from .evaluation.comparing.comparison import compare
    from .evaluation.comparing.halving import choose_method
    from .fitting.fit import FitConfig, fit
    from .loading import load_base
    from .patch import Patch
    from .patched import PatchedModel
    from .selection.ranking.rank_bases import rank

_HOMES = {
    "Base": "base",
    "DeltapatchError": "errors",
    "FitConfig": "fitting.fit",
    "Patch": "patch",
    "PatchedModel": "patched",
    "choose_method": "evaluation.comparing.halving",
    "compare": "evaluation.comparing.comparison",
    "fit": "fitting.fit",
    "load_base": "loading",
    "methods": "methods",
    "rank": "selection.ranking.rank_bases",
}

__all__ = [
    "Base",
    "DeltapatchError",
    "FitConfig",
    "Patch",
    "PatchedModel",
    "choose_method",
    "compare",
    "fit",
    "load_base",
    "methods",
    "rank",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``import deltapatch`` costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deltapatch' has no attribute '{name}'")
    module = import_module(f".{_HOMES[name]}", __name__)
    value = module if name == "methods" else getattr(module, name)
    globals()[name] = value
    return value
