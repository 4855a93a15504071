"""``deltapatch fit``: from a folder of images to a patch and a report, or to one line that says why not."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import write_bad_image, write_digits, write_tree
from safetensors.torch import save_file

from deltapatch.base import fingerprint
from deltapatch.data import open_data
from deltapatch.demo.base import build_demo_model
from deltapatch.evaluation.answers import evaluate
from deltapatch.fitting.watching import FitWatch
from deltapatch.loading import load_base
from deltapatch.patch import Patch

SHORT = ("--device", "cpu", "--epochs", 1, "--modules", 1, "--no-progress")


# --- what it writes ---------------------------------------------------------------------------------------


def test_a_tree_of_images_becomes_a_patch_and_a_report_and_nothing_else(patch_file: Path) -> None:
    patch = Patch.load(patch_file)
    assert patch.classes == ("one", "two", "zero")
    assert patch.info.base.fingerprint == fingerprint(build_demo_model())
    assert sorted(path.name for path in patch_file.parent.iterdir()) == ["digits.html", "digits.safetensors"]


def test_the_file_says_what_the_command_line_said(patch_file: Path) -> None:
    info = Patch.load(patch_file).info
    assert (info.licence, info.author, info.note) == ("CC0-1.0", "A. Person", "a first try")
    assert (info.method.name, info.method.config["modules"]) == ("delta", 1)
    assert info.fitted_on is not None
    assert (info.fitted_on.train, info.fitted_on.val, info.fitted_on.test) == (24, 18, 30)
    assert {"test/accuracy", "head-only/test/accuracy", "validation/accuracy"} <= set(info.figures)


def test_the_answer_is_how_well_the_patch_does_beside_a_head_alone(
    run: Any, tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "digits.safetensors"
    ran = run("fit", tree, "--base", "demo", "--out", out, *SHORT)
    assert ran.code == 0
    assert ran.err == ""
    assert "On 30 test images the patch answers" in ran.out
    assert "A head alone answers" in ran.out
    assert f"wrote {out} (" in ran.out


def test_method_options_reach_the_method(run: Any, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    ran = run("fit", tree, "--base", "demo", "--out", out, *SHORT, "-o", "start=identity", "-o", "norm=sum")
    assert ran.code == 0
    expected = {"modules": 1, "start": "identity", "norm": "sum"}
    assert {key: Patch.load(out).info.method.config[key] for key in expected} == expected


def test_data_without_test_images_is_measured_on_validation_images_with_a_warning(
    run: Any, tmp_path: Path
) -> None:
    data = write_tree(tmp_path / "digits", (0, 1, 2), 10)
    out = tmp_path / "digits.safetensors"
    ran = run("fit", data, "--base", "demo", "--out", out, *SHORT)
    assert ran.code == 0
    assert ran.err.startswith("warning: There are no test images")
    assert "On 6 validation images" in ran.out
    assert "There are no test images" in out.with_suffix(".html").read_text()


def test_unreadable_images_are_named_and_left_out(run: Any, tree: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tree, tmp_path / "digits")
    write_bad_image(data / "train" / "one" / "bad.png")
    out = tmp_path / "digits.safetensors"
    ran = run("fit", data, "--base", "demo", "--out", out, *SHORT)
    assert ran.code == 0
    assert "train/one/bad.png: cannot be decoded" in ran.err
    info = Patch.load(out).info
    assert info.fitted_on is not None
    assert info.fitted_on.bad_images == 1

    out.unlink()
    error = run("fit", data, "--base", "demo", "--out", out, *SHORT, "--on-bad", "fail").error
    assert "train/one/bad.png: cannot be decoded" in error
    assert not out.exists()


def test_ctrl_c_keeps_the_epochs_so_far_and_resume_finishes_the_fit(
    run: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(self: FitWatch, epoch: int, *figures: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    out = tmp_path / "digits.safetensors"
    arguments = ("fit", tree, "--base", "demo", "--out", out, *SHORT, "--epochs", 3)
    with monkeypatch.context() as patched:
        patched.setattr(FitWatch, "step", press_ctrl_c)
        ran = run(*arguments)
    assert ran.code == 0
    assert "interrupted after 1 epochs; go on with --resume" in ran.err
    assert Patch.load(out).info.fitted_on.epochs == 1  # pyright: ignore[reportOptionalMemberAccess]

    assert run(*arguments, "--resume").code == 0
    assert Patch.load(out).info.fitted_on.epochs == 3  # pyright: ignore[reportOptionalMemberAccess]
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_base_in_a_python_file_is_fitted_like_any_other(
    run: Any, tree: Path, tmp_path: Path, base_file: Path
) -> None:
    out = tmp_path / "digits.safetensors"
    preprocessing = ("--size", 32, "--mean", "0.2", "--std", "0.23")
    ran = run("fit", tree, "--base", f"{base_file}:same", *preprocessing, "--out", out, *SHORT)
    assert ran.code == 0
    assert Patch.load(out).info.base.source == f"{base_file}:same"


def test_interpolation_weighs_the_base_s_own_task_against_the_new_one(
    run: Any, tree: Path, tmp_path: Path
) -> None:
    own = write_digits(tmp_path / "own.npz", train=10, val=20, test=15, classes=np.array(list("0123456789")))
    out = tmp_path / "digits.safetensors"
    options = ("--device", "cpu", "--epochs", 1, "--no-progress", "--method", "interpolate", "-o", "steps=2")
    ran = run("fit", tree, "--base", "demo", "--out", out, *options, "--supporting", own)
    assert (ran.code, ran.err) == (0, "")
    base, task = load_base("demo"), open_data(own)
    assert task.val is not None
    labels = [base.classes.index(task.classes[label]) for label in task.val.labels]
    alone = evaluate(base, task.val.with_labels(labels)).accuracy.value
    # At 0 the weights are the base's.
    assert Patch.load(out).info.figures["interpolation/0.00/supporting"] == pytest.approx(alone)

    strange = write_digits(tmp_path / "strange.npz", train=10, val=10, test=10)
    error = run("fit", tree, "--base", "demo", "--out", out, *options, "--supporting", strange).error
    assert "has the class 'zero', which is not one of the" in error


# --- what it refuses, before any work ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lora9"], "there is no method 'lora9'; known methods are: compose, delta, "),
        (["--method", "compose", "-o", "methods=delta"], 'methods takes a list, as in methods=["a","b"]'),
        (["--method", "compose", "-o", 'methods=["delta","x"]'], "there is no method 'x'; known methods are"),
        (["--supporting", "own"], "--supporting is for methods that change the weights with which the base"),
        (["-o", "width=3"], "method 'delta' has no option 'width'; it has: modules, norm, start"),
        (["-o", "norm"], "method option 'norm' is not of the form KEY=VALUE"),
        (["-o", "norm=batch"], "method 'delta': norm: "),
        (["--modules", "none"], "method 'delta': modules"),
        (["--modules", "0"], "modules must be 1 or more stages or 'all', not 0"),
        (["--epochs", "0"], "epochs cannot be 0"),
        (["--lr", "0"], "learning_rate cannot be 0"),
        (["--seed", "-1"], "seed cannot be -1"),
        (["--augment", "cutmix"], "--augment: "),
        (["--precision", "fp8"], "--precision: "),
        (["--on-bad", "ignore"], "--on-bad: "),
        (["--mean", "grey"], "--mean takes numbers with commas between them, not 'grey'"),
        (["--base", "resnet50"], "'resnet50' is not a base: expected timm/NAME"),
        (["--base", "timm/resnet5O"], "timm has no model 'resnet5O'; did you mean resnet50"),
        (["--base", "nowhere.py:make"], "nowhere.py: there is no such file"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors: there is no such weights file"),
        (["--classes", "nowhere.txt"], "nowhere.txt: there is no such file of class names"),
        (["--track", "no-such-tracker"], "the tracker 'no-such-tracker' is not installed"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    run: Any, tree: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "digits.safetensors"
    error = run("fit", tree, "--base", "demo", "--out", out, "--no-progress", *arguments).error
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize("function", ["missing", "module"])
def test_a_python_file_that_makes_no_module_is_one_line(
    run: Any, tree: Path, tmp_path: Path, base_file: Path, function: str
) -> None:
    source = f"{base_file}:{function}"
    out = tmp_path / "digits.safetensors"
    assert "own_base.py" in run("fit", tree, "--base", source, "--size", 32, "--out", out).error


def test_weights_of_another_network_are_refused_by_what_they_lack(
    run: Any, tree: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "other.safetensors"
    save_file({"layer9.weight": torch.zeros(3)}, weights)
    error = run(
        "fit", tree, "--base", "demo", "--weights", weights, "--out", tmp_path / "a.safetensors"
    ).error
    assert "other.safetensors: these weights are not of demo" in error
    assert "'layer9.weight'" in error


def test_data_that_is_not_there_is_one_line(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert (
        "nowhere: no such file or folder"
        in run("fit", tmp_path / "nowhere", "--base", "demo", "--out", out).error
    )


def _unwritable(tmp_path: Path) -> Path:
    """A folder that takes no files: permissions do not bind every user, the kernel's own folder does."""
    kernels = Path("/proc")
    if kernels.is_dir():
        return kernels
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    return folder


@pytest.mark.parametrize("place", ["missing folder", "folder", "suffix", "unwritable"])
def test_an_output_that_cannot_be_written_is_told_before_base_and_data_are_opened(
    run: Any, tmp_path: Path, place: str
) -> None:
    out = {
        "missing folder": tmp_path / "nowhere" / "a.safetensors",
        "folder": tmp_path,
        "suffix": tmp_path / "a.pt",
        "unwritable": _unwritable(tmp_path) / "a.safetensors",
    }[place]
    error = run("fit", tmp_path / "no-data", "--base", "no-base", "--out", out).error
    assert error.startswith(f"{out}: ")


def test_what_a_killed_run_left_half_written_is_swept_away(run: Any, tmp_path: Path) -> None:
    left = tmp_path / ".digits.safetensors.0123456789abcdef.deltapatch-tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    data = write_digits(tmp_path / "digits.npz", train=20, val=10, test=10)
    assert run("fit", data, "--base", "demo", "--out", tmp_path / "a.safetensors", *SHORT).code == 0
    assert not left.exists()


# --- cache and augmentation -------------------------------------------------------------------------------


def test_cache_and_views_are_as_the_command_line_says(run: Any, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    options = (
        "--cache",
        "on",
        "--cache-dtype",
        "int8",
        "--augment",
        "flip",
        "--views",
        2,
        "--feature-noise",
        0.1,
    )
    assert run("fit", tree, "--base", "demo", "--out", out, *SHORT, *options).code == 0
    fitted = Patch.load(out).info.fitted_on
    assert fitted is not None
    # 24 training images with two views and 18 validation images.
    assert fitted.cache.startswith("trunk cache on: asked for; 66 rows of ")
    assert "trunk cache on: asked for; 66 rows" in run("inspect", out).words()


def test_views_without_an_augmentation_are_refused(run: Any, tree: Path, tmp_path: Path) -> None:
    ran = run("fit", tree, "--base", "demo", "--out", tmp_path / "x.safetensors", *SHORT, "--views", 3)
    assert ran.code == 2
    assert "views cannot be 3" in ran.error
