"""The history prior: models that did well on other targets are expected to do well on this one.

It looks at no image of the target, costs nothing, and is the baseline that scores have to beat. It knows what
scores of the target's images do not, and the other way round, so that the two together are often better than
either (`combine`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .carried import carried_records
from .file import own_history_path, read_records
from .record import Record, plain


@dataclass(frozen=True)
class History:
    """Known results of models on targets.

    Attributes:
        records: of several for the same model and images in one pool, the last one counts.

    Example:
        >>> history = History.carried("supervised")
        >>> expected = prior(history, ["resnet50", "mobilenet_v2"], "birds")
        >>> expected["resnet50"] > expected["mobilenet_v2"]
        True
    """

    records: tuple[Record, ...] = ()

    @classmethod
    def carried(cls, *pools: str) -> "History":
        """The published results that are shipped with the package.

        Args:
            pools: names of `carried.CARRIED_POOLS`; left out, all that are not part of another one.

        Raises:
            SelectionError: there is no such pool.
        """
        return cls(carried_records(pools))

    @classmethod
    def read(cls, path: str | Path | None = None) -> "History":
        """The results in a file, see `history_file.read_records`.

        Args:
            path: the file; left out, the one that `deltapatch compare` writes, which may not be there yet.

        Raises:
            SelectionError: it cannot be read.
        """
        if path is None and not own_history_path().exists():
            return cls()
        return cls(read_records(own_history_path() if path is None else path))

    def __add__(self, other: "History") -> "History":
        return History(self.records + other.records)

    def of_pool(self, pool: str) -> "History":
        """The results of one pool."""
        return History(tuple(record for record in self.records if record.pool == pool))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Their names, each once, in the order of the records."""
        return tuple(dict.fromkeys(record.target for record in self.records))

    def accuracies(self, target: str) -> dict[str, float]:
        """Model -> accuracy on one target, for a history of one pool."""
        return {record.model: record.accuracy for record in self.records if record.is_on(target)}

    @cached_property
    def comparable(self) -> tuple[tuple[Record, ...], ...]:
        """The results in groups of the same pool and images, inside of which accuracies can be compared."""
        groups: dict[tuple[str, str], dict[tuple[str, str], Record]] = {}
        for record in self.records:
            group = groups.setdefault((record.pool, record.images), {})
            group[record.model, record.fingerprint] = record
        return tuple(tuple(group.values()) for group in groups.values())


@dataclass(frozen=True, eq=False)
class Prior(Mapping[str, float]):
    """Model -> its mean standardised accuracy on other targets.

    Attributes:
        of_model: the values, for the models that have a history.
        targets: for each of these the targets that its value is the mean of; one or two say little.
        missing: the models without a history on other targets.
    """

    of_model: Mapping[str, float]
    targets: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]

    def __getitem__(self, model: str) -> float:
        return self.of_model[model]

    def __iter__(self) -> Iterator[str]:
        return iter(self.of_model)

    def __len__(self) -> int:
        return len(self.of_model)

    def __str__(self) -> str:
        known = f"history of {len(self)} of {len(self) + len(self.missing)} models"
        return f"{known}; none of {', '.join(self.missing)}" if self.missing else known


def prior(
    history: History,
    models: Iterable[str],
    target: str,
    *,
    fingerprints: Mapping[str, str] | None = None,
    digest: str = "",
) -> Prior:
    """What to expect of models on a target, from their accuracies on other targets.

    The accuracies of each pool and target are standardised over all models that are known there, and the
    values of a model averaged. Targets on which fewer than two models are known, or all are alike, tell
    nothing.

    Args:
        history: known results; those on the target itself are never used.
        models: names as in the history; upper case, spaces and signs make no difference.
        target: its name.
        fingerprints: model -> fingerprint of its base, so that results of another base with the same name are
            not taken for its own. Published results have none, and are found by name.
        digest: of the target's images, so that they are known under another name too.
    """
    names = tuple(dict.fromkeys(models))
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    for group in history.comparable:
        if any(record.is_on(target, digest) for record in group):
            continue
        values = _standardised(np.array([record.accuracy for record in group]))
        if values is None:
            continue
        for record, value in zip(group, values, strict=True):
            for name in names:
                if record.is_of(name, (fingerprints or {}).get(name, "")):
                    found[name].append((record.target, float(value)))
    known = {name: of_name for name, of_name in found.items() if of_name}
    return Prior(
        {name: float(np.mean([value for _, value in of_name])) for name, of_name in known.items()},
        {
            name: tuple({plain(other): other for other, _ in of_name}.values())
            for name, of_name in known.items()
        },
        tuple(name for name in names if name not in known),
    )


def combine(*scores: Mapping[str, float]) -> dict[str, float]:
    """The sum of several scores over the same candidates, each standardised over those that have it.

    A candidate that lacks a score gets the mean of its others in its place; one that has none is left out.
    Scores weigh the same; what should weigh as much as several together is combined with their combination:

        >>> combine(combine(h_score, logme, nce), prior(history, candidates, target))

    Args:
        scores: model -> value, larger is better; NaN where a model has none. A `Prior` is one.
    """
    standardised: list[dict[str, float]] = []
    for score in scores:
        known = {name: value for name, value in score.items() if np.isfinite(value)}
        values = _standardised(np.array(list(known.values())))
        # A score that is the same for all tells nothing, which is not the same as being unknown.
        standardised.append(dict(zip(known, np.zeros(len(known)) if values is None else values, strict=True)))
    names = dict.fromkeys(name for values in standardised for name in values)
    return {
        name: float(np.mean([values[name] for values in standardised if name in values])) * len(scores)
        for name in names
    }


def _standardised(values: np.ndarray) -> np.ndarray | None:
    """Of mean 0 and standard deviation 1; None where they do not differ."""
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    return (values - values.mean()) / values.std()
