"""A job is plain values, and its digest is what its result depends on."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from digits import write_digits
from tiny_clip import new_tiny_clip
from toys import toy_base

from deltapatch.base import Base
from deltapatch.data import TaskData
from deltapatch.errors import DataError, WrongBaseError
from deltapatch.evaluation.comparing.job import BaseOptions, DataSource
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta

from .conftest import FIT, MakeJob


def test_a_job_is_plain_values(make_job: MakeJob) -> None:
    job = make_job(options=tuple(Delta().configuration().items()), method="delta")
    assert json.loads(json.dumps(asdict(job)))["fit"]["epochs"] == 1
    assert pickle.loads(pickle.dumps(job)) == job
    assert job.make_method() == Delta()


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "delta"},
        {"options": (("modules", 2),)},
        {"fit": replace(FIT, seed=1)},
        {"fit": replace(FIT, epochs=2)},
        {"protocol": "joint"},
        {"selection": "test"},
        {"share": 30},
        {"few_shot": 2},
        {"data": (DataSource("digits.npz", "another digest", "digits"),)},
        {"supporting": DataSource("own.npz", "digest", "own")},
    ],
)
def test_whatever_changes_the_result_changes_the_digest(make_job: MakeJob, fields: Any) -> None:
    assert make_job(**fields).digest != make_job().digest


def test_places_and_worker_processes_do_not_change_the_digest(make_job: MakeJob) -> None:
    job = make_job()
    moved = replace(
        job,
        base=replace(job.base, weights="elsewhere.safetensors"),
        data=tuple(replace(source, source=f"elsewhere/{source.source}") for source in job.data),
        fit=replace(job.fit, workers=3),
    )
    assert moved.digest == job.digest


def test_what_the_base_calls_its_classes_matters_where_its_own_task_is_matched_with_them(
    make_job: MakeJob,
) -> None:
    own, job = DataSource("own.npz", "digest", "own"), make_job()
    turned = replace(job.base, classes=job.base.classes[::-1])
    assert make_job(base=turned).digest == job.digest
    assert make_job(base=turned, supporting=own).digest != make_job(supporting=own).digest


def test_base_and_images_can_be_had_again_from_the_job_alone(make_job: MakeJob, base: Base) -> None:
    job = make_job()
    assert job.base.load().fingerprint == base.fingerprint
    assert job.base.load().preprocessing == base.preprocessing
    assert job.base.load().classes == base.classes
    assert len(job.data[0].open(0.2).train or ()) == 40


def test_a_base_whose_classes_are_texts_can_be_had_again_with_its_prompts(tmp_path: Path) -> None:
    tiny = new_tiny_clip(pytest.importorskip("open_clip"), tmp_path)
    weights = str(tiny.weights)
    base = load_base(
        f"open_clip/{tiny.config}", weights=weights, classes=["cat", "dog"], templates=["one {}.", "two {}."]
    )
    assert BaseOptions.of(base, weights).load().fingerprint == base.fingerprint


def test_a_base_with_other_weights_is_refused(base: Base) -> None:
    options = replace(BaseOptions.of(base), fingerprint=toy_base().fingerprint)
    with pytest.raises(WrongBaseError, match="load the base with the weights that the comparison began with"):
        options.load()


def test_images_that_have_changed_are_refused(task: TaskData, tmp_path: Path) -> None:
    source = DataSource.of(write_digits(tmp_path / "digits.npz", train=41, val=30, test=30), task)
    with pytest.raises(DataError, match="has changed since this comparison was planned"):
        source.open(0.2)


def test_the_amount_of_training_images_is_said_in_words(make_job: MakeJob) -> None:
    words = [make_job(**fields).amount for fields in ({}, {"share": 30}, {"few_shot": 1}, {"few_shot": 5})]
    assert words == [
        *("all training images", "30 % of the training images"),
        *("1 image a class", "5 images a class"),
    ]
