"""The progress bar of a fit: loss, accuracy, images a second and time left; silent when switched off."""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .history import Epoch

logger = logging.getLogger(__name__)


class FitWatch:
    """Draws on standard error, so that standard output stays for results."""

    def __init__(self, enabled: bool, epochs: int) -> None:
        self.epochs = epochs
        self.started = time.perf_counter()
        self.validation = ""
        self.task: TaskID | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not enabled,
        )

    def __enter__(self) -> "FitWatch":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bars; logs it where there are none."""
        if self.bar.disable:
            logger.info(line)
        else:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def surveying(self, label: str, images: int) -> Generator[Callable[[int], None]]:
        """A bar for one pass of the base over ``images`` images; yields what to call with the number done."""
        task = self.bar.add_task(label, total=images, figures="")
        started, done = time.perf_counter(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            rate = done / max(time.perf_counter() - started, 1e-9)
            self.bar.update(task, advance=count, figures=f"{rate:.0f} images/s")

        yield advance
        self.bar.update(task, completed=images)

    def step(self, epoch: int, step: int, images: int, loss: float, accuracy: float) -> None:
        """Called after each training step with the figures of the epoch so far."""
        if self.task is None:
            self.task = self.bar.add_task("fitting", total=self.epochs, figures="")
        if step == 1:
            self.started = time.perf_counter()
        rate = images / max(time.perf_counter() - self.started, 1e-9)
        figures = f"loss {loss:.3f}  accuracy {accuracy:.1%}{self.validation}  {rate:.0f} images/s"
        self.bar.update(self.task, completed=epoch - 1, figures=figures)

    def epoch(self, epoch: Epoch) -> None:
        """Called after each epoch."""
        if epoch.validation_accuracy is not None:
            self.validation = f"  validation {epoch.validation_accuracy:.1%}"
        if self.task is not None:
            self.bar.update(self.task, completed=epoch.number)
