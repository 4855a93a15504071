"""Figures as a person reads them: the numbers, table rows and sentences of a report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltapatch.evaluation.metrics import Evaluation, Interval, PairedDifference

_NO_BREAK = "\u00a0"
_MINUS = "\u2212"
_DASH = "\u2060–\u2060"
"""Word joiners around the dash keep the two ends of an interval on one line."""


def percent(part: float) -> str:
    """``0.873`` as "87.3 %"."""
    return f"{100 * part:.1f}{_NO_BREAK}%"


def with_interval(interval: Interval) -> str:
    """A part with its confidence interval, as "87.3 % (81.0–91.7)"."""
    return f"{percent(interval.value)} ({_bounds(interval)})"


def signed_points(part: float) -> str:
    """A difference of two parts in percentage points: ``0.021`` as "+2.1", and no sign on "0.0"."""
    text = f"{100 * part:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", _MINUS)


def p_value(value: float) -> str:
    """As "p = 0.021", or "p < 0.001"."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def markdown_cell(text: str) -> str:
    """A cell of a Markdown table. A name comes from the data: it must not end its cell or its row, nor begin
    an element of a page.
    """
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def file_size(size: int) -> str:
    """A number of bytes as "1.2 MB"."""
    if size < 1000:
        return f"{size}{_NO_BREAK}bytes"
    scaled = size / 1000
    for unit in ("kB", "MB"):
        if scaled < 999.95:
            return f"{scaled:.1f}{_NO_BREAK}{unit}"
        scaled /= 1000
    return f"{scaled:.1f}{_NO_BREAK}GB"


def duration(seconds: float) -> str:
    """A time as "4.2 s", "3 min 05 s" or "2 h 07 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f}{_NO_BREAK}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{_NO_BREAK}min {whole % 60:02d}{_NO_BREAK}s"
    return f"{whole // 3600}{_NO_BREAK}h {whole % 3600 // 60:02d}{_NO_BREAK}min"


def summary(patch: Evaluation, split: str) -> str:
    """The accuracy of the patch on a split in one sentence."""
    images = f"{len(patch.labels):,} {split} image{'' if len(patch.labels) == 1 else 's'}"
    accuracy = patch.accuracy
    interval = f"95{_NO_BREAK}% interval {_bounds(accuracy)}"
    return f"On {images} the patch answers {percent(accuracy.value)} right ({interval})."


def comparison(head_only: Evaluation, compared: PairedDifference) -> str:
    """How the patch stands to a head alone in one sentence; ``compared`` is the patch against the head."""
    difference, chance = compared.difference, p_value(compared.p_value)
    points = f"{100 * abs(difference.value):.1f} percentage points"
    bounds = f"{signed_points(difference.low)} to {signed_points(difference.high)}"
    if compared.verdict == "tie":
        outcome = f"a tie, since a difference of {points} ({bounds}, {chance}) can be chance"
    else:
        outcome = f"the patch is {compared.verdict} by {points} ({bounds}, {chance})"
    return f"A head alone answers {percent(head_only.accuracy.value)} right: {outcome}."


@dataclass(frozen=True)
class FigureRow:
    """One figure of one or more models, in words."""

    name: str
    hint: str
    values: tuple[str, ...]


_FIGURES: tuple[tuple[str, str, Callable[[Evaluation], str | None]], ...] = (
    ("accuracy", "higher is better", lambda model: with_interval(model.accuracy)),
    ("top-5 accuracy", "higher is better", lambda model: with_interval(model.top5) if model.top5 else None),
    (
        "balanced accuracy",
        "mean over the classes, higher is better",
        lambda model: percent(model.balanced_accuracy),
    ),
    ("macro F1", "mean over the classes, higher is better", lambda model: percent(model.macro_f1)),
    ("log loss", "lower is better", lambda model: f"{model.log_loss:.3f}"),
    (
        "calibration error",
        "of the confidence, lower is better",
        lambda model: percent(model.calibration_error),
    ),
    ("images", "", lambda model: f"{len(model.labels):,}"),
    ("unreadable images", "skipped", lambda model: f"{model.skipped:,}"),
)


def figure_rows(models: Sequence[Evaluation]) -> list[FigureRow]:
    """A row for each figure that exists for all the models, which answered the same images."""
    rows: list[FigureRow] = []
    for name, hint, write in _FIGURES:
        values = tuple(value for value in map(write, models) if value is not None)
        if len(values) == len(models):
            rows.append(FigureRow(name, hint, values))
    return rows


def _bounds(interval: Interval) -> str:
    return f"{100 * interval.low:.1f}{_DASH}{100 * interval.high:.1f}"
