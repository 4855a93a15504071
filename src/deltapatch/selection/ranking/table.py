"""A ranking as a person reads it: cells in words, a table, and the table drawn anew after each base."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...evaluation.wording import percent
from .ranked import RankedBase, Ranking

TIE = "="
"""Stands in place of a number for bases that tie with the best."""


def columns(ranking: Ranking) -> tuple[str, ...]:
    """Names of the columns of `lines`."""
    history = ("history",) if _has_history(ranking) else ()
    return ("", "base", *ranking.scores, "nearest mean", *history, "parameters", "ms an image")


def lines(ranking: Ranking) -> list[tuple[str, ...]]:
    """A line for each base that could be looked at, and one for the stability of each score."""
    found = [_line(ranking, place, row) for place, row in enumerate(_there(ranking), 1)]
    if ranking.draws and len(found) > 1:
        agreed = (_or_dash(ranking.stability(score), percent) for score in ranking.scores)
        found.append(
            ("", "same pick on halves", *agreed, *("" for _ in columns(ranking)[2 + len(ranking.scores) :]))
        )
    return found


def problems(ranking: Ranking) -> list[str]:
    """One sentence for each base that failed, and for each reason why scores did."""
    said = [f"{row.name}: {row.problem}" for row in ranking.rows if row.problem]
    alike: dict[str, list[str]] = {}
    for row in _there(ranking):
        for name, cell in row.cells.items():
            if cell.problem:
                alike.setdefault(cell.problem, []).append(f"{name} of {row.name}")
    return said + [f"{', '.join(places)}: {problem}" for problem, places in alike.items()]


def layer_lines(ranking: Ranking) -> list[tuple[str, ...]]:
    """A line for each stage of each base: base, stage, channels, and the scores that read features."""
    return [
        (row.name, layer.stage, str(layer.width), *(score_value(cell.value) for cell in layer.cells.values()))
        for row in _there(ranking)
        for layer in row.layers
    ]


def layer_columns(ranking: Ranking) -> tuple[str, ...]:
    """Names of the columns of `layer_lines`."""
    scores = next((tuple(layer.cells) for row in ranking.rows for layer in row.layers), ())
    return ("base", "stage", "channels", *scores)


def summary(ranking: Ranking) -> str:
    """The choice in one sentence."""
    best = ranking.best
    if best is None:
        return "No base could be ranked."
    looked = f"{ranking.images} images of {ranking.classes} classes, ordered by {ranking.ordered_by}"
    ties = [row.name for row in ranking.rows if row.name in ranking.ties]
    if not ties:
        return f"{looked}: {best.name} is first."
    others = ", ".join(ties)
    return f"{looked}: {best.name} is first, and {others} cannot be told from it on these images ({TIE})."


def score_value(value: float) -> str:
    """A score with four digits; a dash where there is none."""
    return _or_dash(value, lambda number: f"{number:.4g}")


def as_table(ranking: Ranking) -> Table:
    """The table for a terminal."""
    table = _table(columns(ranking))
    for line in lines(ranking):
        # As text: names come from the user and are no markup.
        table.add_row(*map(Text, line))
    return table


def as_layer_table(ranking: Ranking) -> Table:
    """The scores of all stages for a terminal."""
    table = _table(layer_columns(ranking))
    for line in layer_lines(ranking):
        table.add_row(*map(Text, line))
    return table


def _table(names: tuple[str, ...]) -> Table:
    table = Table(*names)
    for column in table.columns[:2]:
        column.overflow = "fold"
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _has_history(ranking: Ranking) -> bool:
    return any(not math.isnan(row.history) for row in ranking.rows)


def _there(ranking: Ranking) -> list[RankedBase]:
    return [row for row in ranking.rows if not row.problem]


def _line(ranking: Ranking, place: int, row: RankedBase) -> tuple[str, ...]:
    is_ranked = not math.isnan(row.value(ranking.ordered_by))
    return (
        TIE if row.name in ranking.ties else str(place) if is_ranked else "–",
        row.name,
        *(score_value(row.value(score)) for score in ranking.scores),
        _or_dash(row.nearest_mean, percent),
        *([_or_dash(row.history, lambda value: f"{value:+.2f}")] if _has_history(ranking) else []),
        f"{row.parameters:,}",
        f"{1e3 * row.seconds_per_image:.1f}",
    )


def _or_dash(value: float, write: Callable[[float], str]) -> str:
    return "–" if math.isnan(value) else write(value)


class LiveRanking:
    """Draws on standard error, so that standard output stays for results; silent when switched off."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.so_far: Ranking | None = None
        self.running = ""
        # Drawn when something has happened and not by a clock, which would be a thread beside the work.
        self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> "LiveRanking":
        if self.enabled:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.live.stop()

    def begin(self, number: int, count: int, name: str) -> None:
        """Called before a base is loaded."""
        self.running = f"base {number} of {count}: {name}"
        self._draw()

    @contextmanager
    def surveying(self, label: str, images: int) -> Generator[Callable[[int], None]]:
        """Counts images behind the base's name; yields what to call with the number done."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._draw(f", {done} of {images} images")

        yield advance

    def finish(self, so_far: Ranking) -> None:
        """Called after each base."""
        self.so_far = so_far
        self.running = ""
        self._draw()

    def table(self) -> Table:
        """The bases that are done, and what is running."""
        table = Table() if self.so_far is None else as_table(self.so_far)
        failed = [] if self.so_far is None else problems(self.so_far)
        table.caption = Text("\n".join(filter(None, [*failed, self.running])))
        return table

    def _draw(self, further: str = "") -> None:
        if self.enabled:
            table = self.table()
            table.caption = Text(f"{table.caption}{further}")
            self.live.update(table, refresh=True)
