"""Models of one architecture, checked against each other before anything is merged."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from .chunks import Part, parts_of
from .sources import MergeError, Source, TensorSpec

if TYPE_CHECKING:
    from .rules import Chunk

R = TypeVar("R")

CHUNK_ELEMENTS = 2**20
"""How many elements of each model are in memory at a time and thread."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is merged. Make one with `check_inputs`.

    Attributes:
        models: two or more (one is enough for some merges).
        base: what the models were fine-tuned from; None where it is not given.
        merged: the tensors that are merged: floating, the same in all models; name -> shape and dtype.
        copied: tensors that are taken over as they are, name -> whose they are: integers, and those skipped.
        threads: how many parts are worked on at once.
        chunk_elements: how long a part is at most.
    """

    models: tuple[Source, ...]
    base: Source | None
    merged: Mapping[str, TensorSpec]
    copied: Mapping[str, Source]
    threads: int = 1
    chunk_elements: int = CHUNK_ELEMENTS
    watch: Callable[[int], None] = field(default=lambda elements: None, repr=False)

    def chunk(self, part: Part) -> "Chunk":
        """Reads a part in all models.

        Raises:
            MergeError: it holds NaN or infinite values, or cannot be read.
        """
        from .rules import Chunk

        spec = self.merged[part.name]
        everyone = self.models if self.base is None else (*self.models, self.base)
        is_double = any(source.specs[part.name].dtype == torch.float64 for source in everyone)
        dtype = torch.float64 if is_double else torch.float32
        models = tuple(_read(source, part, dtype) for source in self.models)
        base = None if self.base is None else _read(self.base, part, dtype)
        return Chunk(part.name, spec.shape, part.start, models, base)

    def over_chunks(
        self,
        work: Callable[["Chunk"], R],
        names: Iterable[str] | None = None,
        whole: frozenset[str] = frozenset(),
    ) -> Iterator[R]:
        """What ``work`` makes of every chunk, in a fixed order, worked out by several threads.

        Args:
            work: called with each chunk.
            names: which tensors; all merged ones where left out.
            whole: tensors that are not cut.
        """
        specs = self.merged if names is None else {name: self.merged[name] for name in names}
        parts = parts_of(specs, self.chunk_elements, whole)
        yield from in_order(lambda part: work(self.chunk(part)), parts, self.threads)


def _read(source: Source, part: Part, dtype: torch.dtype) -> Tensor:
    values = source.read(part.name, part.start, part.stop).to(dtype)
    # NaN is the smallest and largest of all that it stands among; this is many times faster than isfinite.
    if not all(isfinite(extreme) for extreme in torch.aminmax(values)):
        raise MergeError(
            f"{source.label}: tensor '{part.name}' holds NaN or infinite values, with which nothing can be"
            " merged; leave out the model, or the tensor with skip"
        )
    return values


def check_inputs(
    models: Iterable[Source],
    base: Source | None,
    *,
    skip: Iterable[str] = (),
    threads: int = 1,
    chunk_elements: int = CHUNK_ELEMENTS,
    mixed_dtypes: bool = False,
    watch: Callable[[int], None] | None = None,
) -> Inputs:
    """Checks that models are of one architecture, tensor by tensor; only specs and integers are looked at.

    Args:
        models: what is merged.
        base: what they were fine-tuned from.
        skip: shell patterns of tensors that are not merged, such as ``fc.*`` for heads of different tasks;
            they are taken from the base where it has them, else left out.
        threads: how many parts are worked on at once.
        chunk_elements: how long a part is at most.
        mixed_dtypes: whether a tensor may have different floating dtypes in different models; the first
            model's is then the result's.
        watch: is told of every part's number of elements once it is merged.

    Raises:
        MergeError: a tensor is missing somewhere, or has other shapes or dtypes; the message names it.
    """
    sources = tuple(models)
    if not sources:
        raise MergeError("there is no model to merge; give one or more")
    patterns = tuple(skip)
    everyone = (*sources, *(() if base is None else (base,)))
    merged: dict[str, TensorSpec] = {}
    copied: dict[str, Source] = {}
    for name, spec in sources[0].specs.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        _check_tensor(name, everyone, mixed_dtypes)
        if spec.is_floating:
            merged[name] = spec
        else:
            copied[name] = _keeper_of_integers(name, everyone)
    for other in everyone[1:]:
        for name in other.specs:
            if name not in sources[0].specs and not any(fnmatchcase(name, pattern) for pattern in patterns):
                raise MergeError(
                    f"{sources[0].label} has no tensor '{name}', which {other.label} has; {_OTHER}"
                )
    if not merged:
        raise MergeError("no floating tensor is left to merge; give fewer patterns to skip")
    if base is not None:
        copied |= {
            name: base for name in base.specs if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
    return Inputs(sources, base, merged, copied, threads, chunk_elements, watch or (lambda elements: None))


_OTHER = "models of different architectures, or not fine-tuned from one start, cannot be merged"


def _check_tensor(name: str, everyone: tuple[Source, ...], mixed_dtypes: bool) -> None:
    first = everyone[0]
    spec = first.specs[name]
    for other in everyone[1:]:
        if name not in other.specs:
            raise MergeError(f"{other.label} has no tensor '{name}', which {first.label} has; {_OTHER}")
        found = other.specs[name]
        if found.shape != spec.shape:
            raise MergeError(
                f"tensor '{name}' has shape {found.shape} in {other.label} and {spec.shape} in {first.label};"
                " leave heads of different tasks out with skip"
            )
        is_other = found.dtype != spec.dtype and not (mixed_dtypes and found.is_floating and spec.is_floating)
        if is_other:
            raise MergeError(
                f"tensor '{name}' is {found.dtype} in {other.label} and {spec.dtype} in {first.label};"
                " convert one, or allow mixed dtypes"
            )


def _keeper_of_integers(name: str, everyone: tuple[Source, ...]) -> Source:
    """Whose integers to take: they cannot be averaged, so they have to be equal, or count batches."""
    first, others = everyone[0], everyone[1:]
    if name.endswith("num_batches_tracked"):
        return first
    own = first.read(name)
    for other in others:
        if not torch.equal(own, other.read(name)):
            raise MergeError(
                f"tensor '{name}' holds {first.specs[name].dtype} that differ between {first.label} and"
                f" {other.label}; whole numbers cannot be merged, so leave it out with skip"
            )
    return first


def in_order(work: Callable[[Part], R], parts: Iterable[Part], threads: int) -> Iterator[R]:
    """Results in the order of the parts; at most a few more than ``threads`` are under way or waiting."""
    if threads <= 1:
        yield from map(work, parts)
        return
    waiting: list[Future[R]] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(work, part))
                if len(waiting) > 2 * threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for one in waiting:
                one.cancel()
