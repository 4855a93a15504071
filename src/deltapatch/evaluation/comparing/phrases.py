"""The lines of the tables as a person reads them."""

from ..wording import duration, file_size, percent
from .table import Line, Section, Standing

STANDING_NAMES = (
    "method",
    "mean over tasks",
    "parameters with head",
    "time of a fit",
    "against the best",
    "over",
)
LINE_NAMES = (
    *("task", "method", "chosen", "accuracy", "95 % interval", "validation", "seeds", "parameters"),
    *(
        "of the head",
        "time of a fit",
        "file",
        "base on its own task",
        "afterwards",
        "harmonic mean",
        "images",
    ),
)

INTERVALS = (
    "The 95 % intervals are of the mean over the seeds, on these test images; with one seed, or where"
    " all agree, of the share of images that were answered right. The accuracy ± is the standard deviation"
    " over the seeds. The best method is the best on these images, and comparisons with it are not corrected"
    " for their number."
)


def heading(section: Section) -> str:
    """A section's name."""
    return f"{section.protocol.capitalize()}, {section.amount}"


def standing_in_words(one: Standing) -> tuple[str, ...]:
    """One method over all tasks, under `STANDING_NAMES`."""
    return (
        one.contender,
        percent(one.accuracy),
        f"{one.parameters:,.0f}",
        duration(one.seconds),
        one.verdict,
        one.compared_by,
    )


def line_in_words(line: Line) -> tuple[str, ...]:
    """One method on one task, under `LINE_NAMES`; a dash for what was not measured."""
    spread = "" if line.accuracy.n == 1 else f" ± {100 * line.accuracy.standard_deviation:.1f}"
    own_task = (line.base_accuracy, line.supporting_accuracy, line.harmonic)
    return (
        line.task,
        line.contender,
        line.variant,
        f"{percent(line.accuracy.mean)}{spread}",
        f"{100 * line.interval.low:.1f}–{100 * line.interval.high:.1f}",
        percent(line.validation_accuracy),
        str(line.accuracy.n),
        f"{line.parameters:,}",
        f"{line.head_parameters:,}",
        duration(line.seconds),
        file_size(line.file_bytes),
        *("–" if value is None else percent(value) for value in own_task),
        line.measured_on,
    )
