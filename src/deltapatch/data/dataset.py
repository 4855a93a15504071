"""Labelled images of one split, decoded when they are asked for, and the task that the splits make up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils.data import Dataset

from deltapatch.data.decode import DEFAULT_LIMITS, ImageLimits, decode_image
from deltapatch.data.sources.source import ImageStore, SourceKind
from deltapatch.data.transforms import Augment, ImageTransform, view_transform
from deltapatch.errors import DeltapatchError, ImageError
from deltapatch.preprocessing import Preprocessing

UNLABELLED = -1

# What keeps the random numbers of views, and of the choice between them, apart from all others.
VIEW_STREAM = 1
CHOICE_STREAM = 2


@dataclass(frozen=True)
class BadImage:
    """An image that could not be decoded or was refused: what it is called and why."""

    path: str
    reason: str


Item = tuple[Tensor, int, int] | BadImage


def drawn_views(count: int, views: int, seed: int, epoch: int) -> Tensor:
    """A view for each of ``count`` images, int64 from 0 to ``views - 1``, shape (count,).

    It depends on seed and epoch alone, and not on the order of the images in the epoch.
    """
    key = np.random.SeedSequence((seed, epoch), spawn_key=(CHOICE_STREAM,)).generate_state(1, np.uint64)[0]
    return torch.randint(views, (count,), generator=torch.Generator().manual_seed(int(key)))


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[Item]):
    """The images of one split with their labels; a map-style dataset that is never changed, only copied.

    An item is a transformed image (C, H, W), its label and its index in this set, or a ``BadImage``: one
    damaged file does not end a job. What a random transform does to an image depends on seed, epoch and index
    alone, so that neither the number of workers nor a resumed fit changes it. A view of an image is always
    the same picture: it depends on the image's row in the store and on the view alone.

    Attributes:
        store: where the images lie.
        labels: int64 class indices, shape (N,); -1 where there are none.
        rows: for each image of this set its row in the store, shape (N,).
        limits: what an image may cost.
        transform: what turns an image into a tensor.
        views: the transforms of which each epoch draws one for each image, as `drawn_views` says; empty where
            ``transform`` is for all of them.
        seed: seed of random transforms and drawn views.
        epoch: the pass over the images that these are for.
    """

    store: ImageStore
    labels: np.ndarray
    rows: np.ndarray
    limits: ImageLimits = DEFAULT_LIMITS
    transform: ImageTransform | None = None
    views: tuple[ImageTransform, ...] = ()
    seed: int = 0
    epoch: int = 0

    @classmethod
    def of(cls, store: ImageStore, labels: np.ndarray | None, limits: ImageLimits) -> "ImageSet":
        """Makes the set of all images of a store, without labels where none are given."""
        if labels is None:
            labels = np.full(len(store), UNLABELLED, np.int64)
        return cls(store, labels, np.arange(len(store)), limits)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        if self.transform is None:
            raise DeltapatchError("these images have no transform; call with_transform before reading items.")
        try:
            image = self.image(index)
        except ImageError as error:
            return BadImage(error.path, error.reason)
        transform = self.views[self._drawn[index]] if self.views else self.transform
        return self._transformed(image, transform, index), int(self.labels[index]), index

    def image(self, index: int) -> Image.Image:
        """Decodes one image to RGB, without the transform; raises ``ImageError`` where it is bad."""
        row = int(self.rows[index])
        return decode_image(self.store.read(row), name=self.store.name(row), limits=self.limits)

    def names(self, index: int) -> str:
        """What a person calls one image: its path, or its place in a file as ``photos.npz[train][17]``."""
        return self.store.name(int(self.rows[index]))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Makes a set of some of the images, in the order given; nothing is copied but labels."""
        chosen = np.asarray(indices, np.int64)
        return replace(self, labels=self.labels[chosen], rows=self.rows[chosen])

    def with_labels(self, labels: Sequence[int] | np.ndarray) -> "ImageSet":
        """Makes the same set with other labels, one for each image."""
        return replace(self, labels=np.asarray(labels, np.int64))

    def with_transform(self, transform: ImageTransform) -> "ImageSet":
        """Makes the same set with another transform."""
        return replace(self, transform=transform, views=())

    def at_view(self, preprocessing: Preprocessing, augment: Augment, view: int) -> "ImageSet":
        """Makes the same set with all images at one view, whatever seed and epoch; see `view_transform`."""
        return self.with_transform(view_transform(preprocessing, augment, view))

    def with_views(self, preprocessing: Preprocessing, augment: Augment, views: int) -> "ImageSet":
        """Makes the same set with each image at one of its first ``views`` views, drawn for each epoch.

        Raises:
            DeltapatchError: ``views`` is below 1, or more than the augmentation has.
        """
        if views < 1:
            raise DeltapatchError(
                f"views cannot be {views}; each image has at least one view, the plain one."
            )
        drawn_from = tuple(view_transform(preprocessing, augment, view) for view in range(views))
        return replace(self, transform=drawn_from[0], views=drawn_from)

    def for_epoch(self, epoch: int, seed: int = 0) -> "ImageSet":
        """Makes the same set for another pass, in which random transforms and views are drawn anew."""
        return replace(self, epoch=epoch, seed=seed)

    @cached_property
    def _drawn(self) -> np.ndarray:
        """The view of each image in this epoch; a changed copy of the set makes its own."""
        return drawn_views(len(self), len(self.views), self.seed, self.epoch).numpy()

    def _transformed(self, image: Image.Image, transform: ImageTransform, index: int) -> Tensor:
        if transform.augment == "none":
            return transform(image)
        if transform.view is None:
            source = np.random.SeedSequence((self.seed, self.epoch, index))
        else:
            row = int(self.rows[index])
            source = np.random.SeedSequence((row, transform.view), spawn_key=(VIEW_STREAM,))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(source.generate_state(1, np.uint64)[0]))
            return transform(image)


class Provenance(BaseModel):
    """Where a task's images came from, for reports and patch files.

    Attributes:
        source: name of the folder, file or hub set, without its directory.
        kind: how it was read.
        digest: sha256 over names, sizes and labels of a tree, over the content of files, or over labels and
            revision of a hub set.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        validation: how the validation split was made: ``given``, ``none``, or the rule.
        bad_images: how many were found bad so far; 0 when the data is opened, since images are decoded later.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    kind: SourceKind
    digest: str
    train: int
    val: int
    test: int
    validation: str
    bad_images: int = 0


@dataclass(frozen=True)
class TaskData:
    """A task's classes and splits; a split that the source does not have is None."""

    name: str
    classes: tuple[str, ...]
    train: ImageSet | None
    val: ImageSet | None
    test: ImageSet | None
    provenance: Provenance
