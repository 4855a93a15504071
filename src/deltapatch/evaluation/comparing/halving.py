"""Which method for these images: successive halving over methods and their sizes, on validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from ...base import Base
from ...data import TaskData
from ...errors import CacheError, DataError, DeltapatchError
from ...fitting.config import FitConfig
from ...fitting.fit import FitResult, fit_task
from ...method import Method, make_method, registered_methods
from ..answers import evaluate
from ..metrics import Evaluation, PairedDifference, paired_difference
from ..wording import percent
from .budget import Budget
from .contenders import describe
from .differences import difference

_KEPT = 3
"""One in so many candidates goes on to the next rung, which has so many times the epochs."""


@dataclass(frozen=True, eq=False)
class Tried:
    """One candidate at the last rung that it reached.

    Attributes:
        method: the candidate.
        epochs: of that rung.
        result: of its fit.
        validation: what its patch answers on the validation images.
    """

    method: Method
    epochs: int
    result: FitResult
    validation: Evaluation

    @property
    def accuracy(self) -> float:
        """On the validation images, 0..1."""
        return self.validation.accuracy.value

    @property
    def parameters(self) -> int:
        """Of the patch, without its head."""
        return self.result.patch.num_parameters(head=False)


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen patch, and why it was chosen.

    Attributes:
        result: the fit of the chosen patch.
        ranking: every candidate that was fitted, the chosen one first, the head alone among them.
        left_out: candidates that were not fitted to the end of a rung, and why.
        over_runner_up: how the chosen patch differs from the second in the ranking on the validation images;
            None if there is no second.
        over_head: how it differs from a head alone; None where the head is what was chosen.
    """

    result: FitResult
    ranking: tuple[Tried, ...]
    left_out: tuple[tuple[str, str], ...]
    over_runner_up: PairedDifference | None
    over_head: PairedDifference | None

    @property
    def method(self) -> Method:
        """What was chosen."""
        return self.ranking[0].method

    @property
    def by(self) -> str:
        """By how much it won, in one or two sentences."""
        chosen, *others = self.ranking
        images = f"{len(chosen.validation.labels)} validation images"
        sentence = f"{describe(chosen.method)} answers {percent(chosen.accuracy)} of {images} right"
        if self.over_runner_up is not None:
            sentence += (
                f"; against the runner-up, {describe(others[0].method)}, {difference(self.over_runner_up)}"
            )
        if self.over_head is None:
            return f"{sentence}. Nothing was better than a head alone."
        return f"{sentence}; against a head alone, {difference(self.over_head)}."


def choose_method(
    base: Base,
    task: TaskData,
    config: FitConfig | None = None,
    budget: Budget | None = None,
    candidates: Sequence[Method] | None = None,
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Fits many candidates for a few epochs, the best of them for more, and the last ones in full.

    The rungs have a ninth, a third and all of ``config.epochs``. From a rung go on the third that is best on
    the validation images, and the best of those in the last rung is chosen, of equals the one with the fewest
    parameters. A head alone is always measured, and is the choice where nothing is better than it. A lead
    inside the noise is still the best guess, but `Choice.by` calls it a tie. The test images are not looked
    at.

    The validation figure of the winner is optimistic, since it is the best of several; measure the patch once
    on the test images afterwards.

    Args:
        base: the frozen model.
        task: with training and validation images.
        config: of the last rung.
        budget: candidates over its parameters or milliseconds are not fitted; no rung is opened that would
            take longer than its minutes.
        candidates: left out: every registered method in each of its `Method.sizes`, except those that change
            the base's own weights.
        tell: is given a line for each thing that happens.

    Raises:
        DataError: there are no validation images.

    Example:
        >>> choice = choose_method(base, open_data("photos/"), budget=Budget(minutes=10))
        >>> print(choice.by)
        >>> choice.result.patch.save("photos.safetensors")
    """
    config, budget = config or FitConfig(), budget or Budget()
    if task.val is None or not len(task.val):
        raise DataError(f"{task.name} has no validation images to choose a method by; give it some")
    search = _Search(base, task, budget, tell)
    head = search.fit(make_method("head"), config)
    if head is None:
        raise DeltapatchError(f"a head alone cannot be fitted: {search.left_out[-1][1]}")
    running = search.within_budget(default_candidates() if candidates is None else candidates)
    rungs = sorted({max(1, config.epochs // 9), max(1, config.epochs // 3), config.epochs})
    tried: dict[Method, Tried] = {}
    finalists: list[Tried] = []
    for epochs in rungs:
        if len(running) <= 1 and epochs < rungs[-1]:
            continue
        if finalists and search.is_too_long(finalists, running, epochs):
            tell(f"the rung of {epochs} epochs is not opened: it would take longer than the budget")
            break
        finished = search.fit_rung(running, replace(config, epochs=epochs))
        if not finished:
            break
        tried |= {found.method: found for found in finished}
        finalists = finished
        running = survivors(finished)
    return _choice(head, finalists, list(tried.values()), tuple(search.left_out))


def default_candidates() -> tuple[Method, ...]:
    """Every registered method in each of its sizes; not the head, nor what changes the base's weights.

    The first size of each comes first, so that a search whose time is over has seen as many as it could.
    """
    classes = [cls for name, cls in registered_methods().items() if name != "head" and not cls.shares_weights]
    rounds = zip_longest(*(cls.sizes() for cls in classes))
    return tuple(size for sizes in rounds for size in sizes if size is not None)


def survivors(finished: Sequence[Tried]) -> list[Method]:
    """The best third, at least one."""
    order = sorted(finished, key=_best_first)
    return [one.method for one in order[: max(1, len(order) // _KEPT)]]


@dataclass
class _Search:
    """The fits of one search, the time that they took, and what was left out."""

    base: Base
    task: TaskData
    budget: Budget
    tell: Callable[[str], None]
    spent: float = 0.0
    left_out: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def within_budget(self, candidates: Sequence[Method]) -> list[Method]:
        kept: list[Method] = []
        for method in dict.fromkeys(candidates):
            if method == make_method("head"):
                continue  # always measured
            try:
                refusal = self.budget.refusal(self.base, method, self.task.classes)
            except DeltapatchError as error:
                refusal = str(error)
            if refusal:
                self.leave_out(method, refusal)
            else:
                kept.append(method)
        return kept

    def fit_rung(self, methods: Sequence[Method], config: FitConfig) -> list[Tried]:
        finished: list[Tried] = []
        for method in methods:
            if self.spent >= self.budget.seconds and finished:
                self.leave_out(method, "the time was over")
                continue
            found = self.fit(method, config)
            if found is not None:
                finished.append(found)
        return finished

    def fit(self, method: Method, config: FitConfig) -> Tried | None:
        """The candidate's fit, which its method may refuse."""
        assert self.task.val is not None
        try:
            result = fit_task(self.base, self.task, method, config, progress=False)
            if result.interrupted:
                raise KeyboardInterrupt
            self.spent += result.seconds
            validation = evaluate(self.base, self.task.val, result.patch, workers=config.workers)
        except (DataError, CacheError):
            raise
        except DeltapatchError as error:
            self.leave_out(method, str(error))
            return None
        found = Tried(method, config.epochs, result, validation)
        self.tell(
            f"{describe(method)}, at most {config.epochs} epochs: {percent(found.accuracy)} of the validation"
            f" images, {found.parameters:,} parameters, {result.seconds:.1f} s"
        )
        return found

    def is_too_long(self, last: Sequence[Tried], running: Sequence[Method], epochs: int) -> bool:
        """Whether the next rung would go beyond the minutes, if an epoch takes as long as it did so far."""
        ahead = sum(one.result.seconds * epochs / one.epochs for one in last if one.method in running)
        return self.spent + ahead > self.budget.seconds

    def leave_out(self, method: Method, reason: str) -> None:
        self.left_out.append((describe(method), reason))
        self.tell(f"{describe(method)} is left out: {reason}")


def _choice(
    head: Tried, finalists: Sequence[Tried], tried: Sequence[Tried], left_out: tuple[tuple[str, str], ...]
) -> Choice:
    chosen = min([head, *finalists], key=_best_first)
    beaten = [one for one in tried if all(one is not other for other in finalists)]
    ranking = [*sorted([head, *finalists], key=_best_first), *sorted(beaten, key=_last_rung_first)]
    ranking = [chosen, *(one for one in ranking if one is not chosen)]
    runner_up = ranking[1] if len(ranking) > 1 else None
    return Choice(
        result=chosen.result,
        ranking=tuple(ranking),
        left_out=left_out,
        over_runner_up=None
        if runner_up is None
        else paired_difference(chosen.validation, runner_up.validation),
        over_head=None if chosen is head else paired_difference(chosen.validation, head.validation),
    )


def _best_first(one: Tried) -> tuple[float, int]:
    return -one.accuracy, one.parameters


def _last_rung_first(one: Tried) -> tuple[int, float]:
    return -one.epochs, -one.accuracy
