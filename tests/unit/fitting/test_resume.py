"""A fit that ended early goes on from its checkpoint to the very same patch."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import write_digits
from toys import copied_state, same_state

from deltapatch.base import Base
from deltapatch.cli import main
from deltapatch.data import TaskData, open_data
from deltapatch.demo.base import PREPROCESSING, build_demo_model
from deltapatch.errors import DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.patch import Patch

# Runs the command line in a process that dies within its third epoch, as if its memory had run out.
KILLED_FIT = """
import os, signal, sys
import torch
from deltapatch.cli import main
from deltapatch.fitting.watching import FitWatch

def watch(self, epoch, step, *figures):
    if (epoch, step) == (3, 1):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
FitWatch.step = watch
main(sys.argv[1:])
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tmp_path / "digits.checkpoint"


def _interrupt(fit: Any, at_step: Any, task: TaskData, checkpoint: Path, **options: Any) -> Any:
    """A fit of four epochs that the user ends within the third."""

    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    at_step(3, 1, press_ctrl_c)
    result = fit(task, checkpoint=checkpoint, epochs=4, **options)
    at_step(0, 0, press_ctrl_c)
    assert result.interrupted
    assert checkpoint.exists()
    return result


def test_a_fit_that_was_killed_and_resumed_gives_bit_for_bit_the_uninterrupted_patch(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits.npz")
    killed, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    options = ["--base", "demo", "--device", "cpu", "--epochs", "4", "--modules", "1", "--no-progress"]
    arguments = ["fit", str(data), *options, "--out"]
    dead = subprocess.run([sys.executable, "-c", KILLED_FIT, *arguments, str(killed)], check=False)
    assert dead.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert killed.with_name("killed.safetensors.checkpoint").exists()

    main([*arguments, str(killed), "--resume"])
    main([*arguments, str(whole)])
    resumed, uninterrupted = Patch.load(killed), Patch.load(whole)
    assert same_state(resumed, copied_state(uninterrupted))
    assert resumed.info.figures == uninterrupted.info.figures
    assert not list(tmp_path.glob("*.checkpoint"))


@pytest.mark.parametrize("options", [{}, {"augment": "standard"}], ids=["trunk kept", "augmented"])
def test_an_interrupted_fit_that_is_resumed_gives_the_uninterrupted_patch_and_history(
    task: TaskData, fit: Any, at_step: Any, checkpoint: Path, options: dict[str, Any]
) -> None:
    _interrupt(fit, at_step, task, checkpoint, **options)
    resumed = fit(task, checkpoint=checkpoint, resume=True, epochs=4, **options)
    whole = fit(task, epochs=4, **options)
    assert same_state(resumed.patch, copied_state(whole.patch))
    assert resumed.best_epoch == whole.best_epoch
    assert [e.training_loss for e in resumed.history] == [e.training_loss for e in whole.history]


def test_an_interrupted_fit_keeps_the_best_of_the_epochs_that_it_finished(
    task: TaskData, fit: Any, at_step: Any, checkpoint: Path
) -> None:
    result = _interrupt(fit, at_step, task, checkpoint)
    assert len(result.history) == 2
    saved = torch.load(checkpoint, weights_only=True)["best_state"]
    found = result.patch.state_dict()
    assert all(torch.equal(tensor, found[name.removeprefix("patch.")]) for name, tensor in saved.items())


def test_without_resume_a_checkpoint_is_not_looked_at(
    task: TaskData, fit: Any, at_step: Any, checkpoint: Path
) -> None:
    _interrupt(fit, at_step, task, checkpoint)
    afresh = fit(task, checkpoint=checkpoint, seed=8)
    assert len(afresh.history) == 2
    assert not checkpoint.exists()


def test_resume_without_a_checkpoint_fits_from_the_start(task: TaskData, fit: Any, checkpoint: Path) -> None:
    resumed = fit(task, checkpoint=checkpoint, resume=True)
    assert same_state(resumed.patch, copied_state(fit(task).patch))


@pytest.fixture
def other_base() -> Base:
    module = build_demo_model()
    with torch.no_grad():
        module.get_submodule("fc").bias[0] += 1
    return load_base(module, size=32, mean=PREPROCESSING.mean, std=PREPROCESSING.std)


@pytest.mark.parametrize("different", ["seed", "epochs", "method", "data", "classes", "base"])
def test_a_checkpoint_of_another_fit_is_refused_by_its_name(
    task: TaskData,
    fit: Any,
    at_step: Any,
    checkpoint: Path,
    other_base: Base,
    different: str,
    tmp_path: Path,
) -> None:
    _interrupt(fit, at_step, task, checkpoint)
    changes: dict[str, Any] = {
        "seed": {"seed": 1},
        "epochs": {"epochs": 5},
        "method": {"method": Delta(modules=2)},
        "data": {"task": open_data(write_digits(tmp_path / "other.npz", train=63))},
        "classes": {"task": replace(task, classes=task.classes[::-1])},
        "base": {"on": other_base},
    }
    with pytest.raises(DeltapatchError, match=r"digits\.checkpoint: this checkpoint belongs to another fit"):
        fit(**{"task": task, "checkpoint": checkpoint, "resume": True, "epochs": 4, **changes[different]})
    assert checkpoint.exists()
