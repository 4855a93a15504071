"""Images in batches, in an order that is a function of seed and epoch alone."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deltapatch.data.dataset import BadImage, ImageSet, Item
from deltapatch.data.dataset import drawn_views as drawn_views
from deltapatch.errors import DeltapatchError, ImageError

logger = logging.getLogger(__name__)

OnBad = Literal["skip", "fail"]


@dataclass
class Batch:
    """Images that were read together.

    Attributes:
        images: float32, shape (B, C, H, W); B is 0 where all images of the batch are bad.
        labels: int64 class indices, shape (B,); -1 where there are none.
        indices: int64 index of each image in its set, shape (B,).
        bad: the images that are left out.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: tuple[BadImage, ...]


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The numbers 0 to ``count - 1`` in an order that depends on seed and epoch alone, shape (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def collate(items: Sequence[Item], image_shape: tuple[int, int, int]) -> Batch:
    """Puts items together; ``image_shape`` (C, H, W) is what a batch without a good image has."""
    good = [item for item in items if not isinstance(item, BadImage)]
    bad = tuple(item for item in items if isinstance(item, BadImage))
    images = torch.stack([image for image, _, _ in good]) if good else torch.empty(0, *image_shape)
    labels = torch.tensor([label for _, label, _ in good], dtype=torch.int64)
    indices = torch.tensor([index for _, _, index in good], dtype=torch.int64)
    return Batch(images, labels, indices, bad)


@dataclass(frozen=True)
class Batches:
    """A set of images as batches, any number of times; ``load_batches`` makes it.

    Iterating gives epoch 0. Each epoch has its own loader and depends on no other, so a fit that resumes at
    epoch 7 sees what an uninterrupted one sees.
    """

    images: ImageSet
    image_shape: tuple[int, int, int]
    batch_size: int
    shuffle: bool
    seed: int
    workers: int
    drop_last: bool
    on_bad: OnBad
    _reported: set[BadImage] = field(default_factory=set[BadImage], init=False, repr=False, compare=False)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Reads all images once.

        Raises:
            ImageError: an image is bad and ``on_bad`` is ``fail``.
        """
        loader: DataLoader[Item] = DataLoader(
            self.images.for_epoch(epoch, self.seed),
            batch_size=self.batch_size,
            sampler=self._order(epoch),
            num_workers=self.workers,
            drop_last=self.drop_last,
            collate_fn=partial(collate, image_shape=self.image_shape),
            # Its own generator, because the loader would otherwise draw from torch's global one.
            generator=torch.Generator(),
        )
        for batch in loader:
            self._report(batch.bad)
            yield batch

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.images)))
        return shuffled(len(self.images), self.seed, epoch).tolist()

    def _report(self, bad: tuple[BadImage, ...]) -> None:
        """Runs in the main process: workers could neither raise an ``ImageError`` here nor log only once."""
        for image in bad:
            if self.on_bad == "fail":
                raise ImageError(image.path, image.reason)
            if image not in self._reported:
                self._reported.add(image)
                logger.warning("%s: %s; left out.", image.path, image.reason)


def load_batches(
    images: ImageSet,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    on_bad: OnBad = "skip",
) -> Batches:
    """Prepares to read a set in batches.

    Args:
        images: the set; it must have a transform.
        batch_size: images per batch, bad ones included.
        shuffle: whether each epoch has an order of its own, from the seed.
        seed: decides order and augmentation, whatever the number of workers.
        workers: processes that decode; 0 decodes in this one.
        drop_last: whether a last, smaller batch is left out.
        on_bad: ``skip`` leaves bad images out, lists them in ``Batch.bad`` and logs each once; ``fail``
            raises an ``ImageError`` for the first.
    """
    if images.transform is None:
        raise DeltapatchError("these images have no transform; call with_transform before load_batches.")
    if batch_size < 1 or workers < 0 or seed < 0:
        raise DeltapatchError(
            f"batch_size {batch_size}, workers {workers} and seed {seed} are not usable; batch_size must be"
            " at least 1, workers and seed at least 0."
        )
    image_shape = images.transform.preprocessing.input_size
    return Batches(images, image_shape, batch_size, shuffle, seed, workers, drop_last, on_bad)
