"""Where training steps get their inputs: images, or what the trunk makes of them, anew or from its cache."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..data import BadImage, Batches, drawn_views
from ..data.batches import shuffled
from .cache import TrunkCache
from .surveying import Trunk


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


@dataclass
class TrunkExamples:
    """What the trunk gives for images, computed anew in every epoch."""

    images: ImageExamples
    trunk: Trunk

    def __len__(self) -> int:
        return len(self.images)

    def epoch(self, number: int) -> Iterator[Step]:
        for step in self.images.epoch(number):
            yield Step(self.trunk.activations(step.inputs[0]), step.labels)


@dataclass(frozen=True)
class CachedExamples:
    """What the trunk gave for images, read from its cache: in the order and at the views that computing it
    anew would take.

    Attributes:
        cache: where every row is filled.
        rows: of the images in their store, shape (N,).
        labels: shape (N,).
        batch_size: images a step.
        seed: of order and views; None reads in order and at view 0.
        views: how many views the images have.
    """

    cache: TrunkCache
    rows: np.ndarray
    labels: Tensor
    batch_size: int
    seed: int | None = None
    views: int = 1

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Step]:
        count = len(self.labels)
        order, views = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        if self.seed is not None:
            order = shuffled(count, self.seed, number)
            views = drawn_views(count, self.views, self.seed, number)
        for chosen in order.split(self.batch_size):
            stored, _ = self.cache.read(self.rows[chosen.numpy()], views[chosen].numpy())
            # As the trunk gave them, whatever they were stored as.
            dtypes = self.cache.layout.dtypes
            inputs = [tensor.to(dtype) for tensor, dtype in zip(stored, dtypes, strict=True)]
            yield Step(inputs, self.labels[chosen])
