"""Every command explains itself, and every error is one line."""

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest

from deltapatch import cli
from deltapatch.cli import inspect as inspect_command
from deltapatch.errors import DeltapatchError

COMMANDS = ("anatomy", "cache", "demo", "evaluate", "fit", "inspect", "predict", "verify")


def test_the_help_names_every_command(run: Any) -> None:
    ran = run("-h")
    assert ran.code == 0
    assert all(f"│ {name} " in ran.out for name in COMMANDS)


def test_without_arguments_the_help_is_shown(run: Any) -> None:
    assert run().out == run("--help").out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_its_example_and_says_what_it_does(run: Any, name: str) -> None:
    module = import_module(f"deltapatch.cli.{name}")
    ran = run(name, "-h")
    assert ran.code == 0
    assert f"Example: {module.EXAMPLE}" in ran.words()
    assert " ".join(module.command.__doc__.split()).partition(".")[0] in ran.words()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_a_call_of_its_own_command(name: str) -> None:
    assert import_module(f"deltapatch.cli.{name}").EXAMPLE.startswith(f"deltapatch {name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "No such command 'fitt'. Did you mean 'fit'? (see deltapatch -h)"),
        (
            ["inspect", "a.safetensors", "--zzz"],
            "No such option: --zzz (see deltapatch inspect -h)",
        ),
        (["inspect"], "Missing argument 'patch' (see deltapatch inspect -h)"),
        (
            ["fit", "photos", "--base", "demo", "--out", "a.safetensors", "--epochs", "many"],
            "Invalid value for '--epochs'",
        ),
        (["predict", "photos", "--patch", "a.safetensors", "--top-k", "0"], "Invalid value for '--top-k'"),
    ],
)
def test_a_mistyped_command_line_is_one_line_that_says_where_to_look(
    run: Any, arguments: list[str], message: str
) -> None:
    assert message in run(*arguments).error


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def command(patch: str) -> None:
        raise error

    monkeypatch.setattr(inspect_command, "command", command)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DeltapatchError("my  photos:\n\n  nothing here\n"), "my  photos: nothing here"),
        (KeyError("fc"), "KeyError: 'fc' (run again with --debug to see where)"),
        (RuntimeError("first\nsecond"), "RuntimeError: first second (run again with --debug to see where)"),
        (AssertionError(), "AssertionError: no message (run again with --debug to see where)"),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    _raising(monkeypatch, error)
    assert run("inspect", "a.safetensors").error == message


@pytest.mark.parametrize("position", [0, 2])
def test_with_debug_there_is_a_traceback_and_the_same_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    _raising(monkeypatch, DeltapatchError("no"))
    arguments = ["inspect", "a.safetensors"]
    arguments.insert(position, "--debug")
    ran = run(*arguments)
    assert ran.code == 2
    assert "Traceback (most recent call last)" in ran.err
    assert ran.err.endswith("\nerror: no\n")


def test_ctrl_c_ends_with_the_code_of_an_interruption_and_no_message(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _raising(monkeypatch, KeyboardInterrupt())
    ran = run("inspect", "a.safetensors")
    assert (ran.code, ran.err) == (cli.EXIT_INTERRUPTED, "")


def test_python_m_deltapatch_is_the_same_command_line() -> None:
    arguments = [sys.executable, "-m", "deltapatch", "inspect", "/nowhere/birds.safetensors"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: /nowhere/birds.safetensors cannot be read")
    assert done.stderr.count("\n") == 1
