"""The steps of a protocol: after each, which patch answers for which task."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...base import Base
from ...data import ImageSet, TaskData
from ...errors import DeltapatchError
from ...fitting.config import FitConfig
from ...fitting.fit import fit_task
from ...method import Method
from ...patch import Patch


@dataclass(frozen=True, eq=False)
class Step:
    """Where a protocol stands after one task.

    Attributes:
        task: the task that was learned in this step.
        patches: task -> the patch that answers for it from now on, for all tasks learned so far.
        supporting: the patch without a head that is active when the base answers for its own task; None for
            the base alone.
    """

    task: str
    patches: Mapping[str, Patch]
    supporting: Patch | None

    def __post_init__(self) -> None:
        if self.supporting is not None and self.supporting.head is not None:
            raise DeltapatchError(
                f"after task '{self.task}' the base's own task is answered by a patch with"
                f" {len(self.supporting.classes)} classes of its own; give a patch without a head, or None."
            )


def take_steps(
    order: Literal["sequential", "parallel"],
    base: Base,
    tasks: Sequence[TaskData],
    method: Method,
    config: FitConfig,
    supporting: ImageSet | None,
) -> Iterator[Step]:
    """Learns one task after the other; what was learned before stays usable.

    A method that keeps the base frozen gives each task a patch of its own, from the base alone, so that the
    order makes no difference. Methods that share one set of weights among the tasks take their own steps.

    Args:
        order: what is done with several tasks, for methods that share weights.
        base: the frozen model.
        tasks: one or more.
        method: what kind of patch.
        config: how each is fitted.
        supporting: images of the base's own task that a method may choose by, labelled by the base's outputs;
            none of those that are measured on.

    Raises:
        KeyboardInterrupt: the user ended a fit; later tasks are not begun.
    """
    if method.shares_weights:
        # Imported here because only these methods need it.
        from ...fitting.interpolating import parallel_steps, sequential_steps

        steps = sequential_steps if order == "sequential" else parallel_steps
        for task, patches, supporting_patch in steps(base, tasks, method, config, supporting):
            yield Step(task, dict(patches), supporting_patch)
        return
    learned: dict[str, Patch] = {}
    for task in tasks:
        result = fit_task(base, task, method, config, progress=False, supporting=supporting)
        if result.interrupted:
            raise KeyboardInterrupt
        learned = {**learned, task.name: result.patch}
        yield Step(task.name, learned, None)


def count_parameters(patches: Mapping[str, Patch]) -> tuple[int, int]:
    """How many parameters the patches of a step have without their heads, and in their heads.

    Where a method shares one set of weights among the tasks, it is counted once.
    """
    different = list({id(patch): patch for patch in patches.values()}.values())
    with_weights = different[:1] if different[0].method.shares_weights else different
    heads = sum(patch.num_parameters() - patch.num_parameters(head=False) for patch in different)
    return sum(patch.num_parameters(head=False) for patch in with_weights), heads
