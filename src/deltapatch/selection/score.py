"""What a transferability score is: a value, and all that one has to know before believing it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, ParamSpec

from ..errors import DeltapatchError

P = ParamSpec("P")
Reads = Literal["statistics", "features", "probabilities"]


class SelectionError(DeltapatchError):
    """Features, probabilities or labels that cannot be scored; the message says what and why."""


@dataclass(frozen=True)
class Diagnostics:
    """What a score was computed from, and what speaks against it.

    Attributes:
        samples: how many rows were used, N.
        width: how many columns they have: features d, or source classes S.
        classes: how many classes were used, K.
        dropped: labels that were left out since they have too few samples.
        warnings: one sentence each; empty where nothing speaks against the value.
        seconds: what the computation took, passing over the rows included.
        details: the score's own figures by name, such as "shrinkage".
    """

    samples: int
    width: int
    classes: int
    dropped: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    details: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Score:
    """A transferability score.

    Attributes:
        name: which score, such as "logme".
        value: larger means that the model is expected to do better on the task. Values of different scores,
            and of different tasks, cannot be compared.
        diagnostics: see `Diagnostics`.
    """

    name: str
    value: float
    diagnostics: Diagnostics

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class RankingScore:
    """A score that models can be ranked by.

    Attributes:
        name: of its function and file.
        compute: the function; takes what it reads and, unless that is statistics, labels.
        reads: what of a model it needs.
    """

    name: str
    compute: Callable[..., Score]
    reads: Reads


_RANKING_SCORES: dict[str, RankingScore] = {}


def ranking_score(reads: Reads) -> Callable[[Callable[P, Score]], Callable[P, Score]]:
    """Makes a function known to `rank`, under its own name; it stays as it is.

    Args:
        reads: "statistics" for what takes `Statistics`, "features" for what needs the features themselves,
            "probabilities" for what needs the answers of the model's own head.
    """

    def register(function: Callable[P, Score]) -> Callable[P, Score]:
        _RANKING_SCORES[function.__name__] = RankingScore(function.__name__, function, reads)
        return function

    return register


def ranking_scores() -> Mapping[str, RankingScore]:
    """Every score that models can be ranked by, by name."""
    from . import scores  # the files register themselves

    assert scores is not None
    return dict(sorted(_RANKING_SCORES.items()))
