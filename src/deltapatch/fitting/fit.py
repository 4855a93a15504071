"""From a base and a folder of labelled images to a patch."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base import Base
from ..data import (
    BadImage,
    ImageSet,
    TaskData,
    open_data,
)
from ..errors import DataError
from ..method import Method, make_method
from ..patch import Patch
from .acceleration import make_accelerator
from .checkpoint import Checkpoint
from .config import FitConfig
from .history import Epoch
from .job import Job
from .watching import FitWatch

__all__ = ["FitConfig", "FitResult", "fit", "fit_task"]


@dataclass(frozen=True)
class FitResult:
    """A fitted patch and how it came about.

    Attributes:
        patch: the patch, with the parameters of its best validation epoch.
        head_only: a patch of the head method, fitted on the same features: what the base gives without any
        patch.
        history: figures of each epoch.
        best_epoch: whose parameters were kept; 0 is the starting point.
        interrupted: whether the user ended the fit early.
        trunk_kept: whether trunk activations were kept, so that the trunk ran once an image and view.
        notes: what was decided about cache and precision, and why; one line each.
        bad_images: images that could not be read and were left out.
        seconds: wall-clock time.
    """

    patch: Patch
    head_only: Patch
    history: tuple[Epoch, ...]
    best_epoch: int
    interrupted: bool
    trunk_kept: bool
    notes: tuple[str, ...]
    bad_images: tuple[BadImage, ...]
    seconds: float


def fit(
    base: Base,
    data: str | Path | TaskData,
    method: Method | None = None,
    config: FitConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    track: Sequence[str] = (),
) -> Patch:
    """Fits a patch; the base stays as it is, bit for bit.

    Args:
        base: the frozen model.
        data: a folder of class folders, ``.npz``, Parquet, a hub data set's name, or data that is open
        already.
        method: what kind of patch; `deltapatch.methods.Delta()` where left out.
        config: how to fit it.
        checkpoint: a file for the state after each epoch; removed when the fit is over.
        resume: go on from the checkpoint if it is there; the result is the same as without the interruption.
        progress: whether to draw a progress bar.
        track: trackers of accelerate that get the figures, such as "tensorboard".

    Returns:
        The patch, in eval mode, with its validation figures in ``patch.info.figures``.

    Raises:
        DataError: the data cannot be read, or has no training images.
        AnatomyError: the method finds no place in the base.

    Example:
        >>> base = deltapatch.load_base("timm/resnet50.a1_in1k")
        >>> patch = deltapatch.fit(base, "photos/")
        >>> patch.save("photos.safetensors")
    """
    config = config or FitConfig()
    if isinstance(data, TaskData):
        task = data
    else:
        task = open_data(data, validation=config.validation, seed=config.seed)
    return fit_task(
        base, task, method, config, checkpoint=checkpoint, resume=resume, progress=progress, track=track
    ).patch


def fit_task(
    base: Base,
    task: TaskData,
    method: Method | None = None,
    config: FitConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    track: Sequence[str] = (),
    supporting: ImageSet | None = None,
    start: Patch | None = None,
    head: nn.Linear | None = None,
) -> FitResult:
    """As `fit`, and returns the history and the head-only patch too.

    Args:
        base: see `fit`, as for all that are not named here.
        supporting: validation images of the base's own task, labelled by the base's outputs, for methods that
            weigh what the base loses on it.
        start: a patch of the same method, whose parts (not its head) the fit starts from.
        head: a linear layer that the patch's head starts from, in place of one solved on the features.
    """
    started = time.perf_counter()
    method = method or make_method("delta")
    config = config or FitConfig()
    if task.train is None or not len(task.train):
        raise DataError(f"{task.name} has no training images")
    with FitWatch(enabled=progress, epochs=config.epochs) as watch, _random_state_kept():
        folder = Path(checkpoint).parent if checkpoint is not None else Path()
        accelerator = make_accelerator(base, method, config, track, folder)
        with closing(Job(base, task, method, config, accelerator, watch, supporting, start, head)) as job:
            saved = Checkpoint(Path(checkpoint), job.identity(), resume) if checkpoint is not None else None
            surveys = job.survey(saved)
            head_only = job.fit_head(surveys)
            if job.head_outcome.interrupted and job.patch.touches():
                raise KeyboardInterrupt  # the patch itself has not begun, so there is nothing to keep
            outcome = job.fit_patch(head_only, surveys, saved)
            patch = job.finished(outcome)
            if saved is not None and not outcome.interrupted:
                saved.remove()
            accelerator.end_training()
    seconds = time.perf_counter() - started
    bad = {found.path: found for part in surveys.values() for found in part.bad}
    for fitted in (patch, head_only):
        job.describe(fitted, outcome if fitted is patch else job.head_outcome, len(bad), seconds)
    return FitResult(
        patch=patch,
        head_only=head_only,
        history=tuple(outcome.history),
        best_epoch=outcome.best,
        interrupted=outcome.interrupted,
        trunk_kept=job.uses_cache(surveys),
        notes=job.notes(),
        bad_images=tuple(bad.values()),
        seconds=seconds,
    )


def _random_state_kept() -> AbstractContextManager[Any]:
    """The caller's random numbers go on after a fit as if it had not been."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
