"""Whether a fit keeps trunk activations on disk: decided from measured times, bytes and epochs."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import BadImage, ImageSet, evaluation_transform
from ..preprocessing import Preprocessing
from .config import FitConfig

BYTES_PER_SECOND = 200e6
"""What a plain disk reads and writes. Memory that caches it is faster, so this never promises too much."""
SHARE_OF_FREE_DISK = 0.8
MEASURED_IMAGES = 8


@dataclass(frozen=True)
class Decision:
    """Whether trunk activations are kept, and why, in one line."""

    keeps: bool
    why: str

    def __str__(self) -> str:
        return f"trunk cache {'on' if self.keeps else 'off'}: {self.why}"


@dataclass(frozen=True)
class Costs:
    """What the trunk of one image costs.

    Attributes:
        seconds: to decode and prepare an image and to run the trunk on it.
        row_bytes: of its activations on disk.
        missing_rows: rows that would have to be filled.
        rows: rows that the fit would read: one for each image and view.
        images: training and validation images.
        free_bytes: on the disk of the cache.
    """

    seconds: float
    row_bytes: int
    missing_rows: int
    rows: int
    images: int
    free_bytes: int


def impossible(config: FitConfig, divergence: str | None, is_split: bool) -> Decision | None:
    """The decision where there is no choice; None where there is one."""
    if config.cache == "off":
        return Decision(False, "switched off")
    if divergence is None:
        return None
    if not is_split:
        return Decision(False, f"the base cannot be cut at {divergence}, so it runs whole")
    if config.fixed_views is None:
        return Decision(
            False, f"augment={config.augment} draws new crops in every epoch; views=8 would let them be kept"
        )
    return None


def decide(config: FitConfig, costs: Costs) -> Decision:
    """Keeps the activations where filling and reading them takes less time than running the trunk anew."""
    size = costs.rows * costs.row_bytes
    facts = f"{costs.rows} rows of {_readable(costs.row_bytes)}, {_readable(size)}"
    if config.cache == "on":
        return Decision(True, f"asked for; {facts}")
    needed = costs.missing_rows * costs.row_bytes
    if needed > SHARE_OF_FREE_DISK * costs.free_bytes:
        return Decision(False, f"{facts}, and only {_readable(costs.free_bytes)} of disk are free")
    row_seconds = costs.row_bytes / BYTES_PER_SECOND
    # The survey of the base runs over the images once in either case.
    kept = max(costs.missing_rows, costs.images) * costs.seconds
    kept += costs.missing_rows * row_seconds + config.epochs * costs.images * row_seconds
    anew = (1 + config.epochs) * costs.images * costs.seconds
    times = (
        f"{facts}; decoding and trunk take {1e3 * costs.seconds:.1f} ms an image, reading a row at most"
        f" {1e3 * row_seconds:.1f} ms, {config.epochs} epochs"
    )
    return Decision(kept < anew, times)


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@dataclass(frozen=True)
class Sample:
    """A few training images, decoded.

    Attributes:
        images: shape (N, C, H, W); noise if none of the first images can be read.
        seconds: to decode and prepare one.
    """

    images: Tensor
    seconds: float


def sample(images: ImageSet, preprocessing: Preprocessing, count: int = MEASURED_IMAGES) -> Sample:
    """The first ``count`` images of a set that are not bad."""
    prepared = images.with_transform(evaluation_transform(preprocessing))
    started = time.perf_counter()
    items = [prepared[index] for index in range(min(count, len(images)))]
    seconds = (time.perf_counter() - started) / max(len(items), 1)
    good = [item[0] for item in items if not isinstance(item, BadImage)]
    if not good:
        generator = torch.Generator().manual_seed(0)
        return Sample(torch.randn(2, *preprocessing.input_size, generator=generator), seconds)
    return Sample(torch.stack(good), seconds)
