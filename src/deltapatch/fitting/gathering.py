"""Statistics of normalisation layers, gathered from unlabelled images without a gradient."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from ..acting import feature_touches
from ..base import Base
from ..data import BadImage, ImageSet, evaluation_transform, load_batches
from ..errors import DataError
from ..normalising import Gathering, NormPart
from ..patch import Patch
from ..touching import touched

_MARGIN = 8
"""A random version is cut out of the image with a border of an eighth of its side (4 of 32 pixels)."""


@torch.no_grad()
def gather(
    base: Base,
    patch: Patch,
    images: Sequence[ImageSet],
    gathering: Gathering,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Moves the statistics of the patch's `NormPart` parts towards those of the images, from where they are.

    Args:
        base: the patch's base.
        patch: in eval mode; nothing else of it changes.
        images: training images of one task or several; their labels are not looked at.
        gathering: how many images, in how many versions, and with which weight.
        batch_size: images a step where all are looked at.
        seed: of which images and of their random versions.

    Raises:
        DataError: no image can be read.
    """
    parts = [part for part in patch.modules() if isinstance(part, NormPart) and part.has_statistics]
    if gathering.images is None:
        batches = (batch for found in images for batch in _all(found, base, batch_size))
    else:
        drawn = (_versions(found, base, gathering.images, gathering.copies, seed) for found in images)
        batches = (batch for found in drawn for batch in found)
    seen = 0
    for step, batch in enumerate(batches, start=1):
        with _weighing(parts, gathering.weight(step, seen, len(batch))):
            features_of(base, patch, batch)
        seen += len(batch)
    if not seen:
        raise DataError("none of the training images can be read, so no statistics can be gathered from them")


@torch.no_grad()
def features_of(base: Base, patch: Patch, images: Tensor) -> Tensor:
    """What the patch's head is given for a batch of images (N, C, H, W): shape (N, features), in fp32."""
    with base.freezer.frozen(), touched(feature_touches(base, patch), instead_of=base.module):
        return base.module(images.to(base.device, base.dtype)).float()


@contextmanager
def _weighing(parts: list[NormPart], weight: float) -> Generator[None]:
    for part in parts:
        part.momentum = weight
    try:
        yield
    finally:
        for part in parts:
            part.momentum = None


def _all(images: ImageSet, base: Base, batch_size: int) -> Iterator[Tensor]:
    """All images once; a last batch of one image, which has no variance, only where there is no other."""
    prepared = images.with_transform(evaluation_transform(base.preprocessing))
    first = True
    for batch in load_batches(prepared, batch_size=batch_size, shuffle=False):
        if len(batch.labels) > 1 or (first and len(batch.labels)):
            yield batch.images if len(batch.labels) > 1 else batch.images.repeat(2, 1, 1, 1)
            first = False


def _versions(images: ImageSet, base: Base, count: int, copies: int, seed: int) -> Iterator[Tensor]:
    """For each of ``count`` images a batch of random versions; images come again where there are fewer."""
    prepared = images.with_transform(evaluation_transform(base.preprocessing))
    generator = torch.Generator().manual_seed(seed)
    items = (prepared[index] for index in torch.randperm(len(images), generator=generator).tolist())
    chosen = list(islice((item[0] for item in items if not isinstance(item, BadImage)), count))
    for step in range(count if chosen else 0):
        yield random_versions(chosen[step % len(chosen)], copies, generator)


def random_versions(image: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Random crops of the image with a border of zeros, half of them mirrored, turned by quarter turns.

    Images that are not square are turned by half turns.

    Args:
        image: shape (C, H, W).
        copies: how many.
        generator: what they are drawn from.

    Returns:
        shape (copies, C, H, W).
    """
    height, width = image.shape[1:]
    top, left = max(height // _MARGIN, 1), max(width // _MARGIN, 1)
    padded = nn.functional.pad(image, (left, left, top, top))
    rows = torch.randint(0, 2 * top + 1, (copies,), generator=generator).tolist()
    columns = torch.randint(0, 2 * left + 1, (copies,), generator=generator).tolist()
    mirrored = (torch.rand(copies, generator=generator) < 0.5).tolist()
    turns = torch.randint(0, 4, (copies,), generator=generator).tolist()
    versions: list[Tensor] = []
    for row, column, mirror, turn in zip(rows, columns, mirrored, turns, strict=True):
        version = padded[:, row : row + height, column : column + width]
        version = version.flip(2) if mirror else version
        versions.append(version.rot90(turn if height == width else 2 * (turn // 2), (1, 2)))
    return torch.stack(versions)
