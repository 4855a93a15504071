"""The four protocols of patching: one task, several at once, one after the other, and side by side."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...base import Base, fingerprint
from ...data import TaskData
from ...errors import DataError, DeltapatchError
from ...fitting.config import FitConfig
from ...method import Method
from ...patch import Patch
from .measuring import Column, Measurement, Measuring
from .scores import AccuracyMatrix, Score, score_of
from .splits import Split, check_tasks, first_classes, images_to_measure, joint_task
from .steps import Step, count_parameters, take_steps
from .supporting import Supporting

Protocol = Literal["single-task", "joint", "sequential", "parallel"]


@dataclass(frozen=True, eq=False)
class ProtocolResult:
    """What a protocol gave.

    Attributes:
        protocol: which one.
        method: name of the patch method.
        tasks: names of the patching tasks, in order.
        steps: the patches after each step; for "joint" one step, whose patch answers for all tasks.
        matrix: the accuracy on every task after every step.
        measurements: task -> what the last row counts: which split, how many images, how many unreadable.
        concatenated: for "joint" the accuracy on the images of all tasks together, else None.
        seconds: wall-clock time of learning, without measuring.
        parameters: how many parameters the patches of the last step have, without their heads; weights that
            they share are counted once.
        head_parameters: how many their heads have.
    """

    protocol: Protocol
    method: str
    tasks: tuple[str, ...]
    steps: tuple[Step, ...]
    matrix: AccuracyMatrix
    measurements: Mapping[str, Measurement]
    concatenated: float | None
    seconds: float
    parameters: int
    head_parameters: int

    def score(self, score: Score) -> float:
        """One number for the end of the protocol, the supporting task among the others where there is one.

        In joint patching the patching tasks count as the one task that they were learned as.
        """
        if self.concatenated is None:
            return self.matrix.score(score)
        supporting = list(self.matrix.final().values())[: int(self.matrix.has_supporting)]
        return score_of([*supporting, self.concatenated], score)


def single_task(
    base: Base,
    task: TaskData,
    method: Method,
    config: FitConfig | None = None,
    supporting: Supporting | None = None,
    *,
    on: Split = "test",
) -> ProtocolResult:
    """Single-task patching: one patch for one task.

    Args:
        base: the frozen model.
        task: the patching task.
        method: what kind of patch.
        config: how to fit it.
        supporting: the base's own task, whose accuracy is measured as well; methods that share weights
            among tasks choose by its validation images.
        on: the split whose images are looked at once, after everything was learned; a task without test
            images is measured on its validation images, and the result says so.

    Raises:
        DataError: there are no training images, or none to measure on, or two tasks have the same name.
        AnatomyError: the method finds no place in the base.

    Example:
        >>> result = single_task(base, birds, Delta(modules=1), supporting=Supporting("ImageNet", images))
        >>> print(result.matrix.as_markdown())
        | after | ImageNet | birds |
        | --- | ---: | ---: |
        | base | 68.87 | – |
        | birds | 68.87 | 94.14 |
        >>> result.score("harmonic")
        0.7954...
    """
    return _run("single-task", base, [task], method, config, supporting, on)


def joint(
    base: Base,
    tasks: Sequence[TaskData],
    method: Method,
    config: FitConfig | None = None,
    supporting: Supporting | None = None,
    *,
    on: Split = "test",
) -> ProtocolResult:
    """Joint patching: one patch, with one head for the classes of all tasks, for all their images.

    An answer is right if it is the right class among those of all tasks: nobody says which task an image
    belongs to. The arguments and errors are those of `single_task`.
    """
    return _run("joint", base, tasks, method, config, supporting, on)


def sequential(
    base: Base,
    tasks: Sequence[TaskData],
    method: Method,
    config: FitConfig | None = None,
    supporting: Supporting | None = None,
    *,
    on: Split = "test",
) -> ProtocolResult:
    """Sequential patching: the tasks arrive one after the other, in the order given.

    Which task an image belongs to is known, and that task's patch answers. The arguments and errors are
    those of `single_task`.
    """
    return _run("sequential", base, tasks, method, config, supporting, on)


def parallel(
    base: Base,
    tasks: Sequence[TaskData],
    method: Method,
    config: FitConfig | None = None,
    supporting: Supporting | None = None,
    *,
    on: Split = "test",
) -> ProtocolResult:
    """Parallel patching: each task is learned from the base alone, and then all are put together.

    Which task an image belongs to is known, as in `sequential`. Where a method gives each task a patch of
    its own there is nothing to put together: each is the patch of `single_task`. The arguments and errors
    are those of `single_task`.
    """
    return _run("parallel", base, tasks, method, config, supporting, on)


def _run(
    protocol: Protocol,
    base: Base,
    tasks: Sequence[TaskData],
    method: Method,
    config: FitConfig | None,
    supporting: Supporting | None,
    on: Split,
) -> ProtocolResult:
    config = config or FitConfig()
    together = joint_task(tasks) if protocol == "joint" else None
    # Before anything is learned, since hours later is late to hear that there are no images to measure on.
    columns = _columns(tasks, together, supporting, on)
    started = time.perf_counter()
    steps = _unchanged(
        base,
        take_steps(
            "parallel" if protocol == "parallel" else "sequential",
            base,
            tasks if together is None else [together],
            method,
            config,
            None if supporting is None else supporting.validation,
        ),
    )
    seconds = time.perf_counter() - started
    measuring = Measuring(base, config.workers)
    matrix = measuring.matrix(columns, steps)
    last = {column.name: measuring.measure(column, steps[-1]) for column in columns}
    measurements = {name: found for name, found in last.items() if found is not None}
    parameters, head_parameters = count_parameters(steps[-1].patches)
    return ProtocolResult(
        protocol=protocol,
        method=method.name,
        tasks=tuple(task.name for task in tasks),
        steps=steps,
        matrix=matrix,
        measurements=measurements,
        concatenated=None if together is None else _pooled([measurements[task.name] for task in tasks]),
        seconds=seconds,
        parameters=parameters,
        head_parameters=head_parameters,
    )


def _columns(
    tasks: Sequence[TaskData], together: TaskData | None, supporting: Supporting | None, on: Split
) -> list[Column]:
    """The supporting task and every patching task; in joint patching with the labels of the joint head."""
    check_tasks(tasks)
    columns: list[Column] = []
    if supporting is not None:
        if supporting.name in {task.name for task in tasks}:
            raise DataError(
                f"the supporting task and a patching task are both called '{supporting.name}'; give each its"
                " own name."
            )
        columns.append(Column(supporting.name, supporting.images, "given", None))
    for task, first_class in zip(tasks, first_classes(tasks), strict=True):
        images, measured_on = images_to_measure(task, on)
        if together is not None:
            images = images.with_labels(images.labels + first_class)
        columns.append(
            Column(task.name, images, measured_on, task.name if together is None else together.name)
        )
    return columns


def _unchanged(base: Base, steps: Iterator[Step]) -> tuple[Step, ...]:
    """All steps, with the certainty that none changed the base or a patch of an earlier one.

    They are measured after the last: what was changed since would be measured as it is now, and forgetting
    would not be seen.
    """
    was: dict[Base | Patch, str] = {base: fingerprint(base.module)}
    taken: list[Step] = []
    for step in steps:
        taken.append(step)
        for patch in _patches(step):
            if patch not in was:
                was[patch] = fingerprint(patch)
    for model, digest in was.items():
        if fingerprint(model.module if isinstance(model, Base) else model) != digest:
            name = f"base {base.name}" if isinstance(model, Base) else f"a patch of {base.name}"
            raise DeltapatchError(
                f"{name} was changed by a later step of the protocol, so its accuracies would not be those"
                " of its own step; load the base anew and report the method as faulty."
            )
    return tuple(taken)


def _patches(step: Step) -> list[Patch]:
    return [*step.patches.values(), *([] if step.supporting is None else [step.supporting])]


def _pooled(measurements: Sequence[Measurement]) -> float:
    """The accuracy on all images together."""
    return sum(found.right for found in measurements) / sum(found.images for found in measurements)
