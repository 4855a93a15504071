"""``deltapatch compare``: one table for many methods, or one line that says why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from digits import write_digits

from deltapatch.evaluation.comparing import comparison
from deltapatch.selection.history.prior import History

SHORT = ("--base", "demo", "--device", "cpu", "--epochs", 1, "--seeds", 1, "--no-progress")


def test_the_table_is_printed_and_every_file_is_written(run: Any, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    ran = run("compare", tree, *SHORT, "--methods", "head,delta:modules=1|2", "--out", out)
    assert (ran.code, ran.err) == (0, "")
    assert "| digits | delta | delta (modules=" in ran.out
    assert ran.out.count("| best |") == 1
    names = ["jobs", "patches", "report.html", "results.md", "results.parquet", "settings.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert len(list((out / "jobs").iterdir())) == len(list((out / "patches").iterdir())) == 3


def test_the_help_shows_the_example(run: Any) -> None:
    from deltapatch.cli.compare import EXAMPLE

    assert f"Example: {EXAMPLE}" in run("compare", "-h").words()


def test_the_options_reach_the_comparison(run: Any, tree: Path, tmp_path: Path) -> None:
    options = (
        "--select",
        "test",
        "--few-shot",
        2,
        "--shares",
        "50",
        "--methods",
        "head",
        "--supporting",
        tree,
    )
    ran = run("compare", tree, *SHORT, *options, "--out", tmp_path / "out")
    assert "has the class 'one', which is not one of the" in ran.error
    ran = run("compare", tree, *SHORT, *options[:-2], "--out", tmp_path / "out")
    assert ran.err.startswith("warning: test-selected")
    assert "## Single, 50 % of the training images" in ran.out
    assert "## Single, 2 images a class" in ran.out


def test_interpolation_and_a_composition_are_compared_beside_the_base_s_own_task(
    run: Any, tree: Path, tmp_path: Path
) -> None:
    own = write_digits(tmp_path / "own.npz", train=10, val=10, test=15, classes=np.array(list("0123456789")))
    methods = 'interpolate:steps=2,compose:methods=["delta:modules=1","norm"]'
    options = ("--methods", methods, "--supporting", own)
    ran = run("compare", tree, *SHORT, *options, "--out", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    assert "Left out" not in ran.out
    tables = pyarrow.parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert {row["method"] for row in tables} == {"interpolate", "compose"}
    assert len({row["base_accuracy"] for row in tables}) == 1
    (kept,) = (row for row in tables if row["method"] == "compose")
    assert kept["supporting_accuracy"] == kept["base_accuracy"]
    assert all(row["harmonic_mean"] is not None for row in tables)


def test_with_progress_the_table_is_drawn_on_standard_error(run: Any, tree: Path, tmp_path: Path) -> None:
    options = [option for option in SHORT if option != "--no-progress"]
    ran = run("compare", tree, *options, "--methods", "head", "--out", tmp_path / "out")
    assert ran.code == 0
    assert "1/1" in ran.err
    assert "1/1" not in ran.out


def test_ctrl_c_says_that_the_same_command_goes_on(
    run: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_job", interrupted)
    ran = run("compare", tree, *SHORT, "--methods", "head", "--out", tmp_path / "out")
    assert ran.code == 130
    assert "the same command goes on" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora9"], "there is no method 'lora9'"),
        (["--methods", "delta:modules"], "is not of the form KEY=VALUE"),
        (["--protocols", "single,circular"], "--protocols: "),
        (["--protocols", "joint"], "the protocol 'joint' needs two or more sets of images"),
        (["--select", "train"], "--select: "),
        (["--shares", "15,many"], "--shares takes whole numbers with commas between them, not '15,many'"),
        (["--shares", "0"], "a share of 0 % of the training images cannot be"),
        (["--few-shot", "0"], "0 training images a class cannot be"),
        (["--seeds", "0"], "0 seeds cannot be"),
        (["--budget-minutes", "-1"], "a budget of -1.0 minutes cannot be"),
        (["--epochs", "0"], "epochs cannot be 0"),
        (["--supporting", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    run: Any, tree: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    error = run("compare", tree, *SHORT, "--methods", "head", "--out", tmp_path / "out", *arguments).error
    assert message in error


def test_a_folder_that_cannot_be_written_is_one_line(run: Any, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    error = run("compare", tree, *SHORT, "--methods", "head", "--out", file).error
    assert error.startswith(f"{file}: nothing can be written there")


def test_what_the_base_reached_is_noted_once_and_only_if_wanted(
    run: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own" / "history.csv"
    monkeypatch.setenv("DELTAPATCH_HISTORY", str(own))
    command = ("compare", tree, *SHORT, "--methods", "head", "--out", tmp_path / "out")
    assert "history" not in run(*command, "--no-history").out
    assert not own.parent.exists()
    assert f"history: 1 of 1 results are new in {own}\n" in run(*command).out
    assert f"history: 0 of 1 results are new in {own}\n" in run(*command).out
    (record,) = History.read().records
    (line,) = pyarrow.parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert (record.accuracy, record.target, record.method) == (line["accuracy"], "digits", line["variant"])
    assert record.fingerprint.startswith("sha256:")
    own.write_text("another;table\n")
    ran = run(*command)
    assert ran.code == 0
    assert ran.err.startswith(f"warning: the history was not added to: {own} ")
    odd = run(*command[:-1], tmp_path / "few", "--few-shot", 2)
    assert "history: nothing to note, since no patch was fitted on all images" in odd.out
