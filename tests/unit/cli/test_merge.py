"""``deltapatch merge``: models and patches, recipes, accuracies of all, and the sweep."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import write_tree
from safetensors.torch import load_file, save_file
from toys import disturb

from deltapatch.demo.base import build_demo_model
from deltapatch.loading import load_base
from deltapatch.merging.safetensors_files import read_metadata
from deltapatch.method import make_method
from deltapatch.patch import Patch

ARCHITECTURE = """
from deltapatch.demo.base import build_demo_model
import torch

def make(num_classes=3):
    model = build_demo_model()
    model.fc = torch.nn.Linear(model.fc.in_features, num_classes)
    return model.eval()
"""
LOW, HIGH = (0, 1, 2), (3, 4, 5, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two models that differ from it a little and have heads of three and four classes, patches, the
    images of two tasks, and the architecture.
    """
    folder = tmp_path_factory.mktemp("merge")
    (folder / "architecture.py").write_text(ARCHITECTURE)
    base = build_demo_model()
    save_file(base.state_dict(), folder / "start.safetensors")
    for number, (name, digits) in enumerate((("low", LOW), ("high", HIGH))):
        generator = torch.Generator().manual_seed(number)
        state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        for tensor in state.values():
            if tensor.ndim > 1:
                tensor += 0.02 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        state["fc.weight"] = torch.randn(len(digits), 128, generator=generator)
        state["fc.bias"] = torch.zeros(len(digits))
        save_file(state, folder / f"{name}.safetensors")
        for split, count in (("train", 5), ("val", 4), ("test", 4)):
            write_tree(folder / f"{name}_images" / split, digits, count, split)
    demo = load_base("demo", device="cpu")
    for number, (name, classes) in enumerate((("first", ("zero", "one", "two")), ("second", ("a", "b")))):
        for method in ("norm", "delta"):
            patch = disturb(make_method(method).build(demo, classes, seed=0), number)
            patch.save(folder / f"{name}_{method}.safetensors")
    return folder


def merge(run: Any, *arguments: object) -> Any:
    ran = run("merge", *arguments, "--no-progress")
    assert ran.code == 0, ran.err
    return ran


def models(folder: Path) -> tuple[object, ...]:
    """Both models with the base, their heads left out."""
    names = ("low", "high")
    return (
        *(folder / f"{name}.safetensors" for name in names),
        *("--base", folder / "start.safetensors", "--skip", "fc.*"),
    )


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of the table rows that begin so."""
    lines = (line for line in text.splitlines() if line.startswith(f"│ {start}"))
    return [re.findall(r"[^│\s]+(?: [^│\s]+)*", line) for line in lines]


def test_models_are_merged_into_a_file(run: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    ran = merge(run, *models(folder), "--method", "task_arithmetic", "--option", "scale=0.5", "--out", out)
    assert ran.out.startswith(f"wrote {out} (")
    start, low, high, both = (
        load_file(path) for path in (*(folder / f"{n}.safetensors" for n in ("start", "low", "high")), out)
    )
    name = "layer1.0.conv1.weight"
    torch.testing.assert_close(both[name], start[name] + 0.5 * (low[name] + high[name] - 2 * start[name]))
    assert torch.equal(both["fc.weight"], start["fc.weight"])


def test_a_merged_file_and_a_recipe_can_be_repeated(run: Any, folder: Path, tmp_path: Path) -> None:
    first, again, third = (tmp_path / f"{name}.safetensors" for name in ("first", "again", "third"))
    merge(run, *models(folder), "--method", "average", "--option", "weights=[1,3]", "--out", first)
    merge(run, first, "--out", again)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge: average\noptions: {{weights: [1, 3]}}\nskip: ['fc.*']\nbase: {folder}/start.safetensors\n"
        f"models: [{folder}/low.safetensors, {folder}/high.safetensors]\n"
    )
    merge(run, recipe, "--out", third, "--threads", 1)
    assert first.read_bytes() == again.read_bytes() == third.read_bytes()


def test_every_input_and_the_result_are_evaluated_on_every_task_with_its_own_head(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "both.safetensors"
    ran = merge(
        run,
        *(*models(folder), "--method", "average", "--out", out, "--device", "cpu"),
        *("--evaluate", folder / "low_images", "--evaluate", folder / "high_images"),
        *("--architecture", f"{folder / 'architecture.py'}:make", "--size", 32, "--mean", 0.2, "--std", 0.23),
    )
    found = {row[0]: row[1:] for row in rows(ran.out, "")}
    assert list(found) == ["base", "low", "high", "merged"]
    alone = run(
        *("merge", folder / "low.safetensors", "--method", "average", "--device", "cpu"),
        *("--evaluate", folder / "low_images", "--no-progress", "--size", 32, "--mean", 0.2, "--std", 0.23),
        *("--architecture", f"{folder / 'architecture.py'}:make"),
    )
    assert rows(alone.out, "low")[0][1] == rows(alone.out, "merged")[0][1] == found["low"][0]
    for values in found.values():
        low, high, mean = (float(value.rstrip("%")) for value in values)
        assert mean == pytest.approx((low + high) / 2, abs=0.06)


def test_norm_statistics_are_re_estimated_and_nothing_else_changes(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    plain, mended = tmp_path / "plain.safetensors", tmp_path / "mended.safetensors"
    merge(run, *models(folder), "--method", "average", "--out", plain)
    merge(
        run,
        *(*models(folder), "--method", "average", "--out", mended, "--device", "cpu"),
        *("--images", folder / "low_images", "--images", folder / "high_images"),
        *("--architecture", f"{folder / 'architecture.py'}:make", "--size", 32, "--mean", 0.2, "--std", 0.23),
    )
    before, after = load_file(plain), load_file(mended)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("running_" in name for name in changed)
    assert len(changed) == sum("running_" in name for name in before)
    assert "deltapatch_merge" in read_metadata(mended)


def test_a_sweep_takes_what_is_best_on_validation_images_and_draws_it(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "both.safetensors"
    ran = merge(
        run,
        *(*models(folder), "--method", "task_arithmetic", "--out", out, "--device", "cpu"),
        *("--evaluate", folder / "low_images", "--evaluate", folder / "high_images"),
        *("--sweep", "scale=-20:20:20", "--architecture", f"{folder / 'architecture.py'}:make"),
        *("--size", 32, "--mean", 0.2, "--std", 0.23),
    )
    values = {row[0]: float(row[-1].rstrip("%")) for row in rows(ran.out, "") if not row[0].isalpha()}
    assert list(values) == ["-20", "0", "20"]
    best = max(values, key=lambda value: values[value])
    assert f"best: scale = {best}, with {values[best]:.1f}% on average" in ran.out
    assert json.loads(read_metadata(out)["deltapatch_merge"])["options"]["scale"] == float(best)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_patches_give_a_patch_for_each_head(run: Any, folder: Path, tmp_path: Path) -> None:
    given = [folder / f"{name}_norm.safetensors" for name in ("first", "second")]
    out = tmp_path / "both"
    ran = merge(run, *given, "--method", "average", "--device", "cpu", "--out", out)
    assert ran.out == f"wrote {out}\n"
    first, one, two = Patch.load(out / "first_norm.safetensors"), *map(Patch.load, given)
    assert first.classes == one.classes
    for name, tensor in first.parts.state_dict().items():
        expected = (one.parts.state_dict()[name] + two.parts.state_dict()[name]) / 2
        torch.testing.assert_close(tensor, expected)
    again = tmp_path / "again"
    merge(run, out / "first_norm.safetensors", "--device", "cpu", "--out", again)
    again_first = Patch.load(again / "first_norm.safetensors").state_dict()
    assert all(torch.equal(tensor, again_first[name]) for name, tensor in first.state_dict().items())


def test_patches_are_checked_on_images_and_evaluated(run: Any, folder: Path, tmp_path: Path) -> None:
    first = folder / "first_delta.safetensors"
    ran = merge(
        run,
        *(first, "--method", "average", "--device", "cpu", "--out", tmp_path / "one.safetensors"),
        *("--images", folder / "low_images", "--evaluate", folder / "low_images"),
    )
    assert "first_delta: answers as its inputs do on first_delta 100.0% of their images" in ran.out
    found = {row[0]: row[1] for row in rows(ran.out, "")}
    assert list(found) == ["base", "first_delta", "merged"]
    evaluated = run("evaluate", folder / "low_images", "--patch", first, "--device", "cpu")
    accuracy = re.search(r"accuracy\s+([\d.]+)", evaluated.out)
    assert accuracy is not None
    assert found["first_delta"] == found["merged"] == f"{accuracy[1]}%"


def test_a_joint_patch_answers_all_classes(run: Any, folder: Path, tmp_path: Path) -> None:
    given = [folder / f"{name}_delta.safetensors" for name in ("first", "second")]
    out = tmp_path / "joint.safetensors"
    merge(run, *given, "--method", "average", "--heads", "joint", "--device", "cpu", "--out", out)
    assert Patch.load(out).classes == ("zero", "one", "two", "a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("low", "high"), "give --method, such as average or ties, or one recipe file"),
        (("low", "high", "--method", "nothing", "--out", "x"), "there is no merge 'nothing'; choose one of"),
        (("low", "high", "--method", "average"), "nothing would be left of the merge; give --out, or --eval"),
        (
            ("low", "high", "--method", "average", "--option", "x=1", "--out", "x"),
            "average has no option 'x'",
        ),
        (("low", "first_norm", "--method", "average", "--out", "x"), "merge models with models, or patches"),
        (("low", "high", "--method", "ties", "--out", "x"), "works on what models add to their base; give t"),
        (("low", "high", "--method", "average", "--out", "x"), "tensor 'fc.bias' has shape"),
        (("low", "--method", "average", "--out", "x", "--heads", "joint"), "are for patches; leave them out"),
        (("low", "--method", "average", "--out", "x", "--heads", "all"), "--heads is one of own, joint, ave"),
        (("first_norm", "--method", "average", "--out", "x", "--size", "8"), "are for models that are no pa"),
        (("low", "--method", "average", "--out", "x", "--images", "low"), "give --architecture, such as tim"),
        (
            ("low", "--method", "average", "--out", "x", "--sweep", "a=1:2:1"),
            "average has no option 'a' to s",
        ),
        (
            ("low", "--method", "task_arithmetic", "--out", "x", "--sweep", "scale=1"),
            "give --evaluate with th",
        ),
        (
            ("low", "--method", "task_arithmetic", "--out", "x", "--sweep", "scale"),
            "a sweep is OPTION=FIRST:L",
        ),
        (("low", "--option", "a=1", "--out", "x"), "is a recipe and says how to merge; change it there"),
        (("low", "--out", "x"), "was not made by a merge: its metadata has no recipe"),
        (("low", "--method", "average", "--out", "x", "--dtype", "wide"), "--dtype 'wide' is none of"),
        (("missing", "--method", "average", "--out", "x"), "there is no such file"),
        (("low", "--method", "average", "--out", "no/x"), "give a name in a folder that exists"),
        (("low", "--method", "average", "--picture", "x.png", "--out", "x"), "--picture is for what --sweep"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    run: Any, folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    files = {"low", "high", "first_norm", "missing"}
    given: list[object] = []
    for number, argument in enumerate(arguments):
        is_model = argument in files and (number == 0 or arguments[number - 1] in files)
        is_output = number > 0 and arguments[number - 1] == "--out"
        given.append(
            folder / f"{argument}.safetensors"
            if is_model
            else tmp_path / f"{argument}.safetensors"
            if is_output
            else argument
        )
    assert message in run("merge", *given, "--no-progress").error
    assert not list(tmp_path.iterdir())


def test_a_recipe_never_makes_a_python_file_run(run: Any, folder: Path, tmp_path: Path) -> None:
    """Such a base has to be named with --base."""
    (tmp_path / "own.py").write_text("raise SystemExit(3)")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge: average\nmodels: [{folder}/first_norm.safetensors]\nbase: {tmp_path}/own.py:make\n"
    )
    merge(run, recipe, "--device", "cpu", "--out", tmp_path / "one.safetensors")
    assert Patch.load(tmp_path / "one.safetensors").classes == ("zero", "one", "two")


def test_there_is_the_data_of_every_task(run: Any, folder: Path, tmp_path: Path) -> None:
    error = run(
        *("merge", *models(folder), "--method", "average", "--evaluate", folder / "low_images"),
        *("--architecture", f"{folder / 'architecture.py'}:make", "--size", 32, "--no-progress"),
    ).error
    assert "1 tasks were given for 2 models, each with a head of its own" in error
