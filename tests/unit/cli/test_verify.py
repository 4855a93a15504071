"""``deltapatch verify``: passes where the invariants hold, and fails where they do not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deltapatch.cli import verify as verify_command
from deltapatch.patch import Patch


def test_a_patch_on_its_base_is_verified_here_and_in_a_new_process(run: Any, patch_file: Path) -> None:
    ran = run("verify", patch_file, "--device", "cpu")
    assert ran.code == 0
    assert [line[:4] for line in ran.out.splitlines()] == ["ok  "] * 3
    assert "bit-identical before, with and after the patch" in ran.out
    assert "in a new process" in ran.out


def test_another_base_fails(run: Any, patch_file: Path, base_file: Path) -> None:
    error = run("verify", patch_file, "--base", f"{base_file}:other").error
    assert "this patch belongs to base demo" in error


def test_a_damaged_file_fails(run: Any, patch_file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(patch_file.read_bytes()[:-1])
    assert "damaged.safetensors" in run("verify", damaged).error


def test_other_answers_in_the_new_process_fail(
    run: Any, patch_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_command, "_digest_in_new_process", lambda *arguments: "0" * 64)
    error = run("verify", patch_file, "--device", "cpu").error
    assert "saved and loaded in a new process gives other answers than here" in error


def test_a_base_that_changes_under_its_patch_fails(
    run: Any, patch_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Patch.check_base

    def meddle(self: Patch, base: Any) -> None:
        check(self, base)
        if len(calls) == 1:
            with torch.no_grad():
                base.module.fc.bias += 1
        calls.append(base)

    calls: list[Any] = []
    monkeypatch.setattr(Patch, "check_base", meddle)
    error = run("verify", patch_file, "--device", "cpu").error
    assert "changed its weights, buffers or answers while" in error
