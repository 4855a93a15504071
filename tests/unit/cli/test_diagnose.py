"""``deltapatch diagnose``: the tables, the picture, and what is refused before anything is computed."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from toys import disturb

from deltapatch.loading import load_base
from deltapatch.method import make_method


@pytest.fixture(scope="session")
def full_patch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's base whose last stage was moved."""
    patch = make_method("full", {"modules": 1}).build(load_base("demo", device="cpu"), ("a", "b"), seed=0)
    return disturb(patch).save(tmp_path_factory.mktemp("diagnose") / "moved.safetensors")


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of the table rows that begin so."""
    lines = (line for line in text.splitlines() if line.startswith(f"│ {start}"))
    return [re.findall(r"[^│\s]+(?: [^│\s]+)*", line) for line in lines]


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 10
        return image.size


def test_a_fine_tuned_copy_is_shown_layer_by_layer_without_images(
    run: Any, full_patch: Path, tmp_path: Path
) -> None:
    ran = run("diagnose", full_patch, "--device", "cpu", "--out", tmp_path / "full.png")
    assert ran.code == 0, ran.err
    found = rows(ran.out, "layer4")
    assert [row[0] for row in found][:2] == ["layer4.0.conv1", "layer4.0.bn1"]
    values = [float(row[4]) for row in found if row[1] == "convolution"]
    stated = re.search(r"T = ([\d.]+), the mean", ran.out)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(sum(values) / len(values), abs=0.02)
    assert "other layers are as in the base" in ran.out
    assert "note: the random start is estimated" in ran.out
    assert "for the drift of features, give images with --data" in ran.out
    assert ran.out.endswith(f"picture: {tmp_path / 'full.png'}\n")
    size_of(tmp_path / "full.png")


def test_a_delta_patch_is_shown_by_the_drift_of_features(
    run: Any, patch_file: Path, tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "delta.png"
    ran = run("diagnose", patch_file, "--device", "cpu", "--data", tree, "--out", out)
    assert ran.code == 0, ran.err
    assert "a delta patch changes no weights of its base" in ran.out
    assert "features of 72 images" in ran.out
    found = {row[0]: float(row[1]) for row in rows(ran.out, "")}
    # Fitted with one Δ-module, on the last stage.
    assert [found[f"layer{stage}"] for stage in (1, 2, 3)] == [0, 0, 0]
    assert found["layer4"] > 0
    assert found["input of the head"] > 0
    size_of(out)


def test_a_copy_with_images_gets_both_in_a_taller_picture(
    run: Any, full_patch: Path, tree: Path, tmp_path: Path
) -> None:
    for name, more in (("alone", ()), ("both", ("--data", tree))):
        ran = run("diagnose", full_patch, "--device", "cpu", "--out", tmp_path / f"{name}.png", *more)
        assert ran.code == 0, ran.err
    assert size_of(tmp_path / "both.png")[1] > size_of(tmp_path / "alone.png")[1]


def test_pictures_can_be_drawings(run: Any, patch_file: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "delta.svg"
    assert run("diagnose", patch_file, "--device", "cpu", "--data", tree, "--out", out).code == 0
    assert "<svg" in out.read_text()


def test_a_patch_that_changes_no_weight_needs_images(run: Any, patch_file: Path, tmp_path: Path) -> None:
    error = run("diagnose", patch_file, "--device", "cpu", "--out", tmp_path / "x.png").error
    assert error == (
        "a delta patch changes no weights of its base, so only its features can be looked at; give images"
        " with --data, labels are not needed"
    )
    assert not (tmp_path / "x.png").exists()


def test_pictures_of_other_kinds_and_places_are_refused(run: Any, patch_file: Path, tmp_path: Path) -> None:
    assert "pictures are written as .png" in run("diagnose", patch_file, "--out", tmp_path / "x.gif").error
    assert "in a folder that exists" in run("diagnose", patch_file, "--out", tmp_path / "no" / "x.png").error


def test_another_base_and_another_start_are_refused(
    run: Any, full_patch: Path, base_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.png"
    error = run("diagnose", full_patch, "--base", f"{base_file}:other", "--device", "cpu", "--out", out).error
    assert "this patch belongs to base demo" in error
    error = run("diagnose", full_patch, "--random", base_file, "--device", "cpu", "--out", out).error
    assert "not a safetensors file or plain torch checkpoint" in error
