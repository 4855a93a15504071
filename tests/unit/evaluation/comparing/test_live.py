"""The table of how far a comparison is."""

from rich.console import Console

from deltapatch.evaluation.comparing.live import LiveTable
from deltapatch.evaluation.comparing.planning import Planned
from deltapatch.methods.head import Head

from .conftest import MakeJob, MakeRow


def _drawn(live: LiveTable) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(live.table())
    return capture.get()


def test_each_line_says_how_many_jobs_are_done_and_shows_validation_only(
    make_job: MakeJob, make_row: MakeRow
) -> None:
    planned = [Planned(make_job(), "[red]head", Head(), ("digits",), False) for _ in range(2)]
    live = LiveTable(enabled=False)
    live.plan(planned)
    assert "0/2" in _drawn(live)
    live.begin(planned[0])
    assert "head on digits, all training images, seed 0" in _drawn(live)
    live.finish(planned[0], make_row(accuracy=0.123, validation=0.456))
    drawn = _drawn(live)
    # A name is no markup.
    assert "[red]head" in drawn
    assert "1/2" in drawn
    assert "45.6" in drawn
    assert "12.3" not in drawn


def test_a_refused_method_is_said_to_be_refused(make_job: MakeJob, make_row: MakeRow) -> None:
    planned = Planned(make_job(), "delta", Head(), ("digits",), False)
    live = LiveTable(enabled=False)
    live.plan([planned])
    live.finish(planned, make_row(refused="no stage", scores=()))
    assert "refused" in _drawn(live)
