"""From a base and a folder of labelled images to a patch."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..base import Base
from ..data import BadImage, TaskData, evaluation_transform, load_batches, open_data, training_transform
from ..errors import DataError
from ..info import FittedOn
from ..method import Method, make_method
from ..patch import Patch
from ..split import Split, split_before
from .acceleration import make_accelerator
from .answering import HeadModel, TailModel, WholeModel
from .checkpoint import Checkpoint
from .config import FitConfig
from .examples import Examples, ImageExamples, StoredExamples, Survey, survey
from .history import Epoch
from .loop import Outcome, Progress, train
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
        trunk_kept: whether trunk activations were kept, so that the trunk ran once an image.
        bad_images: images that could not be read and were left out.
        seconds: wall-clock time.
    """

    patch: Patch
    head_only: Patch
    history: tuple[Epoch, ...]
    best_epoch: int
    interrupted: bool
    trunk_kept: bool
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
) -> FitResult:
    """As `fit`, and returns the history and the head-only patch too."""
    started = time.perf_counter()
    method = method or make_method("delta")
    config = config or FitConfig()
    if task.train is None or not len(task.train):
        raise DataError(f"{task.name} has no training images")
    with FitWatch(enabled=progress, epochs=config.epochs) as watch, _random_state_kept():
        folder = Path(checkpoint).parent if checkpoint is not None else Path()
        accelerator = make_accelerator(base, method, config, track, folder)
        job = _Job(base, task, method, config, accelerator, watch)
        surveys = job.survey()
        head_only = job.fit_head(surveys)
        if job.head_outcome.interrupted and job.patch.touches():
            raise KeyboardInterrupt  # the patch itself has not begun, so there is nothing to keep
        patch = job.new_patch(head_only)
        saved = Checkpoint(Path(checkpoint), job.identity(), resume) if checkpoint is not None else None
        outcome = job.fit_patch(patch, surveys, saved) if patch.touches() else job.head_outcome
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
        trunk_kept=job.uses_activations(surveys),
        bad_images=tuple(bad.values()),
        seconds=seconds,
    )


class _Job:
    """One fit: base, data and options, and the steps that `fit_task` takes in order."""

    def __init__(
        self,
        base: Base,
        task: TaskData,
        method: Method,
        config: FitConfig,
        accelerator: Accelerator,
        watch: FitWatch,
    ) -> None:
        self.base = base
        self.task = task
        self.method = method
        self.config = config
        self.accelerator = accelerator
        self.watch = watch
        self.head_outcome = Outcome()
        base.module.to(accelerator.device)
        self.patch = method.build(base, task.classes, seed=config.seed)
        self.split = self._split()

    def _split(self) -> Split | None:
        """Where the patch's first touched module begins, if activations there can be kept."""
        order = [name for name, _ in self.base.module.named_modules()]
        touched = [path for path in self.patch.touches() if path in order]
        if self.config.augment != "none" or not touched:
            return None
        first = self.patch.sites[0]
        path = first.sub_blocks[0].path if hasattr(first, "sub_blocks") else min(touched, key=order.index)
        return split_before(self.base, path)

    def survey(self) -> dict[str, Survey]:
        """One pass of the base over training and validation images."""
        transform = evaluation_transform(self.base.preprocessing)
        room = self.config.keep_megabytes * 2**20
        surveys: dict[str, Survey] = {}
        for name, images in (("train", self.task.train), ("val", self.task.val)):
            if images is None or not len(images):
                continue
            batches = load_batches(
                images.with_transform(transform),
                batch_size=self.config.batch_size,
                shuffle=False,
                workers=self.config.workers,
                on_bad=self.config.on_bad,
            )
            with self.watch.surveying(name, len(images)) as advance:
                surveys[name] = survey(self.base, batches, self.split, room, advance)
            room -= sum(t.numel() * t.element_size() for t in surveys[name].activations or [])
        if not len(surveys["train"].labels):
            raise DataError(f"{self.task.name}: none of its training images could be read")
        return surveys

    def uses_activations(self, surveys: dict[str, Survey]) -> bool:
        return self.split is not None and all(found.activations is not None for found in surveys.values())

    def class_weights(self, labels: Tensor) -> Tensor | None:
        """Inverse of each class's share, 1 on average over the images; None unless balancing was asked
        for.
        """
        if not self.config.balance:
            return None
        counts = torch.bincount(labels, minlength=len(self.task.classes)).clamp_min(1)
        return len(labels) / (len(self.task.classes) * counts.float())

    def fit_head(self, surveys: dict[str, Survey]) -> Patch:
        """The head method's patch, fitted on the features of the survey with the same optimiser and
        schedule.
        """
        head_only = make_method("head").build(self.base, self.task.classes, seed=self.config.seed)
        assert head_only.head is not None
        nn.init.zeros_(head_only.head.weight)
        nn.init.zeros_(head_only.head.bias)
        # A step costs microseconds: enough of them that few images and many classes converge too.
        config = replace(self.config, epochs=max(self.config.epochs, 100), patience=None, precision="fp32")
        train_part, val_part = surveys["train"], surveys.get("val")
        self.head_outcome = train(
            HeadModel(head_only.head),
            StoredExamples([train_part.features], train_part.labels, config.batch_size, config.seed),
            None if val_part is None else StoredExamples([val_part.features], val_part.labels, 1024),
            config,
            class_weights=self.class_weights(train_part.labels),
            accelerator=self.accelerator,
        )
        return head_only.eval()

    def new_patch(self, head_only: Patch) -> Patch:
        """The patch before its fit: with the head of ``head_only`` if it has no other parts or shall
        start there.
        """
        if self.config.start_from_head or not self.patch.touches():
            assert self.patch.head is not None
            assert head_only.head is not None
            self.patch.head.load_state_dict(head_only.head.state_dict())
        return self.patch

    def fit_patch(self, patch: Patch, surveys: dict[str, Survey], checkpoint: Checkpoint | None) -> Outcome:
        labels = surveys["train"].labels
        return train(
            self._model(patch, surveys),
            self._examples("train", surveys),
            self._examples("val", surveys) if "val" in surveys else None,
            self.config,
            class_weights=self.class_weights(labels),
            checkpoint=checkpoint,
            progress=Progress(step=self.watch.step, epoch=self._finish_epoch),
            accelerator=self.accelerator,
        )

    def _model(self, patch: Patch, surveys: dict[str, Survey]) -> nn.Module:
        if self.split is not None and self.uses_activations(surveys):
            return TailModel(self.split, patch)
        return WholeModel(self.base, patch)

    def _examples(self, name: str, surveys: dict[str, Survey]) -> Examples:
        config, is_training = self.config, name == "train"
        found = surveys[name]
        if self.uses_activations(surveys) and found.activations is not None:
            return StoredExamples(
                found.activations, found.labels, config.batch_size, config.seed if is_training else None
            )
        images = self.task.train if is_training else self.task.val
        assert images is not None
        preprocessing = self.base.preprocessing
        transform = (
            training_transform(preprocessing, config.augment)
            if is_training
            else evaluation_transform(preprocessing)
        )
        return ImageExamples(
            load_batches(
                images.with_transform(transform),
                batch_size=config.batch_size,
                shuffle=is_training,
                seed=config.seed,
                workers=config.workers,
                on_bad=config.on_bad,
            )
        )

    def _finish_epoch(self, epoch: Epoch) -> None:
        self.watch.epoch(epoch)
        figures = {
            name: value for name, value in vars(epoch).items() if value is not None and name != "number"
        }
        self.accelerator.log(figures, step=epoch.number)

    def identity(self) -> str:
        """Digest of everything that the result depends on."""
        parts = [
            self.base.fingerprint,
            self.task.provenance.digest,
            [0 if images is None else len(images) for images in (self.task.train, self.task.val)],
            self.task.classes,
            self.method.name,
            self.method.configuration(),
            asdict(self.config),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def describe(self, patch: Patch, outcome: Outcome, bad_images: int, seconds: float) -> None:
        """Writes into the patch what it was fitted on and how well it does on the validation images."""
        source = self.task.provenance
        score = outcome.score
        figures = (
            {} if score is None else {"validation/accuracy": score.accuracy, "validation/loss": score.loss}
        )
        fitted_on = FittedOn(
            source=source.source,
            digest=source.digest,
            train=source.train,
            val=source.val,
            test=source.test,
            bad_images=bad_images,
            validation=source.validation,
            seed=self.config.seed,
            epochs=len(outcome.history),
            seconds=seconds,
        )
        patch.info = patch.info.model_copy(update={"fitted_on": fitted_on, "figures": figures})


def _random_state_kept() -> AbstractContextManager[Any]:
    """The caller's random numbers go on after a fit as if it had not been."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
