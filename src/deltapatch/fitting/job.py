"""One fit, step by step: survey, head, statistics, training, and what the method makes of the result."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..base import Base
from ..data import ImageSet, TaskData, evaluation_transform, load_batches, training_transform
from ..errors import DataError, DeltapatchError
from ..info import FittedOn
from ..method import Judgement, Method, make_method
from ..normalising import Gathering
from ..patch import Patch
from ..split import divergence_of, split_before
from .answering import TailModel, WholeModel
from .checkpoint import Checkpoint
from .config import FitConfig
from .deciding import Decision, sample
from .examples import CachedExamples, Examples, ImageExamples, TrunkExamples
from .gathering import features_of, gather
from .history import Epoch
from .judging import score
from .loop import Outcome, Progress, Scored, train
from .precision import choose_precision
from .solver import solve_head
from .surveying import Survey, Surveyor, Trunk
from .watching import FitWatch


class Job:
    """One fit: base, data and options, and the steps that `fit_task` takes in order."""

    def __init__(
        self,
        base: Base,
        task: TaskData,
        method: Method,
        config: FitConfig,
        accelerator: Accelerator,
        watch: FitWatch,
        supporting: ImageSet | None = None,
        start: Patch | None = None,
        head: nn.Linear | None = None,
    ) -> None:
        self.base = base
        self.task = task
        self.method = method
        self.config = config
        self.accelerator = accelerator
        self.watch = watch
        self.supporting = supporting
        self.start = start
        self.head = head or method.starting_head(base, task.classes)
        self.head_outcome = Outcome()
        base.module.to(accelerator.device)
        self.patch = method.fitted_as().build(base, task.classes, seed=config.seed)
        if start is not None:
            self._start_from(start)
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
        val = surveys.get("val")
        self.head_outcome = self._solve(
            head_only.head,
            (surveys["train"].features, surveys["train"].labels),
            None if val is None else (val.features, val.labels),
        )
        return head_only.eval()

    def _solve(
        self,
        head: nn.Linear,
        training: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None,
    ) -> Outcome:
        return solve_head(
            head,
            training,
            validation,
            class_weights=self.class_weights(training[1]),
            label_smoothing=self.config.label_smoothing,
            device=self.accelerator.device,
        )

    def fit_patch(
        self, head_only: Patch, surveys: dict[str, Survey], checkpoint: Checkpoint | None
    ) -> Outcome:
        """Fits the job's patch: its statistics, its head, and then what trains."""
        patch, gathering = self.patch, self.method.gathering()
        if gathering is not None:
            self._gather(patch, gathering, [self.task.train])
        if not any(True for _ in patch.parts.parameters()):
            return self._fit_head_alone(head_only, surveys)
        if self.head is not None:
            self._take_head(self.head)
        elif self.config.start_from_head and gathering is None:
            self._take_head(head_only.head)
        elif self.config.start_from_head:
            self._solve_on_patch(patch, surveys)
        return self._train(patch, surveys, checkpoint)

    def _fit_head_alone(self, head_only: Patch, surveys: dict[str, Survey]) -> Outcome:
        """The head of a patch whose parts do not train: the one that was given, or a solved one."""
        if self.head is not None:
            self._take_head(self.head)
            return Outcome(score=self._validation_score())
        if self.patch.touches():
            return self._solve_on_patch(self.patch, surveys)
        self._take_head(head_only.head)
        return self.head_outcome

    def finished(self, outcome: Outcome) -> Patch:
        """The fitted patch as its method makes it; the outcome's score becomes that patch's."""
        fitted = self.patch
        self.patch = self.method.finished(fitted, self.base, self).eval()
        if self.patch is not fitted:
            outcome.score = self._validation_score()
        return self.patch

    def _validation_score(self) -> Scored | None:
        if self.task.val is None or not len(self.task.val):
            return None
        return score(self.base, self.patch, self.task.val, self.config.batch_size)

    def judge(self, patch: Patch) -> Judgement | None:
        """Accuracies on the validation images and, where there are some, on those of the supporting task."""
        size, supporting = self.config.batch_size, self.supporting
        if self.task.val is None or not len(self.task.val):
            return None
        found = None if supporting is None else score(self.base, patch, supporting, size, headless=True)
        own = score(self.base, patch, self.task.val, size).accuracy
        return Judgement(own, None if found is None else found.accuracy)

    def gather(self, patch: Patch, gathering: Gathering) -> None:
        """Gathers the statistics of the patch's norms on the training and the supporting images: both tasks
        are answered with them.
        """
        self._gather(patch, gathering, [self.task.train, self.supporting])

    def _gather(self, patch: Patch, gathering: Gathering, images: Sequence[ImageSet | None]) -> None:
        present = [found for found in images if found is not None]
        gather(self.base, patch, present, gathering, seed=self.config.seed)

    def _start_from(self, start: Patch) -> None:
        try:
            self.patch.parts.load_state_dict(start.parts.state_dict())
        except RuntimeError as error:
            raise DeltapatchError(
                f"a {start.method.name} patch of other sites or options cannot be the start of this"
                f" {self.method.name} patch: {error}"
            ) from error

    def _take_head(self, head: nn.Linear | None) -> None:
        assert self.patch.head is not None
        assert head is not None
        self.patch.head.load_state_dict(head.state_dict())

    def _solve_on_patch(self, patch: Patch, surveys: dict[str, Survey]) -> Outcome:
        """Solves the patch's head on the features that its parts, as they are, make of the images."""
        assert patch.head is not None
        rows = {name: self._patched(patch, found) for name, found in surveys.items()}
        return self._solve(patch.head, rows["train"], rows.get("val"))

    def _patched(self, patch: Patch, found: Survey) -> tuple[Tensor, Tensor]:
        """Features and labels of the images that can be read, with the patch's parts active."""
        prepared = found.images.with_transform(evaluation_transform(self.base.preprocessing))
        features: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in load_batches(
            prepared, batch_size=self.config.batch_size, shuffle=False, workers=self.config.workers
        ):
            if len(batch.labels):
                features.append(features_of(self.base, patch, batch.images).cpu())
                labels.append(batch.labels)
        empty = torch.zeros(0, self.base.anatomy.head.features)
        return torch.cat([empty, *features]), torch.cat([torch.zeros(0, dtype=torch.int64), *labels])

    def _train(self, patch: Patch, surveys: dict[str, Survey], checkpoint: Checkpoint | None) -> Outcome:
        model = self._model(patch)
        if self.config.compile:
            model.compile()
        assert patch.head is not None
        patch.head.requires_grad_(self.config.train_head)
        rates = {
            parameter: self.method.learning_rate_of(site)
            for site, part in zip(patch.sites, patch.parts, strict=True)
            for parameter in part.parameters()
        }
        outcome = train(
            model,
            self._examples(surveys["train"], is_training=True),
            self._examples(surveys["val"], is_training=False) if "val" in surveys else None,
            replace(self.config, precision=self.trunk.precision.name),
            class_weights=self.class_weights(surveys["train"].labels),
            checkpoint=checkpoint,
            progress=Progress(step=self.watch.step, epoch=self._finish_epoch),
            accelerator=self.accelerator,
            rates=rates,
        )
        patch.head.requires_grad_(True)
        return outcome

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
            None if self.start is None else _digest(self.start),
            None if self.head is None else _digest(self.head),
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
        figures = {**patch.info.figures, **figures}
        patch.info = patch.info.model_copy(update={"fitted_on": fitted_on, "figures": figures})


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
