"""What of a comparison is kept: what validation chose, measured fairly, on all training images."""

from typing import Any

import pytest

from deltapatch.evaluation.comparing import Budget, Comparison, ComparisonConfig, Job, Row
from deltapatch.evaluation.comparing.job import BaseOptions, DataSource
from deltapatch.evaluation.comparing.ledger import Score
from deltapatch.evaluation.comparing.planning import Planned
from deltapatch.fitting.config import FitConfig
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.selection.history.remembering import records_of

Done = tuple[Planned, Row]

BASE = BaseOptions(
    source="demo",
    fingerprint="sha256:base",
    weights=None,
    size=(32, 32),
    mean=(0.5,),
    std=(0.5,),
    interpolation="bilinear",
    crop_pct=1.0,
    classes=(),
    templates=None,
)


def result(
    method: Head | Delta,
    accuracy: float,
    validation: float,
    *,
    task: str = "birds",
    measured_on: Any = "test",
    seed: int = 0,
    parameters: int = 0,
    **of_job: Any,
) -> Done:
    job = Job(
        BASE, (DataSource(task, f"digest of {task}", task),), method.name, (), FitConfig(seed=seed), **of_job
    )
    score = Score(
        task=task, accuracy=accuracy, images=100, measured_on=measured_on, validation_accuracy=validation
    )
    row = Row(
        digest=f"{method.name} {task} {seed}",
        method=method.name,
        options={},
        seed=seed,
        protocol=job.protocol,
        amount=job.amount,
        selection=job.selection,
        scores=(score,),
        parameters=parameters,
    )
    return Planned(job, method.name, method, (task,), True), row


def comparison(*done: Done) -> Comparison:
    sources = {source.name: source for planned, _ in done for source in planned.job.data}
    return Comparison(
        "net", "sha256:base", ComparisonConfig(), FitConfig(), Budget(), sources, tuple(done), ()
    )


def test_the_accuracy_of_the_method_that_is_best_on_validation_images_is_kept() -> None:
    done = [result(Head(), 0.9, 0.6), *(result(Delta(), 0.7 + seed / 10, 0.8, seed=seed) for seed in (0, 1))]
    (record,) = records_of(comparison(*done, result(Head(), 0.5, 0.5, task="cars")))[:1]
    assert record.accuracy == pytest.approx(0.75)
    assert record.method.startswith("delta")
    assert (record.pool, record.model, record.fingerprint) == ("own", "net", "sha256:base")
    assert (record.target, record.digest, record.seeds) == ("birds", "digest of birds", "0 1")
    assert record.measured_on == "test"
    assert len(record.date) == len("2026-01-31")


def test_of_equals_on_validation_images_the_smaller_is_kept_whatever_the_test_images_say() -> None:
    done = result(Delta(), 0.9, 0.8, parameters=50), result(Head(), 0.6, 0.8)
    for order in (done, done[::-1]):
        (record,) = records_of(comparison(*order))
        assert record.accuracy == 0.6


def test_each_task_has_a_result_and_says_which_images_it_is_of() -> None:
    records = records_of(
        comparison(
            result(Head(), 0.5, 0.5),
            result(Head(), 0.6, 0.6, task="cars", measured_on="validation"),
            result(Head(), 0.9, 0.9, task="tuned", measured_on="test-selected"),
        )
    )
    assert [(one.target, one.measured_on) for one in records] == [("birds", "test"), ("cars", "validation")]


def test_the_same_fits_have_the_same_name_and_more_seeds_another() -> None:
    two = [result(Head(), 0.5, 0.5, seed=seed) for seed in (0, 1)]
    (first,), (again,) = records_of(comparison(*two)), records_of(comparison(*two[::-1]))
    (more,) = records_of(comparison(*two, result(Head(), 0.5, 0.5, seed=2)))
    assert first.job == again.job != more.job


@pytest.mark.parametrize(
    "of_job", [{"share": 30}, {"few_shot": 5}, {"protocol": "joint"}, {"protocol": "parallel"}]
)
def test_fits_that_are_not_alike_between_bases_are_left_out(of_job: dict[str, Any]) -> None:
    odd = result(Delta(), 0.9, 0.9, **of_job)
    assert records_of(comparison(odd)) == ()
    (record,) = records_of(comparison(odd, result(Head(), 0.4, 0.4)))
    assert record.accuracy == 0.4


def test_a_refused_fit_is_no_result() -> None:
    planned, row = result(Head(), 0.5, 0.5)
    refused = row.model_copy(update={"refused": "no classes", "scores": ()})
    assert records_of(comparison((planned, refused))) == ()
