"""How far a patch moves the activations at the end of each stage, on images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...acting import feature_touches, head_touches
from ...anatomy import Anatomy, Stage, SubBlock
from ...base import Base
from ...data import ImageSet, evaluation_transform, list_images, load_batches, open_data, open_images
from ...data.opening import IMAGE_SUFFIXES
from ...errors import DeltapatchError
from ...exchange import merged
from ...patch import Patch, pooled
from ...touching import Touch, touched
from ...trees import tensors_in

MOST_IMAGES = 500
HEAD = "input of the head"
"""What the place is called where the head reads its features."""
_FEW = 50


@dataclass(frozen=True)
class PlaceDrift:
    """How far apart base and patched model are at one place.

    Attributes:
        name: of the stage or sub-block; "input of the head" for the pooled features that the head is given.
        relative: mean over images of ‖patched - base‖ / ‖base‖, over all channels and positions.
        cka: linear CKA of the activations, pooled over positions: 1 where they are the same but for rotation,
            scale and shift, 0 where they have nothing in common; None where all images give the same.
    """

    name: str
    relative: float
    cka: float | None


@dataclass(frozen=True)
class FeatureDrift:
    """How far a patch moves activations.

    Attributes:
        places: the ends of all stages in the order in which they run, or of all sub-blocks where there is one
            stage alone; then the input of the head.
        images: how many were looked at.
        unreadable: how many could not be read.
        notes: what speaks against the figures, one sentence each.
    """

    places: tuple[PlaceDrift, ...]
    images: int
    unreadable: int
    notes: tuple[str, ...]


@dataclass
class _Place:
    """What has been seen at one place so far."""

    distances: list[Tensor] = field(default_factory=list[Tensor])
    base: list[Tensor] = field(default_factory=list[Tensor])
    patched: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, base: Tensor, patched: Tensor, layout: str) -> None:
        one, other = base.double().flatten(1), patched.double().flatten(1)
        length = one.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        self.distances.append(((other - one).norm(dim=1) / length).cpu())
        self.base.append(pooled(base.double(), layout).cpu())
        self.patched.append(pooled(patched.double(), layout).cpu())

    def drift(self, name: str) -> PlaceDrift:
        cka = linear_cka(torch.cat(self.base).numpy(), torch.cat(self.patched).numpy())
        return PlaceDrift(name, float(torch.cat(self.distances).mean()), cka)


def feature_drift(
    base: Base, patch: Patch, images: ImageSet, *, batch_size: int = 32, workers: int = 0
) -> FeatureDrift:
    """Runs the images through the base with and without the patch, and compares what each stage returns.

    Args:
        base: the base.
        patch: a patch of it, on the same device; its own preprocessing is used.
        images: labels are not looked at.
        batch_size: images in a forward pass.
        workers: processes that decode images.

    Raises:
        DeltapatchError: no image can be read.
    """
    ready = images.with_transform(evaluation_transform(patch.info.preprocessing))
    layouts = {name: stage.layout for name, stage, _ in _ends(base.anatomy)}
    places = {name: _Place() for name in (*layouts, HEAD)}
    count = unreadable = 0
    for batch in load_batches(ready, batch_size=batch_size, shuffle=False, workers=workers).epoch(0):
        unreadable += len(batch.bad)
        if not len(batch.labels):
            continue
        count += len(batch.labels)
        given = batch.images.to(base.device, base.dtype)
        plain, patched = _activations(base, None, given), _activations(base, patch, given)
        for name, place in places.items():
            place.add(plain[name], patched[name], layouts.get(name, "NC"))
    if not count:
        raise DeltapatchError("there is no readable image among those given; check the data")
    notes = (f"{count} images are few, which makes CKA too large",) if count < _FEW else ()
    drifts = tuple(place.drift(name) for name, place in places.items())
    return FeatureDrift(drifts, count, unreadable, notes)


def some_images(source: str, count: int = MOST_IMAGES, seed: int = 0) -> ImageSet:
    """Images to look at, drawn from all that a source has: a folder of any form, an image, or labelled data.

    Labelled data that is no folder of images gives its test images, else its validation, else its training
    images.

    Raises:
        DataError: the source is not there, or holds no images.
    """
    path = Path(source).expanduser()
    is_folder = path.is_dir() and not any(path.glob("*.parquet"))
    if is_folder or path.suffix.lower() in IMAGE_SUFFIXES:
        images = open_images(list_images([path]))
    else:
        task = open_data(source, validation=0)
        splits = (task.test, task.val, task.train)
        images = next((split for split in splits if split is not None and len(split)), None)
        if images is None:
            raise DeltapatchError(f"{task.name} has no images")
    chosen = np.random.default_rng(seed).permutation(len(images))[:count]
    return images.subset(np.sort(chosen))


def linear_cka(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """⟨K, L⟩ / (‖K‖ ‖L‖) with K = XXᵀ and L = YYᵀ of centred rows; None where one of them is 0.

    From 0 to 1. Rotations, one scale for all columns, and shifts change nothing. With fewer rows than
    columns it comes out too large.

    Args:
        first: shape (N, d).
        second: shape (N, e), of the same samples.

    Source: Kornblith et al., ICML 2019.
    """
    grams = [rows @ rows.T for rows in (first - first.mean(axis=0), second - second.mean(axis=0))]
    lengths = [float(np.linalg.norm(gram)) for gram in grams]
    scales = [float((rows**2).sum()) for rows in (first, second)]
    if any(length <= 1e-20 * max(scale, 1e-300) for length, scale in zip(lengths, scales, strict=True)):
        return None
    return min(float((grams[0] * grams[1]).sum()) / (lengths[0] * lengths[1]), 1.0)


def _ends(anatomy: Anatomy) -> list[tuple[str, Stage, SubBlock]]:
    """Where activations are looked at: name, stage, and the sub-block that returns them."""
    if len(anatomy.stages) == 1:
        stage = anatomy.stages[0]
        return [(block.path, stage, block) for block in stage.sub_blocks]
    return [(stage.path, stage, stage.sub_blocks[-1]) for stage in anatomy.stages]


@torch.inference_mode()
def _activations(base: Base, patch: Patch | None, images: Tensor) -> dict[str, Tensor]:
    """What is returned at the end of each stage, and the pooled features, with or without a patch."""
    seen: dict[str, Tensor] = {}

    def note(name: str, position: int) -> Touch:
        def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            # What runs on may overwrite it.
            seen[name] = tensors_in(output)[position].clone()
            return output

        return touch

    notes: dict[nn.Module, Touch] = {}
    for name, _, block in _ends(base.anatomy):
        notes[base.submodule(block.path)] = note(name, block.output_position)
    layout = base.anatomy.head.layout
    if patch is None:
        touches = head_touches(base, lambda features: pooled(features, layout))
    else:
        touches = feature_touches(base, patch)
    with base.freezer.frozen(), touched(merged(notes, touches), instead_of=base.module):
        seen[HEAD] = base.module(images)
    return seen
