"""From a folder of photos and a list of bases to a ranking."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...base import Base
from ...data import ImageSet, TaskData, open_data
from ...errors import DataError, DeltapatchError
from ..drawing import draw_halves, draw_probe
from ..history.prior import History, prior
from ..score import RankingScore, ranking_scores
from .candidates import Candidate, as_candidates
from .probing import Probe, probe_base
from .ranked import RankedBase, Ranking
from .scoring import nearest_mean_accuracy, problem_of, score_layers, score_probe

DEFAULT_SCORES = ("linear_probe", "parc", "shrinkage_h_score", "logme", "leep", "nce")
"""What is computed unless other scores are asked for."""

ORDERED_BY = "linear_probe"
"""The score that orders the table where it is among those that are computed; else the first of them does.
On our own bases and sets no score was ahead of it beyond chance (``benchmarks/results/selection_own.md``),
it compares models of any width, and its unit is accuracy.
"""


class RankWatch(Protocol):
    """Is told how far a ranking is."""

    def begin(self, number: int, count: int, name: str) -> None:
        """Called before a base is loaded; ``number`` counts from 1."""
        ...

    def surveying(self, label: str, images: int) -> AbstractContextManager[Callable[[int], None]]:
        """Opens a bar for so many images; the context gives what to call with the number done."""
        ...

    def finish(self, so_far: Ranking) -> None:
        """Called after each base with the ranking of those that are done."""
        ...


def rank(
    data: str | Path | TaskData,
    candidates: Sequence[Candidate | Base | str],
    scores: Sequence[str] | None = None,
    *,
    layers: bool = False,
    probe: int = 500,
    draws: int = 10,
    seed: int = 0,
    device: str | None = None,
    batch_size: int = 32,
    workers: int = 0,
    history: History | None = None,
    watch: RankWatch | None = None,
) -> Ranking:
    """Ranks bases by how well a patch on each is expected to do, without fitting any.

    One after the other, each base is loaded, runs once over a stratified sample of the training images, and
    is let go. Features stay in the trunk cache: a second ranking, and the fit of a head, read them there. A
    base that cannot be loaded, run or scored gets a row that says why, and the others go on.

    How far the order can be believed is told by ``draws`` random halves of the probe (`draw_halves`), the
    same for all bases: see `Ranking.ties`, `Ranking.stability` and `Cell.interval`.

    Args:
        data: a folder of class folders, ``.npz``, Parquet, a hub data set's name, or data that is open
            already.
        candidates: bases, sources as `load_base` takes them, or `Candidate`; see `read_candidates`.
        scores: names of scores; `DEFAULT_SCORES` where left out.
        layers: whether to score the output of each stage too.
        probe: how many training images to look at.
        draws: how many halves of them to score; 0 for none, and no ties, stability or intervals.
        seed: of all that is random.
        device: where to put bases that are loaded here; left out, the graphics processor where there is one.
        batch_size: images of a forward pass.
        workers: processes that decode images.
        history: known accuracies, for the baseline that stands beside the scores; see `History.read`.
        watch: is told how far it is.

    Returns:
        The ranking; after Ctrl-C, of the bases that were done.

    Raises:
        DataError: the data cannot be read, or has no training images.
        SelectionError: its training images cannot be scored, such as those of one class.
        DeltapatchError: a score is not known, or there is no candidate.
        KeyboardInterrupt: the user ended it before one base was done.

    Example:
        >>> found = deltapatch.rank("photos/", ["timm/resnet50.a1_in1k", "timm/convnext_tiny.in12k_ft_in1k"])
        >>> print(found.best.name, found.ties)
    """
    wanted = _wanted_scores(DEFAULT_SCORES if scores is None else scores)
    chosen = as_candidates(candidates)
    if draws < 0 or seed < 0 or batch_size < 1:
        raise DeltapatchError(
            f"draws {draws}, seed {seed} and batch_size {batch_size} are not usable; draws and seed must be"
            " at least 0, batch_size at least 1"
        )
    task = data if isinstance(data, TaskData) else open_data(data)
    if task.train is None or not len(task.train):
        raise DataError(f"{task.name} has no training images; a ranking looks at those")
    indices = draw_probe(task.train.labels, probe, seed)
    halves = draw_halves(task.train.labels[indices], max(draws, 1), seed)
    looking = _Looking(
        *(task, task.train, indices, halves, draws, seed, wanted, layers, device, batch_size, workers),
        *(history or History(), watch),
    )
    rows: list[RankedBase] = []
    try:
        for number, candidate in enumerate(chosen, 1):
            if watch is not None:
                watch.begin(number, len(chosen), candidate.name)
            rows.append(looking.row(candidate))
            if watch is not None:
                watch.finish(looking.ranking(rows))
    except KeyboardInterrupt:
        if not rows:
            raise
        return looking.ranking(rows, interrupted=True)
    return looking.ranking(rows)


@dataclass(frozen=True)
class _Looking:
    """What every base is looked at with; ``halves`` holds one also where no draws are wanted."""

    task: TaskData
    images: ImageSet
    indices: NDArray[np.int64]
    halves: NDArray[np.bool_]
    draws: int
    seed: int
    scores: tuple[RankingScore, ...]
    layers: bool
    device: str | None
    batch_size: int
    workers: int
    history: History
    watch: RankWatch | None

    def row(self, candidate: Candidate) -> RankedBase:
        """One base; whatever goes wrong with it becomes its row's problem."""
        try:
            return self._scored(candidate, self._probed(candidate))
        except Exception as error:
            return RankedBase(candidate.name, problem=problem_of(error))
        finally:
            if not isinstance(candidate.source, Base):
                _free_memory()

    def _probed(self, candidate: Candidate) -> Probe:
        started = time.perf_counter()
        base = candidate.load(self.device, self.task.classes)
        return probe_base(
            base,
            self.images,
            self.indices,
            _no_watch if self.watch is None else self.watch.surveying,
            layers=self.layers,
            batch_size=self.batch_size,
            workers=self.workers,
            load_seconds=time.perf_counter() - started,
        )

    def _scored(self, candidate: Candidate, probe: Probe) -> RankedBase:
        started = time.perf_counter()
        halves = self.halves[:, probe.kept]
        return RankedBase(
            name=candidate.name,
            fingerprint=probe.fingerprint,
            cells=score_probe(self.scores, probe, halves[: self.draws]),
            layers=score_layers(self.scores, probe),
            samples=len(probe.labels),
            width=probe.features.shape[1],
            nearest_mean=nearest_mean_accuracy(probe.features, probe.labels, halves),
            history=self._expected(candidate, probe),
            parameters=probe.parameters,
            seconds_per_image=probe.seconds_per_image,
            forward_seconds=probe.forward_seconds,
            load_seconds=probe.load_seconds,
            score_seconds=time.perf_counter() - started,
        )

    def _expected(self, candidate: Candidate, probe: Probe) -> float:
        """The history prior: by fingerprint, and by name only where the weights are the published ones."""
        name = probe.base if candidate.has_published_weights else ""
        digest = self.task.provenance.digest
        known = prior(
            self.history, [name], self.task.name, fingerprints={name: probe.fingerprint}, digest=digest
        )
        return known.get(name, float("nan"))

    def ranking(self, rows: Sequence[RankedBase], interrupted: bool = False) -> Ranking:
        """The bases that are done, best first."""
        names = tuple(score.name for score in self.scores)
        ordered_by = ORDERED_BY if ORDERED_BY in names else names[0]
        return Ranking(
            task=self.task.name,
            rows=_in_order(rows, ordered_by),
            scores=names,
            ordered_by=ordered_by,
            images=len(self.indices),
            classes=len(np.unique(self.images.labels[self.indices])),
            draws=self.draws,
            seed=self.seed,
            interrupted=interrupted,
        )


def _free_memory() -> None:
    """Modules refer to each other in circles, and the next base may need the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wanted_scores(names: Sequence[str]) -> tuple[RankingScore, ...]:
    known = ranking_scores()
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        found = f"there is no score '{unknown[0]}'" if unknown else "there is no score to rank by"
        raise DeltapatchError(f"{found}; choose from {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def _in_order(rows: Sequence[RankedBase], score: str) -> tuple[RankedBase, ...]:
    """Largest value first; then those without one, then those with a problem."""

    def place(row: RankedBase) -> tuple[bool, bool, float]:
        value = row.value(score)
        return bool(row.problem), bool(np.isnan(value)), 0.0 if np.isnan(value) else -value

    return tuple(sorted(rows, key=place))


def _no_watch(label: str, images: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)
