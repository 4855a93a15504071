"""Carries a merge out: part by part, on several threads, into memory or a file."""

import io
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, overload

import torch
from torch import Tensor

from ..evaluation.comparing.ledger import replace_file
from .chunks import Part, parts_of
from .inputs import CHUNK_ELEMENTS, Inputs, check_inputs, in_order
from .recipe import Recipe
from .rules import Merge
from .safetensors_files import TensorWriter, writing
from .sources import MergeError, ModelLike, open_source, open_sources

_CHECKPOINTS = (".pth", ".pt")
_MOST_THREADS = 8


@dataclass(frozen=True)
class RunOptions:
    """How a merge is carried out. None of it changes a bit of the result but ``dtype`` and ``skip``.

    Attributes:
        skip: shell patterns of tensors that are not merged, see `check_inputs`.
        dtype: of the merged tensors; as in the first model where left out.
        mixed_dtypes: whether a tensor may have different floating dtypes in different models.
        threads: how many parts are worked on at once; left out, one for each processor up to 8.
        chunk_elements: how long a part is at most.
        progress: is told of every part's number of elements once it is merged, from any thread.
    """

    skip: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    mixed_dtypes: bool = False
    threads: int | None = None
    chunk_elements: int = CHUNK_ELEMENTS
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if self.chunk_elements < 1:
            raise MergeError(f"chunk_elements is {self.chunk_elements}; give at least 1")
        if self.threads is not None and self.threads < 1:
            raise MergeError(f"threads is {self.threads}; give at least 1")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise MergeError(f"dtype is {self.dtype}, which cannot hold merged values; give a floating one")


@overload
def merge(
    how: Merge,
    models: Sequence[ModelLike],
    base: ModelLike | None = None,
    out: None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor]: ...
@overload
def merge(
    how: Merge,
    models: Sequence[ModelLike],
    base: ModelLike | None,
    out: str | os.PathLike[str],
    run: RunOptions | None = None,
) -> Path: ...
@overload
def merge(
    how: Merge,
    models: Sequence[ModelLike],
    base: ModelLike | None,
    out: str | os.PathLike[str] | None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path: ...


def merge(
    how: Merge,
    models: Sequence[ModelLike],
    base: ModelLike | None = None,
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor] | Path:
    """Merges models.

    The result does not depend on threads or the length of parts. Memory: for each thread, a part of every
    model and of the result; nothing is loaded as a whole but tensors that a merge has to solve for. Values
    are computed in fp32, those of fp64 models in fp64.

    Args:
        how: the merge.
        models: what is merged, see `open_source`.
        base: what they were fine-tuned from.
        out: a ``.safetensors`` file; left out, the tensors are returned. The recipe stands in the file's
            metadata. A ``.pth`` or ``.pt`` file is a torch checkpoint, ``{"state_dict": ...}``, for which the
            result is in memory as a whole.
        run: how to carry it out.

    Returns:
        The merged tensors, or the file's path.

    Raises:
        MergeError: the models do not fit together or do not suit the merge, or the dtype cannot hold the
            result; nothing is written then.
        DeltapatchError: a file cannot be read or written.
    """
    run = run or RunOptions()
    if how.needs_base and base is None:
        raise MergeError(f"{how.name} works on what models add to their base; give the base")
    sources = open_sources(models)
    base_source = None if base is None else open_source(base, "the base")
    inputs = check_inputs(
        sources,
        base_source,
        skip=run.skip,
        threads=run.threads or min(os.cpu_count() or 1, _MOST_THREADS),
        chunk_elements=run.chunk_elements,
        mixed_dtypes=run.mixed_dtypes,
        watch=run.progress,
    )
    rule = how.rule(inputs)
    whole = frozenset(name for name in inputs.merged if how.whole(inputs, name))
    layout = _layout(inputs, run.dtype)
    recipe = Recipe.of(how, inputs, run.skip, run.dtype, run.mixed_dtypes)
    with _target(out, layout, recipe) as target:

        def work(part: Part) -> int:
            values = rule(inputs.chunk(part))
            _check_values(part.name, values, layout[part.name][1])
            target.write(part.name, part.start, values)
            inputs.watch(part.stop - part.start)
            return part.stop - part.start

        for name, source in inputs.copied.items():
            target.write(name, 0, source.read(name))
        for _ in in_order(work, parts_of(inputs.merged, run.chunk_elements, whole), inputs.threads):
            pass
    return cast(_InMemory, target).tensors if out is None else Path(out)


def merge_recipe(
    recipe: Recipe, out: str | os.PathLike[str] | None = None, run: RunOptions | None = None
) -> dict[str, Tensor] | Path:
    """Does what a recipe says; the same inputs give the same bytes.

    Args:
        recipe: what to merge, from files; see `Recipe.read`.
        out: a ``.safetensors`` file; left out, the tensors are returned.
        run: threads, length of parts and progress; what else it says is taken from the recipe.

    Raises:
        DeltapatchError: as of `merge`.

    Example:
        >>> merge_recipe(Recipe.read("both.safetensors"), out="again.safetensors")
    """
    run = replace(
        run or RunOptions(),
        skip=recipe.skip,
        dtype=recipe.torch_dtype,
        mixed_dtypes=recipe.mixed_dtypes,
    )
    return merge(recipe.how, recipe.models, recipe.base or None, out, run)


def _check_values(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Refuses what the result's dtype cannot hold, before it becomes infinite or is cut off unseen."""
    limit = torch.finfo(dtype).max
    smallest, largest = torch.aminmax(values)
    if not (
        -limit <= float(smallest) and float(largest) <= limit
    ):  # nor with NaN, which every comparison denies
        raise MergeError(
            f"merged values of tensor '{name}' are not finite, or above {limit:g}, the most that {dtype} can"
            " hold; give a smaller scale, or a wider dtype"
        )


class _InMemory:
    """Takes merged parts like `TensorWriter`, into tensors."""

    def __init__(self, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}

    def write(self, name: str, start: int, values: Tensor) -> None:
        self.tensors[name].view(-1)[start : start + len(values)] = values


def _target(
    out: str | os.PathLike[str] | None,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    recipe: Recipe,
) -> AbstractContextManager["_InMemory | TensorWriter"]:
    if out is None:
        return nullcontext(_InMemory(layout))
    path = Path(out)
    if path.suffix in _CHECKPOINTS:
        return _checkpoint(path, layout, recipe)
    if path.suffix != ".safetensors":
        raise MergeError(
            f"{path}: merged models are written as .safetensors, or as {', '.join(_CHECKPOINTS)} for torch;"
            " give such a name"
        )
    return writing(path, layout, {"format": "pt", "deltapatch_merge": recipe.to_json()})


@contextmanager
def _checkpoint(
    path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], recipe: Recipe
) -> Generator[_InMemory]:
    """A torch checkpoint, which is in memory as a whole until it is written; beside the state dict stands the
    recipe.
    """
    target = _InMemory(layout)
    yield target
    content = io.BytesIO()
    torch.save({"state_dict": target.tensors, "deltapatch_merge": recipe.to_json()}, content)
    replace_file(path, content.getvalue())


def _layout(inputs: Inputs, dtype: torch.dtype | None) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    merged = {name: (spec.shape, dtype or spec.dtype) for name, spec in inputs.merged.items()}
    copied = {
        name: (source.specs[name].shape, source.specs[name].dtype) for name, source in inputs.copied.items()
    }
    return merged | copied
