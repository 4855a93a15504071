"""Recipes: read from YAML, JSON and metadata, strictly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltapatch import merging
from deltapatch.errors import DeltapatchError
from deltapatch.merging import MergeError, Recipe, RunOptions
from deltapatch.merging.merges.ties import Ties
from deltapatch.merging.rules import make_merge, registered_merges

Model = dict[str, Tensor]

RECIPE = Recipe(
    merge="ties",
    options={"keep": 0.3, "scale": 1.5},
    models=("a.safetensors", "owner/b"),
    base="base.pt",
    skip=("fc.*",),
    dtype="bfloat16",
)
YAML = """
merge: ties
options:
  keep: 0.3
  scale: 1.5
models: [a.safetensors, owner/b]
base: base.pt
skip: ["fc.*"]
dtype: bfloat16
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    assert Recipe.read(written(tmp_path / "recipe.yaml", YAML)) == RECIPE
    assert Recipe.read(written(tmp_path / "recipe.yml", RECIPE.to_json())) == RECIPE
    assert Recipe.read(written(tmp_path / "recipe.json", RECIPE.to_json())) == RECIPE
    assert RECIPE.how == Ties(keep=0.3, scale=1.5)
    assert RECIPE.torch_dtype == torch.bfloat16


def test_the_metadata_of_a_merged_file_holds_it(tmp_path: Path, base: Model, models: list[Model]) -> None:
    run = RunOptions(skip=("body.*",), dtype=torch.float16, mixed_dtypes=True)
    merging.task_arithmetic(models, base, scale=0.2, out=tmp_path / "m.safetensors", run=run)

    assert Recipe.read(tmp_path / "m.safetensors") == Recipe(
        merge="task_arithmetic",
        options={"scale": 0.2, "signs": None},
        models=("model 1", "model 2", "model 3"),
        base="the base",
        skip=("body.*",),
        dtype="float16",
        mixed_dtypes=True,
    )


def test_a_small_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path) -> None:
    path = written(
        tmp_path / "recipe.yaml", "merge: task_arithmetic\noptions: {scale: 1e-3}\nmodels: [a, b]\nbase: c"
    )

    assert Recipe.read(path).options == {"scale": "1e-3"}
    assert Recipe.read(path).how.options()["scale"] == 0.001


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "dare"])
def test_options_survive_json(name: str) -> None:
    how = make_merge(name, {})

    assert make_merge(name, json.loads(json.dumps(how.options()))) == how
    assert registered_merges()[name] is type(how)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("average", {"weights": [1, 2.5]}),
        ("task_arithmetic", {"scale": 0.1, "signs": [1, -1]}),
        ("ties", {"keep": 0.4, "scale": 2, "combine": "max"}),
        ("dare", {"drop": 0.5, "seed": 7, "then": "ties", "tasks": ["a", "b"]}),
    ],
)
def test_options_of_a_recipe_are_those_of_the_merge(name: str, options: dict[str, Any]) -> None:
    how = make_merge(name, options)

    assert json.loads(json.dumps({key: how.options()[key] for key in options})) == options


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("merge: ties", "recipe.yaml: models: Field required"),
        (YAML + "weigths: [1, 2]", "recipe.yaml: weigths: Extra inputs are not permitted"),
        (YAML + "version: 2", "recipe.yaml: version: Input should be 1"),
        (YAML.replace("bfloat16", "int8"), "recipe.yaml: dtype: Input should be"),
        (
            YAML.replace("[a.safetensors, owner/b]", "a.safetensors"),
            "recipe.yaml: models: Input should be a valid tuple",
        ),
        ("", "recipe.yaml: recipe: Input should be a valid dictionary"),
        ("- merge\n- ties", "recipe.yaml: recipe: Input should be a valid dictionary"),
        ("merge: [", "recipe.yaml cannot be read as a recipe: while parsing"),
        (
            "!!python/object/apply:os.mkdir [harm]",
            "recipe.yaml cannot be read as a recipe: could not determine",
        ),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(MergeError) as raised:
        Recipe.read(written(tmp_path / "recipe.yaml", text))

    assert reason in str(raised.value)
    assert "see docs/merging.md" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"recipe\.yaml cannot be read as a recipe: .*No such file"):
        Recipe.read(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MergeError, match=r"recipe\.json cannot be read as a recipe"):
        Recipe.read(tmp_path / "recipe.json")
    with pytest.raises(MergeError, match=r"recipe\.json: recipe: Invalid JSON"):
        Recipe.read(written(tmp_path / "recipe.json", "{"))
    with pytest.raises(DeltapatchError, match=r"recipe\.safetensors is truncated or no safetensors file"):
        Recipe.read(written(tmp_path / "recipe.safetensors", "{"))


def test_a_model_that_was_not_merged_has_no_recipe(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(MergeError, match=r"m\.safetensors was not made by a merge"):
        Recipe.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("tise", {}, "there is no merge 'tise'; choose one of .*average.*ties"),
        ("ties", {"density": 0.2}, "ties has no option 'density'; it has combine, keep, scale"),
        ("ties", {"keep": "a lot"}, "ties: keep: Input should be a valid number"),
        ("ties", {"keep": 2}, "keep of a ties merge is 2.0; give a share"),
        ("ties", {"combine": "median"}, "ties: combine: Input should be 'mean', 'sum' or 'max'"),
        ("average", {"weights": 3}, "average: weights: Input should be a valid tuple"),
    ],
)
def test_merges_and_options_that_do_not_exist_are_refused(
    name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MergeError, match=reason):
        make_merge(name, options)
