"""``deltapatch inspect``: all that a patch file says, as text or as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltapatch.file import file_digest
from deltapatch.patch import Patch


def test_everything_that_the_file_says_is_printed(run: Any, patch_file: Path) -> None:
    ran = run("inspect", patch_file)
    assert ran.code == 0
    info = Patch.load(patch_file).info
    assert info.fitted_on is not None
    facts = [
        file_digest(patch_file),
        info.task,
        "delta (module=light, modules=1, norm=both, start=zero-gain)",
        "layer4",
        "demo (printed characters) (from demo)",
        info.base.fingerprint,
        "3: one, two, zero",
        str(info.preprocessing),
        info.created,
        "CC0-1.0",
        "A. Person",
        "a first try",
        "24 training, 18 validation, 30 test images, 0 unreadable; seed 0, 2 epochs",
        *info.versions.values(),
    ]
    facts += [f"{name:<40} {figure:.4f}" for name, figure in info.figures.items()]
    assert [fact for fact in facts if fact not in ran.out] == []


def test_tensors_are_listed_on_demand(run: Any, patch_file: Path) -> None:
    name = "parts.0.delta.fc.weight"
    assert name not in run("inspect", patch_file).out
    listed = run("inspect", patch_file, "--tensors").out
    assert all(tensor in listed for tensor in Patch.load(patch_file).state_dict())
    line = next(line for line in listed.splitlines() if name in line)
    assert line.split() == [name, "float32", "(3,", "16)"]


def test_json_parses_and_is_the_description_of_the_file(run: Any, patch_file: Path) -> None:
    document = json.loads(run("inspect", patch_file, "--json").out)
    patch = Patch.load(patch_file)
    tensors = document.pop("tensors")
    assert document.pop("digest") == file_digest(patch_file)
    assert document.pop("bytes") == patch_file.stat().st_size
    assert document == patch.info.model_dump(mode="json")
    assert {name: tuple(entry["shape"]) for name, entry in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in patch.state_dict().items()
    }


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_file_that_is_no_patch_is_one_line_with_its_name(
    run: Any, patch_file: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "birds.safetensors"
    content = patch_file.read_bytes()
    changed = {"empty": b"", "cut": content[: len(content) // 2], "text": b"birds\n" * 100}
    if damage != "missing":
        path.write_bytes(changed[damage])
    assert "birds.safetensors" in run("inspect", path).error


def test_a_patch_is_inspected_whose_base_is_not_here(run: Any, patch_file: Path, tmp_path: Path) -> None:
    patch = Patch.load(patch_file)
    reference = patch.info.base.model_copy(update={"source": "nowhere.py:make", "name": "secret"})
    patch.info = patch.info.model_copy(update={"base": reference})
    ran = run("inspect", patch.save(tmp_path / "patch.safetensors"))
    assert ran.code == 0
    assert "secret (from nowhere.py:make)" in ran.out
