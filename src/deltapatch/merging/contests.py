"""What goes into a merge beside what comes out of it: how right each is on every task."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..base import Base
from ..data import ImageSet
from ..evaluation.answers import answer
from ..method import make_method
from ..patch import Patch
from .distilling import Check
from .gathering.batches import ImageBatches
from .gathering.norm_statistics import re_estimate_norms
from .patch_heads import Heads, headed
from .patches import merge_patches
from .rules import Merge
from .running import RunOptions, merge
from .sources import MemorySource, MergeError, ModelLike, Source, open_source, open_sources

Maker = Callable[[int | None], Base]
"""Makes the architecture with random weights, for so many classes or its own."""


@dataclass(frozen=True)
class LabelledImages:
    """Images of one task, with labels that count its classes.

    Attributes:
        name: of the task.
        classes: names of its classes.
        images: the images.
    """

    name: str
    classes: tuple[str, ...]
    images: ImageSet


class Contest(ABC):
    """Things that are merged, and what they and a result of theirs are worth on tasks.

    Attributes:
        inputs: name -> what `accuracy` takes: the base, where there is one, and what is merged, in order.
    """

    inputs: Mapping[str, Any]

    @abstractmethod
    def merged(self, how: Merge) -> Any:
        """The result of a merge, in memory, for `accuracy`."""

    @abstractmethod
    def accuracy(self, model: Any, task: int, data: LabelledImages) -> float:
        """The part of a task's images that a model answers right, with the head of that task's input."""

    @abstractmethod
    def check_tasks(self, count: int) -> None:
        """Raises MergeError unless there can be so many tasks."""

    def row(self, model: Any, tasks: Sequence[LabelledImages]) -> tuple[float, ...]:
        """A model's accuracy on every task."""
        return tuple(self.accuracy(model, task, data) for task, data in enumerate(tasks))


class CheckpointContest(Contest):
    """Whole models of one architecture.

    Tensors that are not merged (`RunOptions.skip`) are heads: on task i every model has those of input i.
    Where nothing is left out, each model answers with its own.
    """

    def __init__(
        self,
        make: Maker,
        models: Sequence[ModelLike],
        base: ModelLike | None,
        run: RunOptions,
        images: Sequence[ImageSet] = (),
    ) -> None:
        """Opens the models.

        Args:
            make: makes the architecture.
            models: what is merged.
            base: what they were fine-tuned from.
            run: how merges are carried out.
            images: of all tasks, on which norm statistics of results are re-estimated; none leaves them.
        """
        self.sources = open_sources(models)
        self.base = None if base is None else open_source(base, "the base")
        self.run = run
        self.images = images
        own = {} if self.base is None else {"base": self.base}
        self.inputs: Mapping[str, Source] = own | dict(zip(_names(self.sources), self.sources, strict=True))
        self._make = make
        self._bases: dict[int, Base] = {}

    def check_tasks(self, count: int) -> None:
        if self.run.skip and count != len(self.sources):
            raise MergeError(
                f"{count} tasks were given for {len(self.sources)} models, each with a head of its own;"
                " give the data of every model's task, in their order"
            )

    def merged(self, how: Merge) -> Source:
        tensors = merge(how, self.sources, self.base, run=self.run)
        return self.with_norms(MemorySource(tensors, "the merged model"))

    def with_norms(self, model: Source) -> Source:
        """The model with re-estimated norm statistics, where there are images."""
        if not self.images:
            return model
        base = self.loaded(model, 0)
        found = re_estimate_norms(base.module, ImageBatches(self.images, base))
        tensors = {name: found.get(name, model.whole(name)) for name in model.specs}
        return MemorySource(tensors, model.label)

    def accuracy(self, model: Source, task: int, data: LabelledImages) -> float:
        answers = answer(self.loaded(model, task), data.images)
        outputs = answers.probabilities.shape[1]
        if len(data.classes) > outputs:
            raise MergeError(
                f"{data.name} has {len(data.classes)} classes, but the head for it has {outputs} outputs;"
                " give the tasks' data in the order of the models"
            )
        return _right(answers.probabilities, answers.labels, data.name)

    @torch.no_grad()
    def loaded(self, model: Source, task: int) -> Base:
        """The architecture with a model's tensors and a task's head; the next call changes it again."""
        head = self.sources[task] if self.run.skip else model
        if task not in self._bases:
            self._bases[task] = self.architecture_for(head)
        base = self._bases[task]
        for name, tensor in base.module.state_dict().items():
            is_skipped = any(fnmatchcase(name, pattern) for pattern in self.run.skip)
            source = head if is_skipped else model
            spec = source.specs.get(name)
            if spec is None and name.endswith("num_batches_tracked"):
                continue
            if spec is None or spec.shape != tuple(tensor.shape):
                found = "no such tensor" if spec is None else f"one of shape {spec.shape}"
                raise MergeError(
                    f"the architecture has a tensor '{name}' of shape {tuple(tensor.shape)}, and"
                    f" {source.label} has {found}; give the architecture of the models"
                )
            tensor.copy_(source.whole(name))
        return base

    def architecture_for(self, head: Source) -> Base:
        """The architecture with random weights and as many classes as a model's head has, if it has one."""
        base = self._make(None)
        others = {
            head.specs[name].shape[:1]
            for name, tensor in base.module.state_dict().items()
            if name in head.specs and head.specs[name].shape != tuple(tensor.shape)
        }
        if len(others) == 1 and (number := others.pop()):
            return self._make(number[0])
        return base


class PatchContest(Contest):
    """Patches of one base; on task i every body answers with the head of patch i."""

    def __init__(
        self,
        base: Base,
        patches: Mapping[str, Patch],
        run: RunOptions,
        heads: Heads = "own",
        images: Sequence[ImageSet] | None = None,
    ) -> None:
        """Takes the patches.

        Args:
            base: of all of them.
            patches: name -> patch.
            run: how merges are carried out.
            heads: what becomes of their heads.
            images: of each patch's task, on which norm statistics are re-estimated.
        """
        self.base = base
        self.patches = dict(patches)
        self.run = run
        self.heads: Heads = heads
        self.images = images
        alone = make_method("head").build(base)
        self.inputs: Mapping[str, Patch] = {"base": alone, **self.patches}

    def check_tasks(self, count: int) -> None:
        if count != len(self.patches):
            raise MergeError(
                f"{count} tasks were given for {len(self.patches)} patches; give the data of every patch's"
                " task, in their order"
            )
        headless = next((name for name, patch in self.patches.items() if patch.head is None), None)
        if headless is not None:
            raise MergeError(f"patch '{headless}' has no head, so it cannot be evaluated; leave that out")

    def merged(self, how: Merge) -> dict[str, Patch]:
        return merge_patches(
            self.base,
            list(self.patches.values()),
            how,
            names=list(self.patches),
            heads=self.heads,
            images=self.images,
            check=Check(epochs=0),
            run=self.run,
        )

    def accuracy(self, model: Patch | dict[str, Patch], task: int, data: LabelledImages) -> float:
        name = list(self.patches)[task]
        if isinstance(model, Patch):
            own = self.patches[name]
            assert own.head is not None
            patch = headed(model, own.classes, own.head)
        else:
            patch = model[name] if self.heads == "own" else model["merged"]
        images = data.images.with_labels(_places(patch, name, data)[data.images.labels])
        answers = answer(self.base, images, patch)
        return _right(answers.probabilities, answers.labels, data.name)


def _right(probabilities: NDArray[np.float32], labels: NDArray[np.int64], task: str) -> float:
    if not len(labels):
        raise MergeError(f"none of the images of {task} can be read, so nothing can be said of it")
    return float((probabilities.argmax(1) == labels).mean())


def _places(patch: Patch, name: str, data: LabelledImages) -> NDArray[np.int64]:
    """For each class of the task, its number among the patch's; a joint head may call it name/class."""
    place = {called: index for index, called in enumerate(patch.classes)}
    found = [place.get(called, place.get(f"{name}/{called}", -1)) for called in data.classes]
    if -1 in found:
        raise MergeError(
            f"{data.name} has the class '{data.classes[found.index(-1)]}', which patch '{name}' does not"
            " know; give the tasks' data in the order of the patches"
        )
    return np.array(found, np.int64)


def _names(sources: Sequence[Source]) -> list[str]:
    """What models are called in tables: their files' names where these differ."""
    short = [Path(source.label).stem for source in sources]
    if len({*short, "base", "merged"}) == len(sources) + 2:
        return short
    labels = [source.label for source in sources]
    return labels if len(set(labels)) == len(labels) else [f"{n}: {one}" for n, one in enumerate(labels, 1)]
