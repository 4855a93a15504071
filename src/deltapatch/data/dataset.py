"""Labelled images of one split, decoded when they are asked for, and the task that the splits make up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils.data import Dataset

from deltapatch.data.decode import DEFAULT_LIMITS, ImageLimits, decode_image
from deltapatch.data.sources.source import ImageStore, SourceKind
from deltapatch.data.transforms import ImageTransform
from deltapatch.errors import DeltapatchError, ImageError

UNLABELLED = -1


@dataclass(frozen=True)
class BadImage:
    """An image that could not be decoded or was refused: what it is called and why."""

    path: str
    reason: str


Item = tuple[Tensor, int, int] | BadImage


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[Item]):
    """The images of one split with their labels; a map-style dataset that is never changed, only copied.

    An item is a transformed image (C, H, W), its label and its index in this set, or a ``BadImage``: one
    damaged file does not end a job. What a random transform does to an image depends on seed, epoch and index
    alone, so that neither the number of workers nor a resumed fit changes it.

    Attributes:
        store: where the images lie.
        labels: int64 class indices, shape (N,); -1 where there are none.
        rows: for each image of this set its row in the store, shape (N,).
        limits: what an image may cost.
        transform: what turns an image into a tensor.
        seed: seed of random transforms.
        epoch: the pass over the images that random transforms are for.
    """

    store: ImageStore
    labels: np.ndarray
    rows: np.ndarray
    limits: ImageLimits = DEFAULT_LIMITS
    transform: ImageTransform | None = None
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
        return self._transformed(image, self.transform, index), int(self.labels[index]), index

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
        return replace(self, transform=transform)

    def for_epoch(self, epoch: int, seed: int = 0) -> "ImageSet":
        """Makes the same set for another pass, in which random transforms draw anew."""
        return replace(self, epoch=epoch, seed=seed)

    def _transformed(self, image: Image.Image, transform: ImageTransform, index: int) -> Tensor:
        if transform.augment == "none":
            return transform(image)
        key = np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key))
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
