"""What a ranking says: a row for each base, and how far its order can be believed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..score import Score

INTERVAL = 0.9
"""What part of the halves an interval holds."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One score of one base.

    Attributes:
        score: on the whole probe; None where it cannot be computed.
        problem: why not, in one sentence; empty otherwise.
        halves: its value on each half of the probe, NaN where it has none, shape (draws,).
    """

    score: Score | None
    problem: str
    halves: NDArray[np.float64]

    @property
    def value(self) -> float:
        """NaN where there is none."""
        return float("nan") if self.score is None else self.score.value

    @property
    def interval(self) -> tuple[float, float]:
        """How far 90 % of the halves lie from their mean, around the value; NaN with fewer than two halves.

        Around the value and not where they lie: a half has half of the images, and many scores grow or fall
        with their number.
        """
        low, high = _interval(self.halves)
        if np.isnan(low):
            return low, high
        shift = self.value - float(np.nanmean(self.halves))
        return low + shift, high + shift


@dataclass(frozen=True, eq=False)
class LayerScores:
    """The scores of one stage's output.

    Attributes:
        stage: its name.
        width: channels.
        cells: score name -> score; those that read probabilities are not in it.
    """

    stage: str
    width: int
    cells: Mapping[str, Cell]


@dataclass(frozen=True, eq=False)
class RankedBase:
    """A row of a ranking.

    Attributes:
        name: of the candidate.
        problem: why it could not be looked at, in one sentence; empty if it could, and only then what follows
            says anything.
        fingerprint: of its weights.
        cells: score name -> score.
        layers: of each stage in the order in which they run, where they were asked for.
        samples: how many images of the probe could be read.
        width: of its features.
        nearest_mean: share of the held-out half that is nearest to the mean of its own class, with means of
            the other half; the mean over the halves, 0..1.
        history: what is expected of it from its accuracies on other images, see `history.prior`; NaN where
            none are known.
        parameters: how many numbers its weights are.
        seconds_per_image: of a forward pass on this machine.
        forward_seconds: of the pass over the probe.
        load_seconds: of loading.
        score_seconds: of all scores, halves included.
    """

    name: str
    problem: str = ""
    fingerprint: str = ""
    cells: Mapping[str, Cell] = field(default_factory=dict[str, Cell])
    layers: tuple[LayerScores, ...] = ()
    samples: int = 0
    width: int = 0
    nearest_mean: float = float("nan")
    history: float = float("nan")
    parameters: int = 0
    seconds_per_image: float = float("nan")
    forward_seconds: float = float("nan")
    load_seconds: float = float("nan")
    score_seconds: float = float("nan")

    def value(self, score: str) -> float:
        """The value of a score on the whole probe; NaN where there is none."""
        return self.cells[score].value if score in self.cells else float("nan")


@dataclass(frozen=True, eq=False)
class Ranking:
    """Bases in the order of a score. Made by `deltapatch.rank`.

    Attributes:
        task: name of the images.
        rows: best first; bases without a value of the ordering score come last.
        scores: names of the scores that were computed.
        ordered_by: the one that orders the rows.
        images: how many the probe has.
        classes: how many classes it has.
        draws: how many halves of it were scored.
        seed: of probe and halves.
        interrupted: whether the user ended it before all bases were looked at.
    """

    task: str
    rows: tuple[RankedBase, ...]
    scores: tuple[str, ...]
    ordered_by: str
    images: int
    classes: int
    draws: int
    seed: int
    interrupted: bool = False

    @property
    def best(self) -> RankedBase | None:
        """The base to take; None where none has a value of the ordering score."""
        return self.best_by(self.ordered_by)

    def best_by(self, score: str) -> RankedBase | None:
        """The base with the largest value of a score; None where none has one."""
        with_value = [row for row in self.rows if not np.isnan(row.value(score))]
        return max(with_value, key=lambda row: row.value(score), default=None)

    def difference(self, row: RankedBase) -> tuple[float, float]:
        """What lies between a base and the best one: its value minus that of the best, half by half, as an
        interval of 90 %; NaN where there are fewer than two halves with both.
        """
        best = self.best
        if best is None or self.ordered_by not in row.cells:
            return float("nan"), float("nan")
        return _interval(row.cells[self.ordered_by].halves - best.cells[self.ordered_by].halves)

    @cached_property
    def ties(self) -> frozenset[str]:
        """Names of the bases that other images may well have put first: their `difference` is not all below
        zero. The best one is not among them.
        """
        best = self.best
        return frozenset(row.name for row in self.rows if row is not best and self.difference(row)[1] >= 0)

    def stability(self, score: str) -> float:
        """Share of the halves on which a score picks the base that it picks on the whole probe, 0..1; NaN
        where it has no value on any half. On equal values it picks the base that stands first.
        """
        best = self.best_by(score)
        rows = [row for row in self.rows if score in row.cells]
        if best is None:
            return float("nan")
        values = np.array([row.cells[score].halves for row in rows])
        scored = ~np.isnan(values).all(axis=0)
        if not scored.any():
            return float("nan")
        picks = np.where(np.isnan(values), -np.inf, values)[:, scored].argmax(axis=0)
        return float((picks == rows.index(best)).mean())

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against values of the table: each sentence once, with what it is said of."""
        said: dict[str, list[str]] = {}
        scored = [row for row in self.rows if not row.problem]
        for row in scored:
            for name, cell in row.cells.items():
                for sentence in () if cell.score is None else cell.score.diagnostics.warnings:
                    said.setdefault(sentence, []).append(f"{name} of {row.name}")
        everywhere = len(scored) * len(self.scores)
        return tuple(
            f"{sentence} ({'all scores' if len(places) == everywhere else _listed(places)})"
            for sentence, places in said.items()
        )


def _listed(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    there = values[~np.isnan(values)]
    if len(there) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(there, ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2))
    return float(low), float(high)
