"""A comparison goes on where it ended, keeps to its budget and says what is missing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digits import write_digits

from deltapatch.base import Base
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.evaluation.comparing import comparison
from deltapatch.evaluation.comparing.budget import Budget
from deltapatch.evaluation.comparing.comparison import compare
from deltapatch.evaluation.comparing.ledger import Row
from deltapatch.evaluation.comparing.planning import ComparisonConfig
from deltapatch.evaluation.comparing.result import Comparison

from .conftest import FIT

# Dies in its second job, between the patch and the entry that says that it is done.
KILLED = """
import os, signal, sys
import torch
from deltapatch.cli import main
from deltapatch.evaluation.comparing import running

write_row, written = running.write_row, []

def write(folder, job, row):
    if written:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(row)
    write_row(folder, job, row)

torch.set_num_threads(1)
running.write_row = write
main(sys.argv[1:])
"""

Compare = Callable[..., Comparison]


@pytest.fixture
def run(base: Base, digits_file: Path, tmp_path: Path) -> Compare:
    """A comparison with one seed into the folder of the test; keyword arguments replace what is usual."""

    def call(methods: str = "head,delta:modules=1", **options: Any) -> Comparison:
        config = ComparisonConfig(**{"seeds": 1, **options.pop("config", {})})
        defaults: dict[str, Any] = {"fit": FIT, "progress": False}
        data = options.pop("data", [digits_file])
        return compare(base, data, methods, tmp_path / "out", config, **(defaults | options))

    return call


def _table(folder: Path) -> list[dict[str, Any]]:
    """The table without the times, which no two runs have in common, and which stand in the files too."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(folder / "results.parquet").to_pylist()
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "file_bytes")} for row in rows
    ]


def test_a_second_run_fits_nothing_and_writes_the_same_table(
    run: Compare, tmp_path: Path, fits: list[str]
) -> None:
    run()
    assert fits == ["head", "delta"]
    files = ("results.parquet", "results.md", "report.html", "settings.json")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files}
    run()
    assert fits == ["head", "delta"]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == before


def test_more_seeds_and_methods_fit_only_what_is_new(run: Compare, fits: list[str]) -> None:
    run("head")
    fits.clear()
    found = run("head,delta:modules=1", config={"seeds": 2})
    assert sorted(fits) == ["delta", "delta", "head"]
    assert len(found.done) == 4


def test_after_a_kill_only_the_rest_is_done_and_the_table_is_the_same(
    digits_file: Path, tmp_path: Path, fits: list[str]
) -> None:
    from deltapatch.cli import main

    options = ["--base", "demo", "--device", "cpu", "--methods", "head,delta:modules=1", "--seeds", "1"]
    options += ["--epochs", "1", "--precision", "fp32", "--cache", "off", "--no-progress"]
    arguments = ["compare", str(digits_file), *options, "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    dead = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, str(killed)], check=False, env=environment
    )
    assert dead.returncode == -signal.SIGKILL
    assert len(list((killed / "jobs").iterdir())) == 1
    assert len(list((killed / "patches").iterdir())) == 2
    assert not (killed / "results.parquet").exists()

    main([*arguments, str(killed)])
    assert fits == ["delta"]
    main([*arguments, str(whole)])
    assert _table(killed) == _table(whole)


def test_ctrl_c_keeps_what_is_done(
    run: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: list[str]
) -> None:
    run_job = comparison.run_job

    def interrupted(job: Any, *rest: Any) -> Row:
        if job.method == "delta":
            raise KeyboardInterrupt
        return run_job(job, *rest)

    monkeypatch.setattr(comparison, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / "jobs").iterdir())) == 1
    assert len(run().done) == 2


def test_a_refused_method_is_named_and_the_others_are_compared(
    run: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltapatch.methods.delta import Delta

    def refuse(self: Delta, anatomy: Any) -> Any:
        raise DeltapatchError("there is\n no place for it")

    monkeypatch.setattr(Delta, "sites", refuse)
    found = run(config={"seeds": 2})
    assert found.left_out == ("delta (modules=1) on digits: there is no place for it",)
    assert [line.contender for line in found.sections[0].lines] == ["head"]
    assert "there is no place for it" in (tmp_path / "out" / "results.md").read_text()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, make_row: Any) -> list[str]:
    """Jobs that take a minute each, by the clock of their results; holds what was done."""
    done: list[str] = []

    def run_job(job: Any, *rest: Any) -> Row:
        done.append(f"{job.method} {dict(job.options).get('modules', '')} {job.fit.seed}")
        options = dict(job.options)
        return make_row(
            digest=job.digest, method=job.method, options=options, seed=job.fit.seed, job_seconds=60.0
        )

    monkeypatch.setattr(comparison, "run_job", run_job)
    return done


def test_a_budget_drops_seeds_and_variants_from_the_end_and_names_them(
    run: Compare, timed: list[str]
) -> None:
    found = run("head,delta:modules=1|2", config={"seeds": 2}, budget=Budget(minutes=4))
    assert timed == ["head  0", "delta 1 0", "delta 2 0", "head  1"]
    assert [line.partition(":")[0] for line in found.left_out] == [
        "delta (modules=1) on digits, all training images, seed 1",
        "delta (modules=2) on digits, all training images, seed 1",
    ]
    assert all("the budget of 4 minutes is used up" in line for line in found.left_out)


def test_however_small_the_budget_every_method_gets_one_seed(run: Compare, timed: list[str]) -> None:
    run("head,delta:modules=1|2", config={"seeds": 2}, budget=Budget(minutes=0))
    assert timed == ["head  0", "delta 1 0"]


def test_what_is_done_already_is_in_the_table_whatever_the_budget(run: Compare, fits: list[str]) -> None:
    run("head", config={"seeds": 2})
    found = run("head", config={"seeds": 3}, budget=Budget(minutes=0))
    assert fits == ["head", "head"]
    assert [row.seed for _, row in found.done] == [0, 1]
    assert len(found.left_out) == 1


def test_variants_over_the_budget_are_left_out_by_their_size(run: Compare) -> None:
    found = run("head,delta:modules=1|2", budget=Budget(parameters=15_000))
    assert [line.variant for line in found.sections[0].lines if line.contender == "delta"] == [
        "delta (modules=1)"
    ]
    (line,) = found.left_out
    assert line.startswith("delta (modules=2): over the budget, ")
    with pytest.raises(DeltapatchError, match="no method keeps to the budget"):
        run("delta", budget=Budget(parameters=10))


def test_settings_say_what_was_chosen_and_by_what(run: Compare, tmp_path: Path) -> None:
    found = run("delta:modules=1|2")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    (chosen,) = settings["chosen"]
    (line,) = found.sections[0].lines
    assert chosen["options"] == line.rows[0].options
    best = max(chosen["validation_accuracy"].values())
    assert chosen["validation_accuracy"][line.variant] == best
    assert (tmp_path / "out" / "patches" / chosen["patches"]["0"][0]).is_file()
    assert settings["base"]["fingerprint"] == found.fingerprint


def test_test_selected_figures_say_so_everywhere(run: Compare, tmp_path: Path) -> None:
    found = run("head", config={"selection": "test"})
    assert "test-selected" in found.warnings[0]
    out = tmp_path / "out"
    assert all(
        "test-selected" in (out / name).read_text() for name in ("results.md", "report.html", "settings.json")
    )
    assert [row["measured_on"] for row in _table(out)] == ["test-selected"]


def test_data_without_test_images_is_measured_on_validation_images_with_a_warning(
    run: Compare, tmp_path: Path
) -> None:
    data = write_digits(tmp_path / "digits.npz", 40, 30, test_images=None, test_labels=None)
    found = run("head", data=[data])
    assert "no test images" in found.warnings[0]
    assert found.sections[0].lines[0].measured_on == "validation"
    with pytest.raises(DataError, match="has no test images, which a comparison needs"):
        run("head", data=[data], config={"selection": "test"})


def test_two_sets_of_one_name_are_refused(run: Compare, digits_file: Path) -> None:
    with pytest.raises(DataError, match="two sets of images are called 'digits'"):
        run(data=[digits_file, digits_file])


def test_without_pyarrow_it_is_told_before_any_work(
    run: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltapatch.evaluation.comparing import writing

    monkeypatch.setattr(writing, "find_spec", lambda name: None)
    with pytest.raises(DeltapatchError, match="needs pyarrow; install it with"):
        run()
    assert not (tmp_path / "out").exists()
