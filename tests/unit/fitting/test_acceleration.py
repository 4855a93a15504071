"""A fit runs where its base is, and its figures go to trackers that are there."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from deltapatch.base import Base
from deltapatch.data import TaskData
from deltapatch.errors import DeltapatchError
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.fit import fit_task
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head


def test_a_fit_runs_on_its_bases_device_whatever_an_earlier_fit_ran_on(base: Base, task: TaskData) -> None:
    fit_task(base, task, Head(), progress=False)
    for state in (AcceleratorState, PartialState):
        state._shared_state["device"] = torch.device("cuda")  # as a fit on a graphics card leaves it
    patch = fit_task(base, task, Head(), progress=False).patch
    assert {parameter.device.type for parameter in patch.parameters()} == {"cpu"}
    assert base.device.type == "cpu"
    assert PartialState().device.type == "cpu"


@pytest.mark.parametrize("tracker", ["tensorboard", "no-such-tracker"])
def test_a_tracker_that_is_not_installed_is_an_error_before_the_fit(
    base: Base, task: TaskData, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setattr("deltapatch.fitting.acceleration.get_available_trackers", lambda: ["mlflow"])
    with pytest.raises(DeltapatchError, match=f"the tracker '{tracker}' is not installed.*mlflow"):
        fit_task(base, task, progress=False, track=[tracker])


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))), reason="needs tensorboard"
)
def test_tensorboard_gets_a_file_of_events(base: Base, task: TaskData, tmp_path: Path) -> None:
    options = FitConfig(epochs=2)
    checkpoint = tmp_path / "fit.checkpoint"
    fit_task(
        base, task, Delta(modules=1), options, checkpoint=checkpoint, progress=False, track=["tensorboard"]
    )
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents.*"))
    for figure in (b"training_loss", b"validation_accuracy", b"learning_rate"):
        assert figure in events
