"""From a probe to its scores, on the whole of it and on halves."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ...errors import DeltapatchError
from ..closed_form import nearest_to
from ..score import RankingScore, Score
from ..statistics import indicator
from ..subject import Samples, read_samples
from .probing import Probe
from .ranked import Cell, LayerScores

Halves = NDArray[np.bool_]


def score_probe(scores: Sequence[RankingScore], probe: Probe, halves: Halves) -> dict[str, Cell]:
    """Every score of a base; one that cannot be computed says why in its cell.

    Args:
        scores: which.
        probe: the base.
        halves: which of its images are in each half, bool of shape (draws, N).
    """
    rows = _Rows(probe.features, probe.labels, probe.probabilities, probe.no_probabilities)
    return _cells(scores, rows, halves)


def score_layers(scores: Sequence[RankingScore], probe: Probe) -> tuple[LayerScores, ...]:
    """The same of each stage's output, on the whole probe only; scores of probabilities are left out."""
    readable = [score for score in scores if score.reads != "probabilities"]
    no_halves = np.zeros((0, len(probe.labels)), np.bool_)
    return tuple(
        LayerScores(stage, rows.shape[1], _cells(readable, _Rows(rows, probe.labels, None, ""), no_halves))
        for stage, rows in probe.layers.items()
    )


def nearest_mean_accuracy(features: ArrayLike, labels: NDArray[np.int64], halves: Halves) -> float:
    """Share of the images outside a half that are nearest to the mean of their class in the half.

    Images of classes that the half does not hold are left out.

    Args:
        features: shape (N, d).
        labels: shape (N,).
        halves: bool of shape (draws, N).

    Returns:
        The mean over the halves, 0..1; NaN where no half leaves an image to ask about.
    """
    rows = np.asarray(features, np.float64)
    accuracies: list[float] = []
    for half in halves:
        held_out = ~half & np.isin(labels, labels[half])
        if not held_out.any():
            continue
        classes, numbers = np.unique(labels[half], return_inverse=True)
        sums = indicator(numbers, len(classes)) @ rows[half]
        rule = nearest_to(sums / np.bincount(numbers)[:, None])
        accuracies.append(float((classes[rule.predict(rows[held_out])] == labels[held_out]).mean()))
    return float(np.mean(accuracies)) if accuracies else float("nan")


def problem_of(error: Exception) -> str:
    """An error as one sentence for a cell of a table."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        said = f" ({message})" if message else ""
        return f"memory ran out{said}; use a smaller batch_size, another device, or a smaller base"
    if isinstance(error, DeltapatchError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {message or 'no message'}"


@dataclass(eq=False)
class _Rows:
    """What scores read of some images: checked once, and with statistics that they share."""

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32] | None
    no_probabilities: str

    @cached_property
    def of_features(self) -> Samples:
        return read_samples(self.features, self.labels)

    @cached_property
    def of_probabilities(self) -> Samples:
        assert self.probabilities is not None
        return read_samples(self.probabilities, self.labels, probabilities=True)

    def part(self, chosen: NDArray[np.bool_]) -> "_Rows":
        probabilities = None if self.probabilities is None else self.probabilities[chosen]
        return _Rows(self.features[chosen], self.labels[chosen], probabilities, self.no_probabilities)

    def scored(self, score: RankingScore) -> Score | str:
        """The score, or in one sentence why there is none."""
        if score.reads == "probabilities" and self.probabilities is None:
            return self.no_probabilities
        try:
            return score.compute(
                self.of_probabilities if score.reads == "probabilities" else self.of_features
            )
        except Exception as error:
            return problem_of(error)


def _cells(scores: Sequence[RankingScore], rows: _Rows, halves: Halves) -> dict[str, Cell]:
    whole = {score.name: rows.scored(score) for score in scores}
    on_halves: dict[str, list[float]] = {score.name: [] for score in scores}
    for half in halves:
        part = rows.part(half)
        for score in scores:
            found = part.scored(score) if isinstance(whole[score.name], Score) else ""
            on_halves[score.name].append(found.value if isinstance(found, Score) else float("nan"))
    return {
        name: Cell(
            found if isinstance(found, Score) else None,
            found if isinstance(found, str) else "",
            np.array(on_halves[name], np.float64),
        )
        for name, found in whole.items()
    }
