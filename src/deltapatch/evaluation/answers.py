"""What a base and a patch answer on labelled or unlabelled images, and the skip weights that they used."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base import Base
from ..data import BadImage, ImageSet, evaluation_transform, load_batches
from ..methods.delta import StagePart
from ..patch import Patch
from ..patched import PatchedModel
from ..skipping import existing_skips
from .metrics import Evaluation
from .report import SkipWeights

_NAME = "evaluated"


@dataclass(frozen=True)
class Answers:
    """Answers for the images that could be read.

    Attributes:
        probabilities: float32 of shape (N, classes).
        labels: int64 of shape (N,); -1 where an image has none.
        indices: which image of the set each row is, shape (N,).
        bad: the images without a row.
        skip_weights: for each stage that has a Δ-module, the weights that each image got, shape (N, skips).
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    bad: tuple[BadImage, ...]
    skip_weights: tuple[NDArray[np.float32], ...]


def answer(
    base: Base,
    images: ImageSet,
    patch: Patch | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Runs all images, in order, through the base with the patch, or through the base alone.

    A patch's own preprocessing is used, whatever the base's is.
    """
    model = PatchedModel(base)
    if patch is not None:
        model.add_patch(_NAME, patch)
    preprocessing = base.preprocessing if patch is None else patch.info.preprocessing
    batches = load_batches(
        images.with_transform(evaluation_transform(preprocessing)),
        batch_size=batch_size,
        shuffle=False,
        workers=workers,
    )
    probabilities: list[Tensor] = []
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    bad: list[BadImage] = []
    with torch.inference_mode(), _noted_skip_weights(patch) as weights:
        for batch in batches.epoch(0):
            bad.extend(batch.bad)
            if len(batch.labels):
                logits = model(
                    batch.images.to(base.device, base.dtype), patch=None if patch is None else _NAME
                )
                probabilities.append(logits.float().softmax(1).cpu())
                labels.append(batch.labels)
                indices.append(batch.indices)
            advance(len(batch.labels) + len(batch.bad))
    width = len(base.classes if patch is None or patch.head is None else patch.classes)
    return Answers(
        probabilities=torch.cat(probabilities).numpy() if probabilities else np.zeros((0, width), np.float32),
        labels=torch.cat(labels).numpy() if labels else np.zeros(0, np.int64),
        indices=torch.cat(indices).numpy() if indices else np.zeros(0, np.int64),
        bad=tuple(bad),
        skip_weights=tuple(torch.cat(stage).numpy() for stage in weights if stage),
    )


def evaluate(base: Base, images: ImageSet, patch: Patch | None = None, **options: int) -> Evaluation:
    """Figures of a patch on labelled images; without a head of its own, or without a patch, of the base.

    Where the base answers, a label is the number of one of its outputs.

    Raises:
        DeltapatchError: no image could be read, or a label is not a class of the patch or base.
    """
    answers = answer(base, images, patch, **options)  # pyright: ignore[reportArgumentType]
    if patch is not None and patch.head is not None:
        return as_evaluation(patch, answers)
    # A module that was given as an object may have no names for its outputs.
    classes = base.classes or tuple(str(number) for number in range(answers.probabilities.shape[1]))
    return Evaluation(classes, answers.labels, answers.probabilities, skipped=len(answers.bad))


def as_evaluation(patch: Patch, answers: Answers) -> Evaluation:
    """The answers with the names of the patch's classes and the number of images that could not be read."""
    return Evaluation(patch.classes, answers.labels, answers.probabilities, skipped=len(answers.bad))


def skip_weights(patch: Patch, answers: Answers) -> tuple[SkipWeights, ...]:
    """Mean, spread and per-class mean of the skip weights, stage by stage; empty for methods without a
    Δ-module.
    """
    stages = [part.stage for part in patch.parts if isinstance(part, StagePart)]
    classes = range(len(patch.classes))
    result: list[SkipWeights] = []
    for stage, weights in zip(stages, answers.skip_weights, strict=True):
        count = len(stage.sub_blocks)
        of_class = [weights[answers.labels == label] for label in classes]
        existing = _as_matrix(existing_skips(stage).numpy().astype(float), count) == 1
        result.append(
            SkipWeights(
                stage=stage.path,
                sub_blocks=count,
                mean=_as_matrix(weights.mean(0), count),
                spread=_as_matrix(weights.std(0), count),
                existing=existing,
                per_class=np.stack(
                    [
                        _as_matrix(w.mean(0) if len(w) else np.full(stage.skips, np.nan), count)
                        for w in of_class
                    ]
                ),
            )
        )
    return tuple(result)


def _as_matrix(values: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """Skips in the order (1, 0), (2, 0), (2, 1), ... as entries [target - 1, source]; NaN where there is
    none.
    """
    matrix = np.full((count, count), np.nan)
    matrix[np.tril_indices(count)] = values
    return matrix


@contextmanager
def _noted_skip_weights(patch: Patch | None) -> Generator[list[list[Tensor]]]:
    """While it lasts, what each Δ-module of the patch gives is appended, after its sigmoid, stage by
    stage.
    """
    parts = [] if patch is None else [part for part in patch.parts if isinstance(part, StagePart)]
    noted: list[list[Tensor]] = [[] for _ in parts]

    def note_into(rows: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
        def note(module: nn.Module, inputs: object, output: Tensor) -> None:
            rows.append(torch.sigmoid(output.float()).cpu())

        return note

    handles = [
        part.delta.register_forward_hook(note_into(rows)) for part, rows in zip(parts, noted, strict=True)
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
