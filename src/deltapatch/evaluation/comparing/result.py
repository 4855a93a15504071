"""What a comparison found, before it is written down."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ...fitting.config import FitConfig
from .budget import Budget
from .job import DataSource
from .ledger import Row
from .planning import ComparisonConfig, Planned
from .table import Section, make_sections


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        base: the base's name.
        fingerprint: of the base.
        config: what was compared.
        fit: how patches were fitted; its seed was replaced by each job's.
        budget: what it was allowed to cost.
        data: the tasks' names and digests.
        done: every job with its result, in the order of the plan.
        left_out: what could not be done or was not, and why, one line each.
    """

    base: str
    fingerprint: str
    config: ComparisonConfig
    fit: FitConfig
    budget: Budget
    data: Mapping[str, DataSource]
    done: tuple[tuple[Planned, Row], ...]
    left_out: tuple[str, ...]

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The tables."""
        return make_sections(self.done)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before the figures."""
        found = {score.measured_on for _, row in self.done for score in row.scores}
        warnings: list[str] = []
        if self.config.selection == "test":
            warnings.append(
                "test-selected: the test images chose epochs and variants, as in the source papers, so all"
                " figures are optimistic and comparable only with figures made in the same way."
            )
        if "validation" in found:
            warnings.append(
                "Some tasks have no test images: their figures are of the validation images, which chose"
                " epochs and variants, so they are optimistic."
            )
        return tuple(warnings)
