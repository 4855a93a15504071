"""``deltapatch fit --method auto``: the method is chosen on the validation images."""

from pathlib import Path
from typing import Any

import pytest

from deltapatch.evaluation.comparing import halving
from deltapatch.methods.delta import Delta
from deltapatch.patch import Patch

SHORT = ("--device", "cpu", "--epochs", 1, "--no-progress", "--method", "auto")


@pytest.fixture
def one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is between one method and the head."""
    monkeypatch.setattr(halving, "default_candidates", lambda: (Delta(modules=1),))


def test_ranking_and_margin_are_printed_and_the_patch_is_written_as_always(
    run: Any, tree: Path, tmp_path: Path, one_candidate: None
) -> None:
    out = tmp_path / "digits.safetensors"
    ran = run("fit", tree, "--base", "demo", "--out", out, *SHORT)
    assert (ran.code, ran.err) == (0, "")
    assert "delta (modules=1)" in ran.out
    assert "of 18 validation images right; against the runner-up" in ran.words()
    assert "The validation figure of the best of several is optimistic." in ran.out
    assert "On 30 test images the patch answers" in ran.out
    patch = Patch.load(out)
    assert patch.info.method.name in ("delta", "head")
    assert "test/accuracy" in patch.info.figures
    assert out.with_suffix(".html").is_file()


def test_a_method_over_the_budget_is_named(run: Any, tree: Path, tmp_path: Path, one_candidate: None) -> None:
    out = tmp_path / "digits.safetensors"
    ran = run("fit", tree, "--base", "demo", "--out", out, *SHORT, "--budget-parameters", 10)
    assert ran.err.startswith("left out: delta (modules=1): ")
    assert Patch.load(out).info.method.name == "head"


@pytest.mark.parametrize(
    "option", [("--modules", 1), ("-o", "norm=sum"), ("--resume",), ("--supporting", "own")]
)
def test_options_of_one_method_are_refused(run: Any, tree: Path, tmp_path: Path, option: Any) -> None:
    out = tmp_path / "digits.safetensors"
    error = run("fit", tree, "--base", "demo", "--out", out, *SHORT, *option).error
    assert error.startswith("--method auto chooses the method and its options")


def test_a_budget_without_a_search_is_refused(run: Any, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    error = run("fit", tree, "--base", "demo", "--out", out, "--budget-minutes", 3).error
    assert error == "the budgets are for --method auto; give that, or leave them out"
