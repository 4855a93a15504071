"""``deltapatch evaluate``: figures on labelled images, whose classes are matched by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digits import NAMES, digits, write_bad_image, write_digits, write_tree

from deltapatch.patch import Patch


@pytest.fixture
def evaluate(run: Any, patch_file: Path) -> Any:
    """The figures as JSON."""

    def call(data: Path, *options: object) -> Any:
        ran = run("evaluate", data, "--patch", patch_file, "--device", "cpu", "--json", *options)
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    return call


def test_the_test_images_are_evaluated_with_the_figures_that_the_fit_wrote(
    evaluate: Any, tree: Path, patch_file: Path
) -> None:
    figures = evaluate(tree)
    assert (figures["split"], figures["images"]) == ("test", 30)
    written = Patch.load(patch_file).info.figures
    assert figures["test/accuracy"] == pytest.approx(written["test/accuracy"])


def test_the_text_says_split_images_and_accuracy_with_its_interval(
    run: Any, tree: Path, patch_file: Path
) -> None:
    ran = run("evaluate", tree, "--patch", patch_file, "--device", "cpu", "--split", "val")
    assert ran.code == 0
    assert ran.out.startswith("val: 18 images, 0 could not be read\n")
    assert "accuracy" in ran.out
    assert "macro F1" in ran.out


@pytest.mark.parametrize(("split", "images"), [("train", 24), ("val", 18), ("test", 30)])
def test_a_split_can_be_chosen(evaluate: Any, tree: Path, split: str, images: int) -> None:
    figures = evaluate(tree, "--split", split)
    assert (figures["split"], figures["images"]) == (split, images)


def test_of_a_folder_without_splits_every_image_counts(evaluate: Any, tree: Path) -> None:
    assert evaluate(tree / "test")["images"] == 30


def test_classes_in_another_order_are_matched_by_name(evaluate: Any, tree: Path, tmp_path: Path) -> None:
    # The tree has the classes one, two, zero, and so has the patch.
    rows = np.concatenate([np.flatnonzero(digits()["test_labels"] == digit)[:10] for digit in (0, 1, 2)])
    data = write_digits(
        tmp_path / "reordered.npz",
        classes=np.array(NAMES[:3]),
        test_images=digits()["test_images"][rows],
        test_labels=digits()["test_labels"][rows],
        **dict.fromkeys(("train_images", "train_labels", "val_images", "val_labels")),
    )
    here, there = evaluate(tree), evaluate(data)
    assert here.pop("test/accuracy") == there.pop("test/accuracy") > 0.5
    assert here.pop("split") == there.pop("split")
    # Images come in another order, so that sums are rounded otherwise.
    assert here == pytest.approx(there, rel=1e-4)


def test_some_of_the_patchs_classes_are_enough(evaluate: Any, tmp_path: Path) -> None:
    data = write_tree(tmp_path / "some", (0, 2), 4, "test")
    assert evaluate(data)["images"] == 8


def test_a_class_that_the_patch_does_not_know_is_refused_by_name(
    run: Any, tmp_path: Path, patch_file: Path
) -> None:
    data = write_tree(tmp_path / "more", (0, 1, 7), 3, "test")
    error = run("evaluate", data, "--patch", patch_file, "--device", "cpu").error
    assert "the class 'seven', which this patch does not know; its classes are one, two, zero" in error


def test_unreadable_images_are_counted_and_count_in_no_figure(
    run: Any, tree: Path, patch_file: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tree, tmp_path / "digits")
    write_bad_image(data / "test" / "two" / "bad.png")
    ran = run("evaluate", data, "--patch", patch_file, "--device", "cpu")
    assert ran.out.startswith("test: 30 images, 1 could not be read\n")


def test_a_split_that_is_not_there_or_has_no_such_name_is_one_line(
    run: Any, tree: Path, patch_file: Path
) -> None:
    def error(data: Path, split: str) -> str:
        return run("evaluate", data, "--patch", patch_file, "--device", "cpu", "--split", split).error

    assert error(tree, "holdout") == "--split is test, val or train, not 'holdout'"
    assert error(tree / "test", "val").endswith("has no val images")


def test_another_base_is_refused(run: Any, tree: Path, patch_file: Path, base_file: Path) -> None:
    error = run("evaluate", tree, "--patch", patch_file, "--base", f"{base_file}:other").error
    assert "this patch belongs to base demo" in error
