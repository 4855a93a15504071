"""A table that is drawn anew after each job: how far every method is."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..wording import duration, percent
from .ledger import Row
from .planning import Planned


class LiveTable:
    """Draws on standard error, so that standard output stays for results; silent when switched off."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.planned: Sequence[Planned] = ()
        self.rows: list[tuple[Planned, Row]] = []
        self.running = ""
        # Drawn when something has happened and not by a clock, which would be a thread beside the fits.
        self.live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> "LiveTable":
        if self.enabled:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.live.stop()

    def plan(self, planned: Sequence[Planned]) -> None:
        """Called once, with all jobs."""
        self.planned = planned
        self._draw()

    def begin(self, planned: Planned) -> None:
        """Called when a job begins."""
        self.running = str(planned)
        self._draw()

    def finish(self, planned: Planned, row: Row) -> None:
        """Called when a job's result is there."""
        self.rows.append((planned, row))
        self.running = ""
        self._draw()

    def table(self) -> Table:
        """A line for each method, task and setting. Test figures are shown at the end only."""
        table = Table("method", "tasks", "images", "done", "validation", "parameters", "time a job")
        for column in table.columns[3:]:
            column.justify = "right"
        groups = dict.fromkeys((one.contender, one.tasks, one.setting) for one in self.planned)
        for contender, tasks, setting in groups:
            key = (contender, tasks, setting)
            of_group = [one for one in self.planned if (one.contender, one.tasks, one.setting) == key]
            rows = [row for one, row in self.rows if (one.contender, one.tasks, one.setting) == key]
            fitted = [row for row in rows if not row.refused]
            best = max(fitted, key=lambda row: row.validation_accuracy, default=None)
            seconds = sum(row.job_seconds for row in rows) / max(len(rows), 1)
            protocol, amount = setting
            cells = (
                contender,
                ", ".join(tasks) if protocol == "single" else f"{', '.join(tasks)} ({protocol})",
                amount,
                f"{len(rows)}/{len(of_group)}",
                percent(best.validation_accuracy) if best else "refused" if rows else "",
                f"{best.parameters:,}" if best else "",
                duration(seconds) if rows else "",
            )
            # As text: names come from the data and are no markup.
            table.add_row(*(Text(cell) for cell in cells))
        table.caption = Text(self.running)
        return table

    def _draw(self) -> None:
        if self.enabled:
            self.live.update(self.table(), refresh=True)
