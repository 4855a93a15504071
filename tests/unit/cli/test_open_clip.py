"""Every command on a base whose classes are texts."""

from pathlib import Path
from typing import Any

import pytest
from tiny_clip import NAMES, TinyClip, new_tiny_clip

from deltapatch.patch import Patch

SHORT = ("--device", "cpu", "--epochs", 1, "--no-progress")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyClip:
    return new_tiny_clip(pytest.importorskip("open_clip"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def base(tiny: TinyClip, tmp_path: Path) -> list[object]:
    """The options that name the base."""
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(NAMES))
    return ["--base", f"open_clip/{tiny.config}", "--weights", tiny.weights, "--classes", classes]


def test_a_patch_is_fitted_evaluated_and_verified(
    run: Any, tree: Path, tmp_path: Path, base: list[object]
) -> None:
    out = tmp_path / "digits.safetensors"
    assert run("fit", tree, *base, "--method", "head", "--out", out, *SHORT).code == 0
    assert Patch.load(out).classes == ("one", "two", "zero")
    assert run("evaluate", tree, "--patch", out, "--device", "cpu", *base).code == 0
    assert run("verify", out, "--device", "cpu", *base).code == 0


def test_without_its_classes_the_base_cannot_be_made(
    run: Any, tree: Path, tmp_path: Path, base: list[object]
) -> None:
    out = tmp_path / "digits.safetensors"
    error = run("fit", tree, *base[:-2], "--method", "head", "--out", out, *SHORT).error
    assert error == "an open-vocabulary base needs the names of its classes; give classes= (--classes)"


def test_methods_are_compared_on_it(run: Any, tree: Path, tmp_path: Path, base: list[object]) -> None:
    ran = run("compare", tree, *base, "--methods", "head", "--seeds", 1, "--out", tmp_path / "out", *SHORT)
    assert ran.code == 0
    assert "| digits | head |" in ran.out
