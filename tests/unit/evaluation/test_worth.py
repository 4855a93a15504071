"""What a fit was worth: the patch beside a head alone, and the page that says so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import NAMES, write_bad_image, write_digits, write_tree

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.evaluation.answers import evaluate
from deltapatch.evaluation.worth import Worth, measure, with_figures, write_fit_report
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.fit import FitResult, fit_task
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("demo")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    names = np.array([HOSTILE, *NAMES[1:]])
    return open_data(write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", classes=names))


def _fit(base: Base, task: TaskData) -> FitResult:
    return fit_task(base, task, Delta(modules=1), FitConfig(epochs=2), progress=False)


@pytest.fixture(scope="module")
def result(base: Base, task: TaskData) -> FitResult:
    return _fit(base, task)


def _measured(base: Base, task: TaskData, result: FitResult) -> Worth:
    worth = measure(base, task, result)
    assert worth is not None
    return worth


def _page(folder: Path, base: Base, task: TaskData, result: FitResult) -> str:
    path = folder / "digits.html"
    write_fit_report(path, base, task, result, _measured(base, task, result), file_bytes=123_456)
    assert [file.name for file in folder.iterdir() if file.is_file()] == ["digits.html"]
    return path.read_text(encoding="utf-8")


# --- measuring --------------------------------------------------------------------------------------------


def test_patch_and_head_are_measured_on_the_same_test_images(
    base: Base, task: TaskData, result: FitResult
) -> None:
    worth = _measured(base, task, result)
    assert task.test is not None
    assert (worth.split, worth.warnings) == ("test", ())
    assert worth.patch.labels.tolist() == worth.head_only.labels.tolist() == task.test.labels.tolist()
    assert worth.patch.accuracy == evaluate(base, task.test, result.patch).accuracy
    assert worth.head_only.accuracy == evaluate(base, task.test, result.head_only).accuracy
    assert worth.base_unchanged


def test_without_test_images_validation_images_are_measured_with_a_warning(
    base: Base, task: TaskData, result: FitResult
) -> None:
    worth = _measured(base, replace(task, test=None), result)
    assert worth.split == "validation"
    assert "There are no test images" in worth.warnings[0]


def test_a_test_split_without_images_is_no_test_split(base: Base, task: TaskData, result: FitResult) -> None:
    assert task.test is not None
    assert _measured(base, replace(task, test=task.test.subset([])), result).split == "validation"


def test_without_any_other_images_nothing_is_measured(base: Base, task: TaskData, result: FitResult) -> None:
    assert measure(base, replace(task, test=None, val=None), result) is None


def test_a_base_that_has_changed_is_warned_of(task: TaskData, tmp_path: Path) -> None:
    base = load_base("demo")
    result = _fit(base, task)
    with torch.no_grad():
        base.module.get_submodule("fc").bias[0] += 1e-3
    worth = _measured(base, task, result)
    assert not worth.base_unchanged
    assert "NOT what they were" in worth.warnings[0]
    assert "IS NOT bit for bit what it was before" in _page(tmp_path, base, task, result)


def test_the_figures_are_written_into_the_patch_beside_those_of_its_fit(base: Base, task: TaskData) -> None:
    result = _fit(base, task)
    before = dict(result.patch.info.figures)
    worth = _measured(base, task, result)
    with_figures(result.patch, worth)
    figures = result.patch.info.figures
    assert {name: figures[name] for name in before} == before
    assert figures["test/accuracy"] == worth.patch.accuracy.value
    assert figures["head-only/test/accuracy"] == worth.head_only.accuracy.value


# --- the page ---------------------------------------------------------------------------------------------


def test_the_page_says_what_was_fitted_on_what_and_that_the_base_is_as_it_was(
    base: Base, task: TaskData, result: FitResult, tmp_path: Path
) -> None:
    page = _page(tmp_path, base, task, result)
    for fact in (
        "After the fit the base is bit for bit what it was before",
        base.fingerprint,
        "delta patch on demo (printed characters)",
        "digits.npz",
        "123.5",
        "layer4",
        f"{result.patch.num_parameters():,}",
    ):
        assert fact in page
    assert "There are no test images" not in page


def test_the_page_warns_where_the_figures_are_of_validation_images(
    base: Base, task: TaskData, result: FitResult, tmp_path: Path
) -> None:
    assert "There are no test images" in _page(tmp_path, base, replace(task, test=None), result)


def test_a_hostile_class_name_stands_in_the_page_as_text(
    base: Base, task: TaskData, result: FitResult, tmp_path: Path
) -> None:
    page = _page(tmp_path, base, task, result)
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_unreadable_images_of_fit_and_measurement_are_counted_in_the_page(base: Base, tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        write_tree(tmp_path / "tree" / split, (0, 1), count, split)
    for name in ("train/one/bad.png", "test/zero/bad.png"):
        write_bad_image(tmp_path / "tree" / name)
    task = open_data(tmp_path / "tree")
    page = " ".join(_page(tmp_path, base, task, _fit(base, task)).split())
    start = page.index("unreadable images left out")
    assert ">2<" in page[start : start + 80].replace(" ", "")
