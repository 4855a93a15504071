"""``deltapatch predict``: a row for every image, also for those that cannot be read."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from digits import write_bad_image, write_tree

from deltapatch.data import open_data
from deltapatch.evaluation.answers import answer
from deltapatch.loading import load_base
from deltapatch.patch import Patch


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two zeros, a broken image between them by name, and a file that is no image."""
    folder = write_tree(tmp_path / "images", (0,), 2, "test")
    write_bad_image(folder / "zero" / "000b.png")
    (folder / "readme.txt").write_text("not an image")
    return folder


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text)))


def test_csv_has_a_row_for_each_image_in_the_order_of_names(run: Any, images: Path, patch_file: Path) -> None:
    ran = run("predict", images, "--patch", patch_file, "--device", "cpu")
    assert ran.code == 0
    rows = _rows(ran.out)
    assert [Path(row["image"]).name for row in rows] == ["000.png", "000b.png", "001.png"]
    assert [row["class"] for row in rows] == ["zero", "", "zero"]
    assert [row["error"] for row in rows if not row["error"]] == ["", ""]
    assert rows[1]["probability"] == ""
    assert "cannot be decoded" in rows[1]["error"]


def test_json_lines_give_the_best_classes_from_the_most_probable_down(
    run: Any, images: Path, patch_file: Path
) -> None:
    ran = run("predict", images, "--patch", patch_file, "--device", "cpu", "--format", "jsonl", "--top-k", 3)
    good, bad, _ = (json.loads(line) for line in ran.out.splitlines())
    probabilities = [entry["probability"] for entry in good["answers"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert {entry["class"] for entry in good["answers"]} == {"zero", "one", "two"}
    assert good["error"] is None
    assert bad["answers"] == []
    assert "cannot be decoded" in bad["error"]


def test_the_probabilities_are_those_of_the_patch(run: Any, tree: Path, patch_file: Path) -> None:
    ran = run("predict", tree / "test", "--patch", patch_file, "--device", "cpu", "--batch-size", 64)
    images = open_data(tree).test
    assert images is not None
    expected = answer(load_base("demo"), images, Patch.load(patch_file)).probabilities.max(1)
    assert [float(row["probability"]) for row in _rows(ran.out)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_more_classes_than_there_are_is_all_of_them(run: Any, images: Path, patch_file: Path) -> None:
    ran = run("predict", images, "--patch", patch_file, "--device", "cpu", "--top-k", 99)
    header = ["image", "class", "probability", "class2", "probability2", "class3", "probability3", "error"]
    assert ran.out.splitlines()[0].split(",") == header


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_out_takes_the_same_rows_into_a_file(
    run: Any, images: Path, patch_file: Path, tmp_path: Path, format: str
) -> None:
    arguments = ("predict", images, "--patch", patch_file, "--device", "cpu", "--format", format)
    out = tmp_path / "answers"
    ran = run(*arguments, "--out", out)
    assert (ran.code, ran.out) == (0, "")
    assert out.read_text().splitlines() == run(*arguments).out.splitlines()


def test_single_files_are_answered_too(run: Any, images: Path, patch_file: Path) -> None:
    file = images / "zero" / "000.png"
    assert len(_rows(run("predict", file, "--patch", patch_file, "--device", "cpu").out)) == 1


def test_images_patch_format_or_output_that_cannot_be_are_one_line(
    run: Any, images: Path, patch_file: Path, tmp_path: Path
) -> None:
    def error(*arguments: object) -> str:
        return run("predict", *arguments).error

    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    assert f"{nowhere}: no such file or folder" in error(nowhere, "--patch", patch_file)
    assert f"{empty}: no image was found" in error(empty, "--patch", patch_file)
    assert "nowhere.safetensors" in error(images, "--patch", tmp_path / "nowhere.safetensors")
    assert "readme.txt" in error(images, "--patch", images / "readme.txt")
    assert "--format is csv or jsonl, not 'xml'" in error(images, "--patch", patch_file, "--format", "xml")
    for out in (tmp_path, nowhere / "answers.csv"):
        assert f"{out}: the answers cannot be written there" in error(
            images, "--patch", patch_file, "--out", out
        )


def test_a_base_is_only_loaded_by_name_and_never_because_a_patch_names_a_python_file(
    run: Any, images: Path, patch_file: Path, tmp_path: Path, base_file: Path
) -> None:
    patch = Patch.load(patch_file)
    reference = patch.info.base.model_copy(update={"source": f"{base_file}:same"})
    patch.info = patch.info.model_copy(update={"base": reference})
    renamed = patch.save(tmp_path / "renamed.safetensors")
    trace = tmp_path / "executed"
    base_file.write_text(f"open({str(trace)!r}, 'w')\n" + base_file.read_text())
    error = run("predict", images, "--patch", renamed).error
    assert "is not loaded on a file's word; give --base" in error
    assert not trace.exists()

    ran = run("predict", images, "--patch", renamed, "--device", "cpu", "--base", f"{base_file}:same")
    assert ran.code == 0
    assert ran.out == run("predict", images, "--patch", patch_file, "--device", "cpu").out
    assert trace.exists()


def test_a_base_that_is_made_from_class_names_has_to_be_named_with_them(
    run: Any, images: Path, patch_file: Path, tmp_path: Path
) -> None:
    patch = Patch.load(patch_file)
    reference = patch.info.base.model_copy(update={"source": "open_clip/ViT-B-32/openai"})
    patch.info = patch.info.model_copy(update={"base": reference})
    error = run("predict", images, "--patch", patch.save(tmp_path / "clip.safetensors")).error
    assert "(open_clip/ViT-B-32/openai), which is made from the names of its classes" in error
    assert error.endswith("give --base and --classes as for the fit")


def test_another_base_is_refused_with_both_names(
    run: Any, images: Path, patch_file: Path, base_file: Path
) -> None:
    error = run("predict", images, "--patch", patch_file, "--base", f"{base_file}:other").error
    assert "this patch belongs to base demo" in error
    assert "given base other" in error
