"""A job is done once, its result is whole or absent, and a method that refuses is a result too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digits import write_digits
from toys import toy_base

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.evaluation.answers import evaluate
from deltapatch.evaluation.comparing import running
from deltapatch.evaluation.comparing.job import BaseOptions, DataSource, Job
from deltapatch.evaluation.comparing.ledger import entry_of, read_row
from deltapatch.evaluation.comparing.running import run_job
from deltapatch.evaluation.protocols import Supporting, steps
from deltapatch.fitting import interpolating
from deltapatch.fitting.judging import score
from deltapatch.patch import Patch

from .conftest import FIT, MakeJob


def test_the_result_says_what_the_patch_in_the_file_does(
    make_job: MakeJob, base: Base, task: TaskData, tmp_path: Path
) -> None:
    row = run_job(make_job(method="delta", options=(("modules", 1),)), tmp_path, base, [task])
    (score,), (saved,) = row.scores, row.patches
    patch = Patch.load(tmp_path / "patches" / saved.name)
    assert task.test is not None
    evaluation = evaluate(base, task.test, patch)
    assert score.answers is not None
    assert np.array_equal(score.answers, evaluation.correct)
    assert (score.accuracy, score.images) == (evaluation.accuracy.value, 30)
    assert score.validation_accuracy == patch.info.figures["validation/accuracy"]
    assert row.parameters == patch.num_parameters(head=False) > 0
    assert row.parameters + row.head_parameters == patch.num_parameters()
    assert row.file_bytes == (tmp_path / "patches" / saved.name).stat().st_size


def test_base_and_images_need_not_be_open(
    make_job: MakeJob, base: Base, task: TaskData, tmp_path: Path
) -> None:
    job = make_job()
    assert run_job(job, tmp_path / "a").scores == run_job(job, tmp_path / "b", base, [task]).scores


def test_a_job_that_is_done_is_not_done_again(
    make_job: MakeJob, base: Base, tmp_path: Path, fits: list[str]
) -> None:
    first = run_job(make_job(), tmp_path, base)
    assert run_job(make_job(), tmp_path, base) == first
    assert fits == ["head"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def test_a_task_with_a_new_name_is_fitted_again(
    make_job: MakeJob, base: Base, task: TaskData, tmp_path: Path, fits: list[str]
) -> None:
    run_job(make_job(), tmp_path, base, [task])
    renamed = replace(task, name="renamed")
    job = make_job(data=(DataSource.of("renamed.npz", renamed),))
    assert run_job(job, tmp_path, base, [renamed]).scores[0].task == "renamed"
    assert fits == ["head", "head"]


@pytest.mark.parametrize("damage", ["cut entry", "other entry", "cut patch", "no patch", "other patch"])
def test_what_is_damaged_or_another_job_s_is_done_again(
    make_job: MakeJob, base: Base, tmp_path: Path, fits: list[str], damage: str
) -> None:
    job, other = make_job(), make_job(fit=replace(FIT, balance=True))
    whole = run_job(job, tmp_path, base)
    patch, others_patch = (tmp_path / "patches" / f"{one.digest}.safetensors" for one in (job, other))
    run_job(other, tmp_path, base)
    if damage == "cut entry":
        _cut(entry_of(tmp_path, job))
    elif damage == "other entry":
        entry_of(tmp_path, job).write_bytes(entry_of(tmp_path, other).read_bytes())
    elif damage == "cut patch":
        _cut(patch)
    elif damage == "no patch":
        patch.unlink()
    else:
        patch.write_bytes(others_patch.read_bytes())
    assert read_row(tmp_path, job) is None
    again = run_job(job, tmp_path, base)
    assert len(fits) == 3
    assert again.scores == whole.scores
    assert read_row(tmp_path, job) == again


def test_a_method_that_refuses_the_base_is_a_result_with_its_reason_in_one_line(
    make_job: MakeJob, tmp_path: Path, task: TaskData, fits: list[str]
) -> None:
    base = toy_base([])  # there is no stage in it
    job = make_job(base=BaseOptions.of(base), method="delta")
    row = run_job(job, tmp_path, base, [task])
    assert row.refused
    assert "\n" not in row.refused
    assert (row.scores, row.patches) == ((), ())
    assert run_job(job, tmp_path, base, [task]) == row
    assert len(fits) == 1


def test_a_fit_that_has_diverged_is_a_result_and_leaves_no_patch(
    make_job: MakeJob, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_task = steps.fit_task

    def diverged(*arguments: Any, **options: Any) -> Any:
        result = fit_task(*arguments, **options)
        assert result.patch.head is not None
        result.patch.head.bias.data[0] = float("nan")
        return result

    monkeypatch.setattr(steps, "fit_task", diverged)
    row = run_job(make_job(), tmp_path, base)
    assert "not finite" in row.refused
    assert not list((tmp_path / "patches").iterdir())


@pytest.mark.parametrize("error", [DataError("the disk is gone"), KeyboardInterrupt()])
def test_what_is_not_the_method_s_fault_is_not_noted(
    make_job: MakeJob, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(steps, "fit_task", fail)
    with pytest.raises(type(error)):
        run_job(make_job(), tmp_path, base)
    assert not entry_of(tmp_path, make_job()).exists()


def test_the_patch_is_written_before_the_entry(
    make_job: MakeJob, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, job: Job, row: Any) -> None:
        assert (folder / "patches" / row.patches[0].name).is_file()
        raise DeltapatchError("no room")

    monkeypatch.setattr(running, "write_row", fail)
    with pytest.raises(DeltapatchError, match="no room"):
        run_job(make_job(), tmp_path, base)
    assert read_row(tmp_path, make_job()) is None


# --- how many images, and which ones choose ----------------------------------------------------------------


def test_few_shots_are_so_many_training_images_of_each_class(
    make_job: MakeJob, base: Base, tmp_path: Path
) -> None:
    row = run_job(make_job(few_shot=1), tmp_path, base)
    fitted = Patch.load(tmp_path / "patches" / row.patches[0].name).info.fitted_on
    assert fitted is not None
    assert fitted.train == 10
    assert row.amount == "1 image a class"


def test_a_test_selected_result_says_so(make_job: MakeJob, base: Base, tmp_path: Path) -> None:
    row = run_job(make_job(selection="test"), tmp_path, base)
    assert row.scores[0].measured_on == "test-selected"
    assert row.scores[0].accuracy == pytest.approx(row.scores[0].validation_accuracy)


# --- the base's own task, and several tasks ----------------------------------------------------------------


@pytest.fixture
def own_task(base: Base, digits_file: Path, tmp_path: Path) -> TaskData:
    """The digits, called as the base calls its classes, in an order of their own."""
    names = np.array(["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"])
    return open_data(write_digits(tmp_path / "own.npz", train=10, val=10, test=25, classes=names))


def test_the_base_is_measured_once_for_all_jobs(
    make_job: MakeJob, base: Base, own_task: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Supporting.of(base, own_task)
    source = DataSource.of("own.npz", own_task)
    first = run_job(make_job(supporting=source), tmp_path, base, supporting=own)
    alone = evaluate(base, own.images, None).accuracy.value
    assert (first.base_accuracy, first.supporting_accuracy) == (alone, alone)

    asked: list[object] = []

    def watched(base: Base, images: Any, patch: Any, **options: Any) -> Any:
        asked.append(patch)
        return evaluate(base, images, patch, **options)

    monkeypatch.setattr(running, "evaluate", watched)
    second = run_job(make_job(supporting=source, fit=replace(FIT, seed=1)), tmp_path, base, supporting=own)
    assert second.base_accuracy == alone
    assert len(asked) == 1
    assert asked[0] is not None


@pytest.mark.parametrize("protocol", ["joint", "sequential", "parallel"])
def test_protocols_of_several_tasks_have_a_score_for_each_and_their_matrix(
    make_job: MakeJob, base: Base, task: TaskData, tmp_path: Path, protocol: Any
) -> None:
    tasks = [task, replace(task, name="more")]
    data = tuple(DataSource.of("digits.npz", one) for one in tasks)
    row = run_job(make_job(data=data, protocol=protocol), tmp_path, base, tasks)
    assert not row.refused
    assert [score.task for score in row.scores] == ["digits", "more"]
    assert row.matrix is not None
    assert row.matrix.columns == ("digits", "more")
    assert [score.accuracy for score in row.scores] == list(row.matrix.values[-1])
    assert len(row.patches) == (1 if protocol == "joint" else 2)
    assert all((tmp_path / "patches" / patch.name).is_file() for patch in row.patches)
    assert read_row(tmp_path, make_job(data=data, protocol=protocol)) == row


def test_weights_that_the_tasks_share_are_counted_once(
    make_job: MakeJob, base: Base, task: TaskData, tmp_path: Path
) -> None:
    tasks = [task, replace(task, name="more")]
    data = tuple(DataSource.of("digits.npz", one) for one in tasks)
    job = make_job(method="interpolate", options=(("alpha", 0.5),), data=data, protocol="sequential")
    row = run_job(job, tmp_path, base, tasks)
    assert not row.refused
    patch = Patch.load(tmp_path / "patches" / row.patches[0].name)
    assert row.parameters == patch.num_parameters(head=False) > 0
    assert row.head_parameters == 2 * (patch.num_parameters() - row.parameters)


def test_a_method_that_weighs_the_base_s_own_task_chooses_by_its_validation_images(
    make_job: MakeJob, base: Base, own_task: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    def watched(base: Base, patch: Patch, images: Any, *rest: Any, headless: bool = False) -> Any:
        if headless:
            judged.append(len(images))
        return score(base, patch, images, *rest, headless=headless)

    monkeypatch.setattr(interpolating, "score", watched)
    job = make_job(
        method="interpolate", options=(("steps", 2),), supporting=DataSource.of("own.npz", own_task)
    )
    own = Supporting.of(base, own_task)
    row = run_job(job, tmp_path, base, supporting=own)
    assert own_task.val is not None
    assert own_task.test is not None
    assert set(judged) == {len(own_task.val)} != {len(own_task.test)}
    (saved,) = row.patches
    headless = Patch.load(tmp_path / "patches" / saved.name).without_head()
    assert row.supporting_accuracy == evaluate(base, own.images, headless).accuracy.value
