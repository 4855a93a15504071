"""Does one job and notes its result; a job that is noted is not done again."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ...base import Base
from ...data import TaskData
from ...errors import CacheError, DataError, DeltapatchError
from ...file import file_digest
from ...patch import Patch
from ..answers import evaluate
from ..protocols import (
    AccuracyMatrix,
    Supporting,
    few_shot,
    joint,
    parallel,
    sequential,
    subsample,
    test_selected,
)
from ..protocols.splits import images_to_measure
from ..protocols.steps import count_parameters, take_steps
from .job import Job
from .ledger import BaseAccuracy, Matrix, Row, SavedPatch, Score, packed, read_row, replace_file, write_row

_PROTOCOLS = {"joint": joint, "sequential": sequential, "parallel": parallel}


@dataclass(frozen=True)
class _Outcome:
    """What the fits of a job gave: the patch of each task, how well it does, and the rest of a `Row`."""

    patches: Mapping[str, Patch]
    scores: tuple[Score, ...]
    seconds: float
    base_accuracy: float | None
    supporting_accuracy: float | None
    matrix: Matrix | None = None


def run_job(
    job: Job,
    folder: Path,
    base: Base | None = None,
    tasks: Sequence[TaskData] | None = None,
    supporting: Supporting | None = None,
) -> Row:
    """The result of a job: from the folder where it is noted there, else by doing it.

    The patches are written to ``folder/patches`` first and the result to ``folder/jobs`` last, each file
    whole or not at all, so that a kill at any time costs this one job. A method that refuses the base or the
    images is a result too. It can be called on any machine that has the base and the images.

    Args:
        job: what to do.
        folder: of the comparison; made if missing.
        base: the base, where it is loaded already.
        tasks: the tasks of ``job.data`` in their order, where they are open already.
        supporting: the base's own task, where it is open already.

    Raises:
        DataError: the images cannot be read, or are not those that the job was planned with.
        KeyboardInterrupt: the user ended it; nothing of this job is noted.
    """
    found = read_row(folder, job)
    if found is not None:
        return found
    started = time.perf_counter()
    for name in ("jobs", "patches"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    base = job.base.load() if base is None else base
    tasks = [source.open(job.fit.validation) for source in job.data] if tasks is None else tasks
    if supporting is None and job.supporting is not None:
        supporting = Supporting.of(base, job.supporting.open(0))
    prepared = [_prepared(job, task) for task in tasks]
    try:
        if job.protocol == "single":
            outcome = _fit_one(job, base, prepared[0], supporting, folder)
        else:
            outcome = _follow_protocol(job, base, prepared, supporting)
        for patch in outcome.patches.values():
            _check_finite(patch)
    except (DataError, CacheError):
        raise  # of the images or the disk, and not of the method
    except DeltapatchError as error:
        row = _row(job, refused=" ".join(str(error).split()), job_seconds=time.perf_counter() - started)
    else:
        row = _save(job, folder, outcome, started)
    write_row(folder, job, row)
    return row


def _prepared(job: Job, task: TaskData) -> TaskData:
    """The task with as many training images, and with the validation split, as the job says."""
    if job.few_shot is not None:
        task = few_shot(task, job.few_shot, job.fit.seed)
    elif job.share < 100:
        task = subsample(task, job.share / 100, job.fit.seed)
    return test_selected(task) if job.selection == "test" else task


def _fit_one(job: Job, base: Base, task: TaskData, supporting: Supporting | None, folder: Path) -> _Outcome:
    images, measured_on = images_to_measure(task, "test")
    started = time.perf_counter()
    given = None if supporting is None else supporting.validation
    (step,) = take_steps("sequential", base, [task], job.make_method(), job.fit, given)
    seconds = time.perf_counter() - started
    patch = step.patches[task.name]
    evaluation = evaluate(base, images, patch, workers=job.fit.workers)
    score = Score(
        task=task.name,
        accuracy=evaluation.accuracy.value,
        images=len(evaluation.labels),
        measured_on=measured_on,
        validation_accuracy=_validation_accuracy(patch),
        correct=packed(evaluation.correct),
    )
    before = after = None
    if supporting is not None:
        before = after = _base_accuracy(job, folder, base, supporting)
        if step.supporting is not None:
            found = evaluate(base, supporting.images, step.supporting, workers=job.fit.workers)
            after = found.accuracy.value
    return _Outcome(step.patches, (score,), seconds, before, after)


def _follow_protocol(
    job: Job, base: Base, tasks: Sequence[TaskData], supporting: Supporting | None
) -> _Outcome:
    result = _PROTOCOLS[job.protocol](base, tasks, job.make_method(), job.fit, supporting)
    patches = result.steps[-1].patches
    final = result.matrix.final()
    scores = tuple(
        Score(
            task=task.name,
            accuracy=final[task.name],
            images=result.measurements[task.name].images,
            measured_on=images_to_measure(task, "test")[1],
            # The patch of joint patching answers for all tasks.
            validation_accuracy=_validation_accuracy(patches.get(task.name, next(iter(patches.values())))),
        )
        for task in tasks
    )
    before = after = None
    if supporting is not None:
        before, after = float(result.matrix.values[0, 0]), float(result.matrix.values[-1, 0])
    return _Outcome(patches, scores, result.seconds, before, after, _stored(result.matrix))


def _base_accuracy(job: Job, folder: Path, base: Base, supporting: Supporting) -> float:
    """The base's accuracy on its own task, measured once for all jobs of a folder."""
    assert job.supporting is not None
    content = json.dumps([job.base.without_place(), job.base.classes, job.supporting.digest], sort_keys=True)
    path = folder / "jobs" / f"base-{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValidationError):
        return BaseAccuracy.model_validate_json(path.read_bytes()).accuracy
    found = evaluate(base, supporting.images, None, workers=job.fit.workers)
    known = BaseAccuracy(accuracy=found.accuracy.value, images=len(found.labels))
    replace_file(path, known.model_dump_json().encode())
    return known.accuracy


def _validation_accuracy(patch: Patch) -> float:
    found = patch.info.figures.get("validation/accuracy")
    if found is None:
        raise DataError("there are no readable validation images, so nothing can be chosen; give some")
    return found


def _stored(matrix: AccuracyMatrix) -> Matrix:
    values = tuple(
        tuple(None if np.isnan(value) else value for value in row) for row in matrix.values.tolist()
    )
    return Matrix(columns=matrix.columns, rows=matrix.rows, values=values)


def _check_finite(patch: Patch) -> None:
    """A fit that has diverged is a result of its method; a file that cannot be written is not."""
    for name, tensor in patch.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DeltapatchError(f"the fit has diverged: '{name}' is not finite; lower the learning rate")


def _save(job: Job, folder: Path, outcome: _Outcome, started: float) -> Row:
    """Writes the patches, each one once however many tasks it answers for."""
    different: dict[int, Patch] = {id(patch): patch for patch in outcome.patches.values()}
    saved: dict[int, SavedPatch] = {}
    for number, (key, patch) in enumerate(different.items()):
        names = ", ".join(task for task, its in outcome.patches.items() if its is patch)
        name = f"{job.digest}{f'-{number + 1}' if number else ''}.safetensors"
        path = patch.save(folder / "patches" / name)
        saved[key] = SavedPatch(task=names, name=name, digest=file_digest(path), bytes=path.stat().st_size)
    parameters, head_parameters = count_parameters(outcome.patches)
    return _row(
        job,
        scores=outcome.scores,
        base_accuracy=outcome.base_accuracy,
        supporting_accuracy=outcome.supporting_accuracy,
        parameters=parameters,
        head_parameters=head_parameters,
        seconds=outcome.seconds,
        job_seconds=time.perf_counter() - started,
        patches=tuple(saved.values()),
        matrix=outcome.matrix,
    )


def _row(job: Job, **found: Any) -> Row:
    return Row(
        digest=job.digest,
        method=job.method,
        options=dict(job.options),
        seed=job.fit.seed,
        protocol=job.protocol,
        amount=job.amount,
        selection=job.selection,
        **found,
    )
