"""Several models or patches of one base into one, without loading them all.

Every merge of the folder ``merges`` is a function of this package by its own name:

    >>> from deltapatch import merging
    >>> merging.ties(["birds.safetensors", "cars.safetensors"], "base.safetensors", out="both.safetensors")

"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import merges as _merges

if TYPE_CHECKING:  # for editors; what there is, is what the folder holds
    from .merges.atlas import atlas as atlas
    from .merges.average import average as average
    from .merges.dare import dare as dare
    from .merges.fisher import fisher as fisher
    from .merges.regmean import regmean as regmean
    from .merges.task_arithmetic import task_arithmetic as task_arithmetic
    from .merges.ties import ties as ties
    from .merges.weight_signature import weight_signature as weight_signature

# Name -> file, for what is no merge.
_HOMES = {
    "Check": "distilling",
    "ImageBatches": "gathering.batches",
    "Learned": "learning",
    "LearningConfig": "learning",
    "Merge": "rules",
    "MergeError": "sources",
    "Recipe": "recipe",
    "RunOptions": "running",
    "diagonal_fisher": "gathering.fisher",
    "extract_signature": "signatures",
    "layer_grams": "gathering.grams",
    "learn_coefficients": "learning",
    "merge": "running",
    "merge_features": "width",
    "merge_patches": "patches",
    "merge_recipe": "running",
    "open_signature": "signature_files",
    "open_source": "sources",
    "put_on_signatures": "signatures",
    "re_estimate_file": "gathering.norm_statistics",
    "re_estimate_norms": "gathering.norm_statistics",
    "save_signature": "signature_files",
    "shallow_tensors": "signatures",
    "signature_size": "signature_files",
    "take_off_signatures": "signatures",
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
