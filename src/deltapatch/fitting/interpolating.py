"""PAINT with several tasks: one set of weights for all of them, and a head each.

In sequential patching task k is fine-tuned from θ_{k-1} and θ_k = θ_{k-1} + α (θ_fine-tuned - θ_{k-1}); in
parallel patching every task is fine-tuned from the base and θ = θ_0 + Σ_t α_t (θ_t - θ_0). What α, or the
α_t, are chosen for is the average validation accuracy of all tasks so far and of the supporting task.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import harmonic_mean, mean

import torch
from torch import Tensor

from ..base import Base
from ..data import ImageSet, TaskData
from ..errors import DataError, DeltapatchError
from ..method import Method
from ..methods.interpolate import Interpolate
from ..normalising import Gathering
from ..patch import Patch
from .config import FitConfig
from .fit import fit_task
from .gathering import gather
from .judging import score

MOST_ROUNDS = 3
"""Of the search over one α after the other in parallel patching."""

_OF_FINE_TUNING = ("interpolation/alpha",)

State = Mapping[str, Tensor]
Taken = tuple[str, Mapping[str, Patch], Patch]
"""The task that was learned, each task's patch from now on, and the one for the base's own task."""


def sequential_steps(
    base: Base,
    tasks: Sequence[TaskData],
    method: Method,
    config: FitConfig,
    supporting: ImageSet | None,
) -> Iterator[Taken]:
    """Learns the tasks one after the other, each from the weights that the one before ended with.

    Raises:
        DeltapatchError: the method is another one.
        DataError: a task has no validation images, so that no α can be chosen.
        KeyboardInterrupt: the user ended a fit.
    """
    method = _interpolate(method)
    weights: State | None = None
    heads: dict[str, Patch] = {}
    for number, task in enumerate(tasks, start=1):
        start = None if weights is None else _with_weights(heads[tasks[number - 2].name], weights)
        fitted = _fine_tuned(base, task, method, config, start)
        first = (
            dict(method.fitted_as().build(base, task.classes).parts.state_dict())
            if start is None
            else weights
        )
        assert first is not None
        end = dict(fitted.parts.state_dict())
        heads[task.name] = fitted
        judge = _Judge(base, tasks[:number], heads, method, supporting)
        grid = [step / (method.steps - 1) for step in range(method.steps)]
        grid = grid if method.alpha is None else [method.alpha]
        alpha, weights = judge.best((alpha, _between(first, end, alpha)) for alpha in grid)
        yield task.name, *judge.patches(weights, {"interpolation/alpha": alpha})


def parallel_steps(
    base: Base,
    tasks: Sequence[TaskData],
    method: Method,
    config: FitConfig,
    supporting: ImageSet | None,
) -> Iterator[Taken]:
    """Learns every task from the base alone and adds up what was learned; one step, after the last task.

    First one α for all tasks is searched on the grid, then each α_t in turn, as long as that is better.

    Raises:
        DeltapatchError: the method is another one.
        DataError: a task has no validation images, so that no α can be chosen.
        KeyboardInterrupt: the user ended a fit.
    """
    method = _interpolate(method)
    heads = {task.name: _fine_tuned(base, task, method, config, None) for task in tasks}
    start = dict(method.fitted_as().build(base).parts.state_dict())
    ends = [dict(heads[task.name].parts.state_dict()) for task in tasks]
    judge = _Judge(base, tasks, heads, method, supporting)

    def added(alphas: Sequence[float]) -> State:
        return _sum(start, ends, alphas)

    grid = [step / (method.steps - 1) for step in range(method.steps)]
    if method.alpha is not None:
        alphas = [method.alpha] * len(tasks)
        weights = judge.finished(added(alphas))
    else:
        alpha, weights = judge.best((alpha, added([alpha] * len(tasks))) for alpha in grid)
        alphas = [alpha] * len(tasks)
        weights = _coordinate_search(judge, added, alphas, grid, weights)
    figures = {
        f"interpolation/alpha/{task.name}"[:128]: alpha for task, alpha in zip(tasks, alphas, strict=True)
    }
    yield tasks[-1].name, *judge.patches(weights, figures)


def _coordinate_search(
    judge: "_Judge",
    added: Callable[[Sequence[float]], State],
    alphas: list[float],
    grid: Sequence[float],
    weights: State,
) -> State:
    """Changes one α after the other, in place, while that is better; returns the best weights."""
    best = judge.value(weights)
    for _ in range(MOST_ROUNDS if len(alphas) > 1 else 0):
        before = list(alphas)
        for task in range(len(alphas)):
            for alpha in grid:
                tried = [*alphas[:task], alpha, *alphas[task + 1 :]]
                candidate = judge.finished(added(tried))
                value = judge.value(candidate)
                if value > best:
                    best, weights, alphas[:] = value, candidate, tried
        if alphas == before:
            break
    return weights


def _interpolate(method: Method) -> Interpolate:
    if not isinstance(method, Interpolate):
        raise DeltapatchError(
            f"the {method.name} method does not interpolate weights, so there is no α to choose; give the"
            " interpolate method"
        )
    return method


class _Judge:
    """How good one set of weights is for all tasks so far, each answered with its own head."""

    def __init__(
        self,
        base: Base,
        tasks: Sequence[TaskData],
        heads: Mapping[str, Patch],
        method: Interpolate,
        supporting: ImageSet | None,
    ) -> None:
        self.base = base
        self.tasks = tasks
        self.heads = dict(heads)
        self.method = method
        self.supporting = supporting
        for task in tasks:
            if task.val is None or not len(task.val):
                raise DataError(f"{task.name} has no validation images, on which α could be chosen; add some")

    def best(self, candidates: Iterator[tuple[float, State]]) -> tuple[float, State]:
        """The candidate that is best; the first of equals."""
        found: tuple[float, State] | None = None
        highest = -1.0
        for alpha, weights in candidates:
            finished = self.finished(weights)
            value = self.value(finished)
            if value > highest:
                highest, found = value, (alpha, finished)
        assert found is not None
        return found

    def finished(self, weights: State) -> State:
        """The weights, with statistics of all that they answer for where the method wants that."""
        if self.method.statistics != "re-estimated":
            return weights
        patch = _with_weights(next(iter(self.heads.values())), weights)
        images = [task.train for task in self.tasks if task.train is not None]
        images += [] if self.supporting is None else [self.supporting]
        gather(self.base, patch, images, Gathering())
        return dict(patch.parts.state_dict())

    def value(self, weights: State) -> float:
        """The average accuracy."""
        accuracies: list[float] = []
        for task in self.tasks:
            assert task.val is not None
            patch = _with_weights(self.heads[task.name], weights)
            accuracies.append(score(self.base, patch, task.val).accuracy)
            if self.supporting is not None and len(accuracies) == 1:
                accuracies.append(score(self.base, patch, self.supporting, headless=True).accuracy)
        return harmonic_mean(accuracies) if self.method.search == "harmonic" else mean(accuracies)

    def patches(self, weights: State, figures: Mapping[str, float]) -> tuple[dict[str, Patch], Patch]:
        """Each task's patch with the weights, and one without a head."""
        found: dict[str, Patch] = {}
        for task in self.tasks:
            patch = _with_weights(self.heads[task.name], weights)
            assert task.val is not None
            scored = score(self.base, patch, task.val)
            own = {"validation/accuracy": scored.accuracy, "validation/loss": scored.loss, **figures}
            # Those of fine-tuning are of other weights.
            kept = {key: value for key, value in patch.info.figures.items() if key not in _OF_FINE_TUNING}
            patch.info = patch.info.model_copy(update={"figures": {**kept, **own}})
            found[task.name] = patch
        return found, next(iter(found.values())).without_head()


def _fine_tuned(
    base: Base, task: TaskData, method: Interpolate, config: FitConfig, start: Patch | None
) -> Patch:
    """θ_1 of one task, whatever α is."""
    result = fit_task(
        base, task, replace(method.fitted_as(), head=False), config, progress=False, start=start
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return result.patch


def _with_weights(patch: Patch, weights: State) -> Patch:
    """A patch with other parts, copied, and the same head, shared."""
    other = patch.as_method(patch.method)
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    other.parts.load_state_dict(copies, assign=True)
    return other.eval()


def _between(start: State, end: State, alpha: float) -> State:
    """start + α (end - start), bit for bit the ends at 0 and 1."""
    return {
        name: torch.lerp(tensor, end[name], alpha) if tensor.is_floating_point() else tensor
        for name, tensor in start.items()
    }


def _sum(start: State, ends: Sequence[State], alphas: Sequence[float]) -> State:
    """start + Σ_t α_t (end_t - start); variances stay positive."""
    summed: dict[str, Tensor] = {}
    for name, tensor in start.items():
        total = tensor.clone()
        for end, alpha in zip(ends, alphas, strict=True):
            total += alpha * (end[name] - tensor)
        summed[name] = (
            total.clamp_min(torch.finfo(total.dtype).tiny) if name.endswith("running_var") else total
        )
    return summed
