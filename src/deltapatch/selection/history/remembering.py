"""From a finished comparison of methods to what the history keeps of it."""

import hashlib
from datetime import UTC, datetime

from ...evaluation.comparing import Comparison
from ...evaluation.comparing.table import Line, make_sections
from .record import OWN, Record

_MEASURED_FAIRLY = ("test", "validation")


def records_of(found: Comparison) -> tuple[Record, ...]:
    """What the base reached on each task: the accuracy of the method that is best on the validation images.

    Only patches that were fitted for one task alone, on all its training images, can be compared between
    bases; and figures of test images that chose the patch are no figures of new images. All others are left
    out.
    """
    alone = [
        (one, row)
        for one, row in found.done
        if one.job.protocol == "single" and one.job.share == 100 and one.job.few_shot is None
    ]
    lines = [line for section in make_sections(alone) for line in section.lines]
    fair = [line for line in lines if line.measured_on in _MEASURED_FAIRLY]
    tasks = dict.fromkeys(line.task for line in fair)
    return tuple(_record(found, _chosen([line for line in fair if line.task == task])) for task in tasks)


def _chosen(lines: list[Line]) -> Line:
    """Of equals the smallest: the test images have no say."""
    return min(lines, key=lambda line: (-line.validation_accuracy, line.parameters, line.contender))


def _record(found: Comparison, line: Line) -> Record:
    jobs = " ".join(sorted(row.digest for row in line.rows))
    return Record(
        pool=OWN,
        model=found.base,
        target=line.task,
        accuracy=line.accuracy.mean,
        fingerprint=found.fingerprint,
        digest=found.data[line.task].digest,
        measured_on=line.measured_on,
        method=line.variant,
        seeds=" ".join(str(seed) for seed in line.scores),
        job=hashlib.sha256(jobs.encode()).hexdigest()[:32],
        date=datetime.now(UTC).date().isoformat(),
    )
