"""From the results of the jobs to the table: a line for each method and task, and who is best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

import numpy as np

from ..metrics import Interval, PairedDifference, compare_answers
from ..protocols.scores import harmonic_mean
from ..protocols.seeds import SeedComparison, Spread, compare_over_seeds
from .contenders import describe
from .differences import difference
from .ledger import Row, Score
from .planning import Planned


@dataclass(frozen=True)
class Line:
    """One method on one task, in the variant that validation chose.

    Attributes:
        contender: the method's name in the table.
        task: the task's name.
        variant: the method with the options that were chosen.
        rows: the results of that variant, one for each seed.
        validation: the mean validation accuracy of every variant that was in the choice.
    """

    contender: str
    task: str
    variant: str
    rows: tuple[Row, ...]
    validation: Mapping[str, float]

    @cached_property
    def scores(self) -> dict[int, Score]:
        """Seed -> the figures on this task."""
        return {row.seed: score for row in self.rows for score in row.scores if score.task == self.task}

    @cached_property
    def accuracy(self) -> Spread:
        """On the test images, over the seeds."""
        return Spread.of([score.accuracy for score in self.scores.values()])

    @property
    def interval(self) -> Interval:
        """95 % of the mean over seeds; with one seed, or where all agree, of the share of right answers."""
        score, *others = self.scores.values()
        if any(other.accuracy != score.accuracy for other in others):
            # The t-interval knows nothing of where an accuracy ends.
            return Interval(self.accuracy.mean, max(self.accuracy.low, 0.0), min(self.accuracy.high, 1.0))
        return Interval.of_proportion(round(score.accuracy * score.images), score.images)

    @property
    def validation_accuracy(self) -> float:
        """The mean over the seeds."""
        return mean(score.validation_accuracy for score in self.scores.values())

    @property
    def measured_on(self) -> str:
        """Which images the accuracy is of, as `Score` says it."""
        return next(iter(self.scores.values())).measured_on

    @property
    def parameters(self) -> int:
        """Learned ones, without heads."""
        return self.rows[0].parameters

    @property
    def head_parameters(self) -> int:
        """Of the heads."""
        return self.rows[0].head_parameters

    @property
    def file_bytes(self) -> int:
        """Of the patch files of one seed."""
        return self.rows[0].file_bytes

    @property
    def seconds(self) -> float:
        """The mean time of the fits of one seed."""
        return mean(row.seconds for row in self.rows)

    @property
    def base_accuracy(self) -> float | None:
        """Of the base alone on its own task; None where that was not measured."""
        return self.rows[0].base_accuracy

    @property
    def supporting_accuracy(self) -> float | None:
        """On the base's own task afterwards, the mean over the seeds."""
        found = [row.supporting_accuracy for row in self.rows if row.supporting_accuracy is not None]
        return mean(found) if found else None

    @property
    def harmonic(self) -> float | None:
        """The harmonic mean of both tasks' accuracies; None without a supporting task."""
        supporting = self.supporting_accuracy
        return None if supporting is None else harmonic_mean((supporting, self.accuracy.mean))


@dataclass(frozen=True)
class Standing:
    """One method over all tasks of a setting.

    Attributes:
        contender: the method's name.
        lines: one for each task.
        against_best: how it stands to the best method; None for the best method itself, and where the two
            have no seed in common.
        compared_by: what that comparison is over; empty for the best method.
    """

    contender: str
    lines: tuple[Line, ...]
    against_best: SeedComparison | PairedDifference | None
    compared_by: str

    @property
    def accuracy(self) -> float:
        """The mean over the tasks of the mean over the seeds."""
        return mean(line.accuracy.mean for line in self.lines)

    @property
    def parameters(self) -> float:
        """The mean over the tasks, heads included."""
        return mean(line.parameters + line.head_parameters for line in self.lines)

    @property
    def seconds(self) -> float:
        """The mean over the tasks."""
        return mean(line.seconds for line in self.lines)

    @property
    def verdict(self) -> str:
        """In words: "best", "tie (…)" or "worse by …"."""
        if self.against_best is None:
            return self.compared_by or "best"
        return difference(self.against_best)


@dataclass(frozen=True)
class Section:
    """The table of one setting, that is one protocol and one amount of training images.

    Attributes:
        protocol: what was done with the tasks.
        amount: how many training images were used, in words.
        standings: the methods that were fitted on every task, the best first.
        incomplete: lines of the methods that were refused on some tasks.
    """

    protocol: str
    amount: str
    standings: tuple[Standing, ...]
    incomplete: tuple[Line, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """Every line, task after task in the order of the standings."""
        found = [*(line for one in self.standings for line in one.lines), *self.incomplete]
        tasks = list(dict.fromkeys(line.task for line in found))
        return tuple(sorted(found, key=lambda line: tasks.index(line.task)))


def make_sections(done: Sequence[tuple[Planned, Row]]) -> tuple[Section, ...]:
    """One table for each setting, in the order of the plan; jobs that were refused are not in them."""
    fitted = [(one, row) for one, row in done if not row.refused]
    sections: list[Section] = []
    for setting in dict.fromkeys(one.setting for one, _ in fitted):
        here = [(one, row) for one, row in fitted if one.setting == setting]
        tasks = dict.fromkeys(task for one, _ in here for task in one.tasks)
        lines_of = {
            contender: _lines([pair for pair in here if pair[0].contender == contender])
            for contender in dict.fromkeys(one.contender for one, _ in here)
        }
        complete = {name: lines for name, lines in lines_of.items() if len(lines) == len(tasks)}
        rest = [line for name, lines in lines_of.items() if name not in complete for line in lines]
        sections.append(Section(*setting, _standings(complete), tuple(rest)))
    return tuple(sections)


def _lines(of_contender: Sequence[tuple[Planned, Row]]) -> tuple[Line, ...]:
    """For each group of tasks that are fitted together, the lines of the variant that validation chose."""
    lines: list[Line] = []
    for tasks in dict.fromkeys(one.tasks for one, _ in of_contender):
        rows: dict[str, list[Row]] = {}
        for one, row in of_contender:
            if one.tasks == tasks:
                rows.setdefault(describe(one.variant), []).append(row)
        validation = _validation_accuracies(rows)
        # The first of equals: variants are given small ones first.
        chosen = max(validation, key=lambda variant: validation[variant])
        contender = of_contender[0][0].contender
        lines += [Line(contender, task, chosen, tuple(rows[chosen]), validation) for task in tasks]
    return tuple(lines)


def _validation_accuracies(rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """Each variant's mean over the seeds that all variants have, since seeds can differ in difficulty."""
    common = set[int].intersection(*({row.seed for row in found} for found in rows.values()))
    return {
        variant: mean(row.validation_accuracy for row in found if row.seed in common or not common)
        for variant, found in rows.items()
    }


def _standings(complete: Mapping[str, tuple[Line, ...]]) -> tuple[Standing, ...]:
    unordered = [Standing(name, lines, None, "") for name, lines in complete.items()]
    ordered = sorted(unordered, key=lambda one: -one.accuracy)
    return tuple(
        Standing(one.contender, one.lines, *(_compare(one, ordered[0]) if number else (None, "")))
        for number, one in enumerate(ordered)
    )


def _compare(one: Standing, best: Standing) -> tuple[SeedComparison | PairedDifference | None, str]:
    """Paired over tasks and seeds, and over the images of a single task where the answers are known.

    A single task's seeds say nothing about its images: with few of these, a difference that every seed
    repeats can still be chance, so that it counts only where it does for both.
    """
    figures = [
        {(line.task, seed): score for line in standing.lines for seed, score in line.scores.items()}
        for standing in (one, best)
    ]
    common = sorted(figures[0].keys() & figures[1].keys())
    if not common:
        return None, "no seed in common with the best method"
    first, second = ([scores[key] for key in common] for scores in figures)
    compared = compare_over_seeds(*({key: scores[key].accuracy for key in common} for scores in figures))
    units = f"{compared.units} {compared.unit}{'' if compared.units == 1 else 's'}"
    by_images = _compare_images(first, second) if len(one.lines) == 1 else None
    if by_images is not None and len(common) == 1:
        return by_images, f"{first[0].images} images, exact McNemar test"
    if by_images is not None and by_images.verdict == "tie":
        return by_images, f"{first[0].images} images, each with the mean of {units}"
    return compared, units


def _compare_images(first: Sequence[Score], second: Sequence[Score]) -> PairedDifference | None:
    """Paired over the images of one task, with the mean over its seeds for each; None if not known."""
    answers = [score.answers for score in (*first, *second)]
    known = [of_seed for of_seed in answers if of_seed is not None]
    if len(known) < len(answers) or len({len(of_seed) for of_seed in known}) > 1:
        return None
    return compare_answers(np.mean(known[: len(first)], axis=0), np.mean(known[len(first) :], axis=0))
