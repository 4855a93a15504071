"""A checkpoint is the old state or the new one, and only ever read as plain values."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from deltapatch.errors import DeltapatchError
from deltapatch.fitting.checkpoint import Checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "birds.checkpoint", identity="this fit", resume=True)


def test_what_was_saved_is_loaded(checkpoint: Checkpoint) -> None:
    checkpoint.save({"weight": torch.arange(3.0), "best": (0.5, 0.9), "history": [{"number": 1}]})
    state = checkpoint.load()
    assert state is not None
    assert torch.equal(state["weight"], torch.arange(3.0))
    assert (state["best"], state["history"]) == ((0.5, 0.9), [{"number": 1}])


def test_there_is_nothing_to_load_before_the_first_save_or_where_it_is_not_asked_for(
    checkpoint: Checkpoint,
) -> None:
    assert checkpoint.load() is None
    checkpoint.save({})
    assert Checkpoint(checkpoint.path, checkpoint.identity, resume=False).load() is None


def test_a_checkpoint_of_another_fit_is_refused(checkpoint: Checkpoint) -> None:
    Checkpoint(checkpoint.path, "another fit", resume=True).save({})
    with pytest.raises(DeltapatchError, match=r"birds\.checkpoint: this checkpoint belongs to another fit"):
        checkpoint.load()


class _Harmful:
    """Pickled, it makes a file when it is read carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_damaged_or_hostile_checkpoint_is_an_error_with_its_name(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint.save({"weight": torch.zeros(1000)})
    whole = checkpoint.path.read_bytes()
    trace = tmp_path / "executed"
    for content in (b"", whole[:-500], b"\0" * 100, pickle.dumps(_Harmful(trace), protocol=2)):
        checkpoint.path.write_bytes(content)
        with pytest.raises(DeltapatchError, match=r"birds\.checkpoint: this checkpoint cannot be read"):
            checkpoint.load()
    assert not trace.exists()


def test_a_file_of_something_else_is_refused(checkpoint: Checkpoint) -> None:
    torch.save([1, 2, 3], checkpoint.path)
    with pytest.raises(DeltapatchError, match="belongs to another fit"):
        checkpoint.load()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_state_and_nothing_else(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    checkpoint.save({"epoch": 1})

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(DeltapatchError, match=r"birds\.checkpoint: .* could not be saved: No space left"):
        checkpoint.save({"epoch": 2})
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["birds.checkpoint"]
    assert checkpoint.load() == {"identity": "this fit", "epoch": 1}


def test_a_checkpoint_in_a_folder_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DeltapatchError, match=r"nowhere/birds\.checkpoint"):
        Checkpoint(tmp_path / "nowhere" / "birds.checkpoint", "this fit", resume=False).save({})


def test_removing_a_checkpoint_that_is_gone_already_is_no_error(checkpoint: Checkpoint) -> None:
    checkpoint.save({})
    checkpoint.remove()
    checkpoint.remove()
    assert not checkpoint.path.exists()
