"""The demo's base, a few digits, and jobs on them that take a fraction of a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digits import write_digits

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.evaluation.comparing import Job
from deltapatch.evaluation.comparing.job import BaseOptions, DataSource
from deltapatch.evaluation.comparing.ledger import Row, Score
from deltapatch.evaluation.protocols import steps
from deltapatch.fitting.config import FitConfig
from deltapatch.loading import load_base
from deltapatch.methods.head import Head

FIT = FitConfig(epochs=1, precision="fp32", cache="off")

MakeJob = Callable[..., Job]
MakeRow = Callable[..., Row]


@pytest.fixture(scope="session")
def base() -> Base:
    """Shared by all tests, since none may change it."""
    return load_base("demo", device="cpu")


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", train=40, val=30, test=30)


@pytest.fixture(scope="session")
def task(digits_file: Path) -> TaskData:
    return open_data(digits_file)


@pytest.fixture
def make_job(base: Base, digits_file: Path, task: TaskData) -> MakeJob:
    """A job of the head method; keyword arguments replace fields."""

    def make(**fields: Any) -> Job:
        defaults: dict[str, Any] = {
            "base": BaseOptions.of(base),
            "data": (DataSource.of(digits_file, task),),
            "method": Head.name,
            "options": (),
            "fit": FIT,
        }
        return Job(**(defaults | fields))

    return make


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that are fitted while the test runs, one entry for each fit."""
    fitted: list[str] = []
    fit_task = steps.fit_task

    def counted(base: Base, task: TaskData, method: Any, *rest: Any, **options: Any) -> Any:
        fitted.append(method.name)
        return fit_task(base, task, method, *rest, **options)

    monkeypatch.setattr(steps, "fit_task", counted)
    return fitted


@pytest.fixture
def make_row() -> MakeRow:
    """A result on one task with made-up figures."""

    def make(accuracy: float = 0.5, validation: float = 0.5, seed: int = 0, **fields: Any) -> Row:
        task, correct = fields.pop("task", "digits"), fields.pop("correct", "")
        score = Score(
            task=task,
            accuracy=accuracy,
            images=fields.pop("images", 100),
            measured_on=fields.pop("measured_on", "test"),
            validation_accuracy=validation,
            correct=correct,
        )
        defaults: dict[str, Any] = {
            "digest": "0" * 32,
            "method": "head",
            "options": {},
            "seed": seed,
            "protocol": "single",
            "amount": "all training images",
            "selection": "validation",
            "scores": (score,),
            "parameters": 10,
            "head_parameters": 20,
            "seconds": 2.0,
            "job_seconds": 3.0,
        }
        return Row(**(defaults | fields))

    return make
