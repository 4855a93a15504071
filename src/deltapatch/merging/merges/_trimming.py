"""Which entries of a task vector are its largest, over all of its tensors at once and exactly.

The k-th largest magnitude is found by counting, not by sorting: as an integer, the pattern of bits of a
positive fp32 number grows with the number. One pass counts the upper 16 bits of every magnitude, a second one
the lower 16 bits of those that share the upper bits of the k-th. The counts take 0.8 MB for each model and
thread, whatever the models' size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..chunks import Part
from ..inputs import Inputs
from ..rules import Chunk

TaskVectors = Callable[[Chunk], Sequence[Tensor]]
"""The parts of all task vectors in a chunk, shape (n,) each."""

_UPPER, _LOWER = 2**15, 2**16  # how many patterns upper and lower bits can have; the sign's bit is always 0
_NONE = 2**31 - 1  # a pattern above that of every number


@dataclass(frozen=True)
class Trim:
    """Keeps the largest entries of one task vector, and sets the others to 0.

    Attributes:
        threshold: the bits of the smallest magnitude that is kept, as fp32.
        last: the name and place of the last entry that is kept of those with just that magnitude, in the
            order of names and places; None where all of them are.
    """

    threshold: int
    last: tuple[str, int] | None = None

    def __call__(self, chunk: Chunk, values: Tensor) -> Tensor:
        """The part of the task vector in a chunk, shape (n,), trimmed."""
        bits = magnitude_bits(values)
        kept = bits >= self.threshold
        if self.last is not None:
            name, place = self.last
            # How many entries of this part come before the last, and the last itself.
            within = len(values) if chunk.name < name else 0
            if chunk.name == name:
                within = min(max(place + 1 - chunk.start, 0), len(values))
            kept[within:] = bits[within:] > self.threshold
        return torch.where(kept, values, torch.zeros_like(values))


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of magnitudes as fp32, int32 that are ordered as the magnitudes are."""
    return values.abs().to(torch.float32).view(torch.int32)


def find_trims(inputs: Inputs, names: Sequence[str], vectors: TaskVectors, keep: float) -> tuple[Trim, ...]:
    """For every model the trim that keeps exactly ⌊keep · total⌋ entries of its task vector.

    Of entries with the very magnitude of the threshold, the first ones are kept, in the order of the tensors'
    names and of places in a tensor: neither a file's own order nor that of the models matters.

    Args:
        inputs: the models.
        names: the tensors that make up the task vectors.
        vectors: the task vectors.
        keep: the share of entries that is kept, taken as the decimal number that it is written as.
    """
    names = sorted(names)
    total = sum(inputs.merged[name].elements for name in names)
    count = int(Fraction(str(keep)) * total)
    if count == 0 or count == total:
        return (Trim(0 if count else _NONE),) * len(inputs.models)
    ranks = [
        _at_rank(row, count) for row in _sums(inputs, names, vectors, lambda bits, _: _upper_counts(bits))
    ]
    uppers = [upper for upper, _ in ranks]
    lowers = _sums(inputs, names, vectors, lambda bits, model: _lower_counts(bits, uppers[model]))
    trims: list[Trim] = []
    ties: dict[int, int] = {}
    for model, ((upper, left), row) in enumerate(zip(ranks, lowers, strict=True)):
        lower, wanted = _at_rank(row, left)
        threshold = upper * _LOWER + lower
        trims.append(Trim(threshold))
        # Which zeros are kept makes no difference.
        if threshold > 0 and wanted < int(row[lower]):
            ties[model] = wanted
    return _cut_ties(inputs, names, vectors, trims, ties) if ties else tuple(trims)


def _at_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """The place of the ``rank``-th largest in counts by size, and its rank among those of the same place."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, rank))
    before = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before


def _upper_counts(bits: Tensor) -> Tensor:
    return torch.bincount(bits >> 16, minlength=_UPPER)


def _lower_counts(bits: Tensor, upper: int) -> Tensor:
    return torch.bincount(bits[bits >> 16 == upper] & (_LOWER - 1), minlength=_LOWER)


def _sums(
    inputs: Inputs, names: Sequence[str], vectors: TaskVectors, count: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """The sums over all chunks of what is counted in each model's magnitudes, int64."""

    def work(chunk: Chunk) -> list[Tensor]:
        return [count(magnitude_bits(values), model) for model, values in enumerate(vectors(chunk))]

    sums: list[Tensor] = []
    for counts in inputs.over_chunks(work, names):
        if not sums:
            sums = counts
        else:
            for own, more in zip(sums, counts, strict=True):
                own.add_(more)
    return sums


def _cut_ties(
    inputs: Inputs, names: Sequence[str], vectors: TaskVectors, trims: Sequence[Trim], ties: dict[int, int]
) -> tuple[Trim, ...]:
    """The trims with the place of the last tie; ``ties`` says of which models, and how many of them stay."""

    def equals(chunk: Chunk) -> tuple[Part, dict[int, int]]:
        parts = vectors(chunk)
        stop = chunk.start + len(parts[0])
        found = {model: int((magnitude_bits(parts[model]) == trims[model].threshold).sum()) for model in ties}
        return Part(chunk.name, chunk.start, stop), found

    finished = list(trims)
    left = dict(ties)
    for part, found in inputs.over_chunks(equals, names):
        for model in list(left):
            if left[model] > found[model]:
                left[model] -= found[model]
                continue
            bits = magnitude_bits(vectors(inputs.chunk(part))[model])
            places = torch.nonzero(bits == trims[model].threshold)[:, 0]
            last = part.start + int(places[left.pop(model) - 1])
            finished[model] = Trim(trims[model].threshold, (part.name, last))
    return tuple(finished)
