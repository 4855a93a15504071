"""One small patch for all commands, and the command line called in this process."""

from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
from digits import write_tree

from deltapatch.cli import main

Run = Callable[..., "Ran"]

# Bases in a Python file: `same` is the demo's, `other` differs from it in one number, `flat` has no stage.
BASE_FILE = """
import torch
from deltapatch.demo.base import build_demo_model

def same():
    return build_demo_model()

def other():
    model = build_demo_model()
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    return model

def flat():
    nn = torch.nn
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()

def module():
    return "not a module"
"""


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error is; anything else on standard error fails the test."""
        assert self.code == 2
        assert self.err.startswith("error: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.err
        return self.err.removeprefix("error: ").rstrip("\n")

    def words(self) -> str:
        """Standard output without line breaks and boxes."""
        return " ".join(self.out.split())


def run_command(*arguments: object) -> Ran:
    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture
def run() -> Run:
    """Runs a command as ``deltapatch`` would; returns its exit code and output."""
    return run_command


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits in class folders, with training, validation and test images."""
    folder = tmp_path_factory.mktemp("tree") / "digits"
    for split, count in (("train", 8), ("val", 6), ("test", 10)):
        write_tree(folder / split, (0, 1, 2), count, split)
    return folder


@pytest.fixture(scope="session")
def patch_file(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patch that the command line fitted, shared by all tests, since none may change it."""
    out = tmp_path_factory.mktemp("patch") / "digits.safetensors"
    ran = run_command(
        *("fit", tree, "--base", "demo", "--device", "cpu", "--out", out, "--epochs", 2, "--modules", 1),
        *("--no-progress", "--licence", "CC0-1.0", "--author", "A. Person", "--note", "a first try"),
    )
    assert ran.code == 0, ran.err
    return out


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    path = tmp_path / "own_base.py"
    path.write_text(BASE_FILE)
    return path
