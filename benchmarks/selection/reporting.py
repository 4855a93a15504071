"""How the benchmarks of rankings write down weighted taus: one table, one variant."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deltapatch.selection.ranking.agreement import Variant, weighted_tau
from deltapatch.selection.score import SelectionError

Figures = dict[str, float]
"""Target -> weighted tau."""


@dataclass
class TauTable:
    """Weighted taus of several scores on several targets.

    Attributes:
        variant: of all its figures.
        targets: the columns; a score may lack some.
        rows: score -> figures.
    """

    variant: Variant
    targets: Sequence[str]
    rows: dict[str, Figures] = field(default_factory=dict)

    def add(self, name: str, figures: Figures, variant: Variant) -> None:
        """One more row.

        Raises:
            SelectionError: its figures are of another variant.
        """
        if variant != self.variant:
            raise SelectionError(f"{name} is of the variant {variant}, and this table of {self.variant}")
        self.rows[name] = figures

    def as_markdown(self) -> str:
        """The rows, the best mean first. A mean over fewer targets than others says so."""
        lines: list[list[str]] = []
        for name, figures in sorted(self.rows.items(), key=lambda row: -statistics.mean(row[1].values())):
            cells = [f"{figures[target]:.3f}" if target in figures else "–" for target in self.targets]
            mean = f"{statistics.mean(figures.values()):.3f}"
            if len(figures) < len(self.targets):
                mean += f" ({len(figures)} targets)"
            lines.append([name, *cells, mean, f"{min(figures.values()):.3f}"])
        return markdown(["score", *self.targets, "mean", "worst"], lines)


def tau_of(scores: Mapping[str, float], accuracies: Mapping[str, float], variant: Variant) -> float:
    """Weighted tau over the models whose accuracy is known.

    Raises:
        KeyError: one of them has no score.
    """
    return weighted_tau([scores[model] for model in accuracies], list(accuracies.values()), variant)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
