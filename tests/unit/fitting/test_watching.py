"""The progress bar and the trackers: what a person sees of a fit."""

import importlib.util
from pathlib import Path

import pytest

import deltapatch
from deltapatch.base import Base
from deltapatch.data import TaskData
from deltapatch.errors import DeltapatchError
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.history import Epoch
from deltapatch.fitting.watching import FitWatch
from deltapatch.methods.delta import Delta


def _watch(enabled: bool) -> None:
    with FitWatch(enabled, epochs=2) as watch:
        with watch.surveying("train", 8) as advance:
            advance(8)
        watch.step(1, 1, 4, 0.5, 0.75)
        watch.epoch(Epoch(1, 0.5, 0.75, 0.25, 0.875, 1e-3, 0.1))
        watch.step(2, 1, 4, 0.25, 1.0)


def test_the_bar_stands_on_standard_error_and_says_loss_accuracy_and_validation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    _watch(enabled=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "base on train images" in err
    assert "8/8" in err
    assert "loss 0.250  accuracy 100.0%  validation 87.5%" in err


def test_a_bar_that_is_switched_off_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _watch(enabled=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("tracker", ["tensorboard", "no-such-tracker"])
def test_a_tracker_that_is_not_installed_is_an_error_before_the_fit(
    base: Base, task: TaskData, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setattr("deltapatch.fitting.fit.get_available_trackers", lambda: ["mlflow"])
    with pytest.raises(DeltapatchError, match=f"the tracker '{tracker}' is not installed.*mlflow"):
        deltapatch.fit(base, task, progress=False, track=[tracker])


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))), reason="needs tensorboard"
)
def test_tensorboard_gets_a_file_of_events(base: Base, task: TaskData, tmp_path: Path) -> None:
    options = FitConfig(epochs=2)
    checkpoint = tmp_path / "fit.checkpoint"
    deltapatch.fit(
        base, task, Delta(modules=1), options, checkpoint=checkpoint, progress=False, track=["tensorboard"]
    )
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*"))
    for figure in (b"training_loss", b"validation_accuracy", b"learning_rate"):
        assert figure in events
