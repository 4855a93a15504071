"""Sets of images as what the functions of this folder look at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil

import torch
from torch import Tensor

from ...base import Base
from ...data import Batches, ImageSet, evaluation_transform, load_batches
from ...errors import DeltapatchError


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """Images as a base sees them, in batches, any number of times; labels are left out.

    Each batch is like the whole: it has its share of every set, drawn in an order that the seed decides, and
    batches are as equally large as possible. What is found of norms batch by batch would otherwise be that of
    one class or task after the other.

    Attributes:
        images: the set, or several; images that cannot be decoded are left out and logged.
        base: whose preprocessing, device and dtype the batches have.
        batch_size: images a batch at most.
        seed: of the order.

    Example:
        >>> grams = merging.layer_grams(base.module, merging.ImageBatches(task.train, base))
    """

    images: ImageSet | Sequence[ImageSet]
    base: Base
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < len(self._sets()) or self.batch_size < 1:
            raise DeltapatchError(
                f"batch_size is {self.batch_size}, but a batch has one image or more of each of the"
                f" {len(self._sets())} sets; give a larger one"
            )

    def __iter__(self) -> Iterator[Tensor]:
        """Batches of shape (B, C, H, W) with B ≥ 1."""
        for together in zip_longest(*map(iter, self._shares())):
            images = torch.cat([batch.images for batch in together if batch is not None])
            if len(images):
                yield images.to(self.base.device, self.base.dtype)

    def _sets(self) -> list[ImageSet]:
        return [self.images] if isinstance(self.images, ImageSet) else list(self.images)

    def _shares(self) -> list[Batches]:
        """Each set in as many batches as there are of all images together, or fewer where it is small."""
        ready = [one.with_transform(evaluation_transform(self.base.preprocessing)) for one in self._sets()]
        # Each share is rounded up, by less than one image.
        count = ceil(sum(map(len, ready)) / (self.batch_size - len(ready) + 1))
        return [
            load_batches(one, batch_size=ceil(len(one) / count), shuffle=True, seed=self.seed)
            for one in ready
            if len(one)
        ]
