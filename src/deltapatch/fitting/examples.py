"""Where training steps get their inputs: images, or activations that were computed once and kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base import Base
from ..data import BadImage, Batches
from ..data.batches import shuffled
from ..patch import pooled
from ..split import Split
from ..touching import Touch, touched
from ..trees import tensors_in


@dataclass(frozen=True)
class Step:
    """One batch: what the model is given, tensors of shape (N, ...), and labels of shape (N,)."""

    inputs: list[Tensor]
    labels: Tensor


class Examples(Protocol):
    """Labelled examples in batches, in an order that depends on seed and epoch alone."""

    def __len__(self) -> int: ...

    def epoch(self, number: int) -> Iterator[Step]: ...


@dataclass
class ImageExamples:
    """Images, decoded anew in every epoch. Images that cannot be read are noted in ``bad`` and passed
    over.
    """

    batches: Batches
    bad: dict[str, BadImage] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int) -> Iterator[Step]:
        for batch in self.batches.epoch(number):
            self.bad.update((bad.path, bad) for bad in batch.bad)
            if len(batch.labels):
                yield Step([batch.images], batch.labels)


@dataclass(frozen=True)
class StoredExamples:
    """Activations in memory, one row an image, shuffled by seed and epoch as `Batches` shuffles images."""

    inputs: list[Tensor]
    labels: Tensor
    batch_size: int
    seed: int | None = None

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Step]:
        count = len(self.labels)
        order = torch.arange(count) if self.seed is None else shuffled(count, self.seed, number)
        for rows in order.split(self.batch_size):
            yield Step([tensor[rows] for tensor in self.inputs], self.labels[rows])


@dataclass(frozen=True)
class Survey:
    """What one pass of the base over a split left behind.

    Attributes:
        features: pooled input of the base's classifier, of shape (N, features).
        activations: what the divergence is given, tensors of shape (N, ...); None where there was no room
        or no split.
        labels: shape (N,).
        bad: images that could not be read; they have no row.
    """

    features: Tensor
    activations: list[Tensor] | None
    labels: Tensor
    bad: tuple[BadImage, ...]


@torch.no_grad()
def survey(
    base: Base,
    batches: Batches,
    split: Split | None,
    room: int,
    advance: Callable[[int], None] = lambda images: None,
) -> Survey:
    """Runs the base once over all images and keeps features and, within ``room`` bytes, trunk activations.

    Args:
        base: the base; it computes without a patch.
        batches: images in order, not shuffled.
        split: where the patch begins; None keeps features only.
        room: bytes that activations may take.
        advance: told after each batch how many images are done.
    """
    site = base.anatomy.head
    features: list[Tensor] = []
    activations: list[list[Tensor]] = []
    labels: list[Tensor] = []
    bad: list[BadImage] = []
    for batch in batches.epoch(0):
        bad.extend(batch.bad)
        if not len(batch.labels):
            continue
        noted = _run_and_note(base, batch.images.to(base.device, base.dtype), split)
        features.append(pooled(noted[0][-1 if site.path is None else 0], site.layout).float().cpu())
        labels.append(batch.labels)
        if split is not None:
            activations.append([tensor.cpu() for tensor in noted[1]])
            room -= sum(tensor.numel() * tensor.element_size() for tensor in noted[1])
            if room < 0:
                split, activations = None, []
        advance(len(batch.labels))
    kept = (
        None
        if split is None or not activations
        else [torch.cat(rows) for rows in zip(*activations, strict=True)]
    )
    no_features = torch.zeros(0, site.features)
    return Survey(
        torch.cat(features) if features else no_features,
        kept,
        torch.cat(labels) if labels else torch.zeros(0, dtype=torch.long),
        tuple(bad),
    )


def _run_and_note(base: Base, images: Tensor, split: Split | None) -> tuple[list[Tensor], list[Tensor]]:
    """One forward pass: tensors at the classifier (or the output), and tensors at the divergence."""
    at_head: list[Tensor] = []
    at_divergence: list[Tensor] = []

    def note(into: list[Tensor]) -> Touch:
        def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            into.extend(tensors_in((args, kwargs)))
            return forward(*args, **kwargs)

        return touch

    touches: dict[nn.Module, Touch] = {}
    if split is not None:
        touches[base.submodule(split.divergence)] = note(at_divergence)
    path = base.anatomy.head.path
    if path is not None:
        touches[base.submodule(path)] = note(at_head)
    with base.freezer.frozen(), touched(touches, instead_of=base.module):
        output = base.module(images)
    return (tensors_in(output) if path is None else at_head), [tensor.clone() for tensor in at_divergence]


def total_bad(surveys: Sequence[Survey]) -> int:
    """How many images could not be read in all of them."""
    return sum(len(found.bad) for found in surveys)
