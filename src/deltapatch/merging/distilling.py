"""Whether a merged patch still answers as those that it was made of, and what teaches it if it does not."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.optim.lr_scheduler import OneCycleLR

from ..base import Base
from ..data import ImageSet, evaluation_transform, load_batches
from ..errors import DataError, DeltapatchError
from ..evaluation.answers import answer
from ..fitting.answering import TailModel, WholeModel
from ..fitting.config import FitConfig
from ..fitting.deciding import sample
from ..fitting.examples import CachedExamples, Examples, ImageExamples, Step, TrunkExamples
from ..fitting.history import Epoch
from ..fitting.precision import Precision
from ..fitting.surveying import Survey, Surveyor, Trunk
from ..fitting.watching import FitWatch
from ..method import Method
from ..patch import Patch
from ..split import divergence_of, split_before

_CHECKED = 3
"""One image of so many is only checked on, the others are taught with."""


@dataclass(frozen=True)
class Check:
    """What is asked of a merged patch, and how it is taught where it falls short.

    Attributes:
        agreement: on how large a part of each patch's images the merged patch has to give the same answer as
            that patch, from 0 to 1.
        epochs: of the distillation where it does not; 0 never distils.
        batch_size: images of each patch in a step.
        learning_rate: the highest of the one-cycle schedule; None leaves it to the method.
        seed: of the order of the images.
    """

    agreement: float = 0.9
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "agreement": 0 <= self.agreement <= 1,
            "epochs": self.epochs >= 0,
            "batch_size": self.batch_size >= 1,
            "learning_rate": self.learning_rate is None or 0 < self.learning_rate < float("inf"),
            "seed": 0 <= self.seed < 2**32,
        }
        wrong = next((field for field, holds in allowed.items() if not holds), None)
        if wrong is not None:
            raise DeltapatchError(f"{wrong} of a check cannot be {getattr(self, wrong)}")


@dataclass(frozen=True)
class Lesson:
    """One patch's answers for images of its own task, as the merged patch should give them.

    Attributes:
        name: of the patch.
        teaching: images, labelled by their rows in ``answers``.
        checking: others, labelled in the same way; the same one where there is only one.
        answers: probabilities, shape (N, outputs).
        columns: which of the merged patch's outputs these are.
    """

    name: str
    teaching: ImageSet
    checking: ImageSet
    answers: Tensor
    columns: slice


def lesson_of(
    base: Base, name: str, patch: Patch, images: ImageSet, columns: slice, outputs: int | None
) -> Lesson:
    """What a patch answers on its images; those that cannot be read are left out.

    Args:
        base: the base.
        name: of the patch.
        patch: with a head.
        images: of its task; labels are not looked at.
        columns: which of the merged patch's outputs stand for the patch's classes.
        outputs: how many outputs the merged patch has, where it has to tell the patch's classes from all
            others too; None where it is only asked for these.

    Raises:
        DataError: no image can be read.
    """
    found = answer(base, images, patch)
    if not len(found.indices):
        raise DataError(f"none of the images for patch '{name}' can be read, so it cannot be compared")
    readable = images.subset(found.indices).with_labels(np.arange(len(found.indices)))
    is_checked = np.arange(len(readable)) % _CHECKED == 0
    taught = np.flatnonzero(~is_checked) if not is_checked.all() else np.arange(len(readable))
    answers = torch.from_numpy(found.probabilities)
    if outputs is not None:
        among_all = torch.zeros(len(answers), outputs)
        among_all[:, columns] = answers
        answers, columns = among_all, slice(0, outputs)
    checked = readable.subset(np.flatnonzero(is_checked))
    return Lesson(name, readable.subset(taught), checked, answers, columns)


def agreements(base: Base, student: Patch, lessons: Sequence[Lesson]) -> dict[str, float]:
    """For each lesson the part of its checking images on which the student's answer is the one asked for."""
    found: dict[str, float] = {}
    for lesson in lessons:
        answers = answer(base, lesson.checking, student)
        given = answers.probabilities[:, lesson.columns].argmax(1)
        asked = lesson.answers[torch.from_numpy(answers.labels)].argmax(1).numpy()
        found[lesson.name] = float((given == asked).mean())
    return found


def distil(base: Base, student: Patch, lessons: Sequence[Lesson], check: Check, watch: FitWatch) -> None:
    """Trains the student's parameters, in place, to give the answers of the lessons.

    It minimises the mean over images of KL(asked ‖ given). Each step has images of every lesson, so that
    norms which follow their batches see all tasks. The trunk runs once an image where the base can be cut
    before the patch and keeping its activations saves time.

    Raises:
        KeyboardInterrupt: the user ended it; the student is then half-taught.
    """
    divergence = divergence_of(base, student)
    split = None if divergence is None else split_before(base, divergence)
    trunk = Trunk(base, split, Precision(False, base.device.type, "distillation is in fp32"))
    model: nn.Module = WholeModel(base, student) if split is None else TailModel(trunk, student)
    config = FitConfig(
        epochs=check.epochs,
        batch_size=check.batch_size,
        precision="fp32",
        cache_dtype="fp32",
        seed=check.seed,
    )
    splits = {lesson.name: lesson.teaching for lesson in lessons}
    few = sample(lessons[0].teaching, base.preprocessing)
    with closing(Surveyor(trunk, config, watch.surveying)) as surveyor:
        surveys = surveyor.survey(splits, divergence, few, None)
        examples = [_examples(surveys[lesson.name], trunk, config) for lesson in lessons]
        _train(model, student, lessons, examples, check, watch)


def _train(
    model: nn.Module,
    student: Patch,
    lessons: Sequence[Lesson],
    examples: Sequence[Examples],
    check: Check,
    watch: FitWatch,
) -> None:
    groups = _rates(student, check)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = max(check.epochs * max(map(len, examples)), 2)
    schedule = OneCycleLR(optimizer, max_lr=[group["lr"] for group in groups], total_steps=steps + 1)
    for number in range(1, check.epochs + 1):
        model.train()
        started, images, total, same = time.perf_counter(), 0, 0.0, 0
        for index, batch in enumerate(_together(examples, number), start=1):
            count = sum(len(step.labels) for _, step in batch)
            if count == 1:
                continue  # one image has no batch statistics
            divergence, agreeing = _compared(model, batch, lessons)
            optimizer.zero_grad(set_to_none=True)
            (divergence / count).backward()
            optimizer.step()
            schedule.step()
            images, total, same = images + count, total + float(divergence.detach()), same + agreeing
            watch.step(number, index, images, total / images, same / images)
        rate = max(map(float, schedule.get_last_lr()))
        share = max(images, 1)
        seconds = time.perf_counter() - started
        watch.epoch(Epoch(number, total / share, same / share, None, None, rate, seconds))
    model.eval()


def _compared(
    model: nn.Module, batch: Sequence[tuple[int, Step]], lessons: Sequence[Lesson]
) -> tuple[Tensor, int]:
    """The sum over a batch of KL(asked ‖ given), and for how many images the most probable class agrees."""
    inputs = [torch.cat(tensors) for tensors in zip(*(step.inputs for _, step in batch), strict=True)]
    device = next(model.parameters()).device
    logits = model([tensor.to(device) for tensor in inputs]).float()
    divergence, agreeing = logits.new_zeros(()), 0
    rows = logits.split([len(step.labels) for _, step in batch])
    for answered, (place, step) in zip(rows, batch, strict=True):
        given = answered[:, lessons[place].columns]
        asked = lessons[place].answers[step.labels].to(device)
        divergence = divergence + kl_div(given.log_softmax(1), asked, reduction="sum")
        agreeing += int((given.argmax(1) == asked.argmax(1)).sum())
    return divergence, agreeing


def _together(examples: Sequence[Examples], number: int) -> Iterator[list[tuple[int, Step]]]:
    """A batch of every lesson at a time, with the lesson's place; of shorter ones as long as they last."""
    for steps in zip_longest(*(found.epoch(number) for found in examples)):
        yield [(place, step) for place, step in enumerate(steps) if step is not None]


def _examples(found: Survey, trunk: Trunk, config: FitConfig) -> Examples:
    if trunk.split is not None and found.cache is not None:
        return CachedExamples(found.cache, found.images.rows, found.labels, config.batch_size, config.seed)
    prepared = found.images.with_transform(evaluation_transform(trunk.base.preprocessing))
    images = ImageExamples(
        load_batches(prepared, batch_size=config.batch_size, shuffle=True, seed=config.seed)
    )
    return images if trunk.split is None else TrunkExamples(images, trunk)


def _rates(student: Patch, check: Check) -> list[dict[str, Any]]:
    """Parameters with the learning rates that a fit would give them."""
    groups: list[dict[str, Any]] = []
    for site, part in zip(student.sites, student.parts, strict=True):
        rate = check.learning_rate or student.method.learning_rate_of(site)
        groups.append({"params": list(part.parameters()), "lr": rate})
    assert student.head is not None
    rate = check.learning_rate or Method.learning_rate
    groups.append({"params": list(student.head.parameters()), "lr": rate})
    return [group for group in groups if group["params"]]
