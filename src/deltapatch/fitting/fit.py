"""From a base and a folder of labelled images to a patch."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..base import Base
from ..data import (
    BadImage,
    ImageSet,
    TaskData,
    evaluation_transform,
    load_batches,
    open_data,
    training_transform,
)
from ..errors import DataError, DeltapatchError
from ..info import FittedOn
from ..method import Method, make_method
from ..patch import Patch
from ..split import divergence_of, split_before
from .acceleration import make_accelerator
from .answering import TailModel, WholeModel
from .checkpoint import Checkpoint
from .config import FitConfig
from .deciding import Decision, sample
from .examples import CachedExamples, Examples, ImageExamples, TrunkExamples
from .history import Epoch
from .loop import Outcome, Progress, train
from .precision import choose_precision
from .solver import solve_head
from .surveying import Survey, Surveyor, Trunk
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
        with closing(_Job(base, task, method, config, accelerator, watch)) as job:
            saved = Checkpoint(Path(checkpoint), job.identity(), resume) if checkpoint is not None else None
            surveys = job.survey(saved)
            head_only = job.fit_head(surveys)
            if job.head_outcome.interrupted and job.patch.touches():
                raise KeyboardInterrupt  # the patch itself has not begun, so there is nothing to keep
            patch = job.new_patch(head_only)
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
        trunk_kept=job.uses_cache(surveys),
        notes=job.notes(),
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
        self.divergence = divergence_of(base, self.patch)
        assert task.train is not None
        self.sample = sample(task.train, base.preprocessing)
        precision = choose_precision(config.precision, base, self.sample.images.to(base.device))
        prepared = precision.prepared(base)
        with precision.context():
            split = None if self.divergence is None else split_before(prepared, self.divergence)
        if config.feature_noise and split is None and self.divergence is not None:
            raise DeltapatchError(
                f"feature_noise needs a base that can be cut at {self.divergence}, and {base.name} cannot;"
                " leave it out"
            )
        self.trunk = Trunk(prepared, split, precision)
        self.surveyor = Surveyor(self.trunk, config, watch.surveying)

    def survey(self, checkpoint: Checkpoint | None) -> dict[str, Survey]:
        """One pass of the base over training and validation images, and what is decided before it."""
        splits = {"train": self.task.train, "val": self.task.val}
        present = {name: images for name, images in splits.items() if images is not None and len(images)}
        # A resumed fit does not measure again: what it then decided could be another fit.
        state = None if checkpoint is None else checkpoint.load()
        decided = None if state is None else Decision(*state["cache"])
        surveys = self.surveyor.survey(present, self.divergence, self.sample, decided)
        if checkpoint is not None:
            checkpoint.notes["cache"] = [self.surveyor.decision.keeps, self.surveyor.decision.why]
        for line in self.notes():
            self.watch.say(line)
        if not len(surveys["train"].labels):
            raise DataError(f"{self.task.name}: none of its training images could be read")
        return surveys

    def notes(self) -> tuple[str, str]:
        """What was decided about cache and precision, and why."""
        precision = self.trunk.precision
        return str(self.surveyor.decision), f"precision {precision.name}: {precision.why}"

    def uses_cache(self, surveys: dict[str, Survey]) -> bool:
        """Whether the patch is fitted on activations from the cache."""
        return self.trunk.split is not None and all(found.cache is not None for found in surveys.values())

    def close(self) -> None:
        """Lets go of the caches."""
        self.surveyor.close()

    def class_weights(self, labels: Tensor) -> Tensor | None:
        """Inverse of each class's share, 1 on average over the images; None unless balancing was asked
        for.
        """
        if not self.config.balance:
            return None
        counts = torch.bincount(labels, minlength=len(self.task.classes)).clamp_min(1)
        return len(labels) / (len(self.task.classes) * counts.float())

    def fit_head(self, surveys: dict[str, Survey]) -> Patch:
        """The head method's patch, solved on the features of the survey."""
        head_only = make_method("head").build(self.base, self.task.classes, seed=self.config.seed)
        assert head_only.head is not None
        train_part, val_part = surveys["train"], surveys.get("val")
        self.head_outcome = solve_head(
            head_only.head,
            (train_part.features, train_part.labels),
            None if val_part is None else (val_part.features, val_part.labels),
            class_weights=self.class_weights(train_part.labels),
            label_smoothing=self.config.label_smoothing,
            device=self.accelerator.device,
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
        model = self._model(patch)
        if self.config.compile:
            model.compile()
        return train(
            model,
            self._examples(surveys["train"], is_training=True),
            self._examples(surveys["val"], is_training=False) if "val" in surveys else None,
            replace(self.config, precision=self.trunk.precision.name),
            class_weights=self.class_weights(labels),
            checkpoint=checkpoint,
            progress=Progress(step=self.watch.step, epoch=self._finish_epoch),
            accelerator=self.accelerator,
        )

    def _model(self, patch: Patch) -> nn.Module:
        if self.trunk.split is None:
            return WholeModel(self.base, patch)
        return TailModel(self.trunk, patch, self.config.feature_noise)

    def _examples(self, found: Survey, is_training: bool) -> Examples:
        config = self.config
        if self.trunk.split is not None and found.cache is not None:
            seed, views = (config.seed, config.fixed_views or 1) if is_training else (None, 1)
            return CachedExamples(
                found.cache, found.images.rows, found.labels, config.batch_size, seed, views
            )
        images = ImageExamples(
            load_batches(
                self._prepared(found.images, is_training),
                batch_size=config.batch_size,
                shuffle=is_training,
                seed=config.seed,
                workers=config.workers,
                on_bad=config.on_bad,
            )
        )
        return images if self.trunk.split is None else TrunkExamples(images, self.trunk)

    def _prepared(self, images: ImageSet, is_training: bool) -> ImageSet:
        preprocessing, views = self.base.preprocessing, self.config.fixed_views
        if not is_training or views == 1:
            return images.with_transform(evaluation_transform(preprocessing))
        if views is None:
            return images.with_transform(training_transform(preprocessing, self.config.augment))
        return images.with_views(preprocessing, self.config.augment, views)

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
            cache=self.notes()[0],
            precision=self.notes()[1],
        )
        patch.info = patch.info.model_copy(update={"fitted_on": fitted_on, "figures": figures})


def _random_state_kept() -> AbstractContextManager[Any]:
    """The caller's random numbers go on after a fit as if it had not been."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
