"""Entries count as much as they matter to their models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import STATISTICS, assert_close, equal, random_model, ways_to_run
from safetensors.torch import save_file
from torch import Tensor

from deltapatch import merging
from deltapatch.merging import MergeError, Recipe, RunOptions

Model = dict[str, Tensor]


def information(seed: int) -> Model:
    """Fisher information of a random model: of its parameters, and not of its statistics and counter."""
    model = random_model(seed + 100)
    return {name: tensor.square() for name, tensor in model.items() if not name.startswith("norm.r")} | {
        "norm.weight": model["norm.weight"].square()
    }


def parameters(model: Model) -> Model:
    return {name: tensor for name, tensor in model.items() if tensor.is_floating_point()}


MODELS = [parameters(random_model(seed)) for seed in (1, 2, 3)]
FISHERS = [
    {name: tensor for name, tensor in information(seed).items() if tensor.is_floating_point()}
    for seed in (1, 2, 3)
]


def value(*numbers: float) -> Model:
    return {"w": torch.tensor(numbers, dtype=torch.float32)}


def test_entries_are_weighted_by_their_information() -> None:
    models, fishers = [value(1), value(5)], [value(3), value(1)]
    assert equal(merging.fisher(models, fishers=fishers, normalise=False), value(2))
    assert equal(merging.fisher(models, fishers=fishers, weights=(1, 9), normalise=False), value(4))
    assert equal(merging.fisher(models, fishers=fishers), value(3))  # each is 1 once it is normalised


def test_the_length_of_the_whole_information_is_divided_by() -> None:
    models = [
        {"a": torch.tensor([1.0]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([3.0]), "b": torch.tensor([1.0])},
    ]
    fishers = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([10.0]), "b": torch.tensor([0.0])},
    ]
    merged = merging.fisher(models, fishers=fishers)
    # 3/5 against 10/10, and 4/5 against nothing.
    torch.testing.assert_close(merged, {"a": torch.tensor([2.25]), "b": torch.tensor([0.0])})
    scaled = [fishers[0], {name: 1000 * tensor for name, tensor in fishers[1].items()}]
    assert_close(merging.fisher(models, fishers=scaled), merged)


def test_where_nothing_matters_the_first_model_stays() -> None:
    models, fishers = [value(1, 1), value(5, 5)], [value(0, 1), value(0, 1)]
    assert equal(merging.fisher(models, fishers=fishers), value(1, 3))
    assert equal(merging.fisher(models, fishers=fishers, floor=0), value(3, 3))
    little = [value(0, 1), value(1e-6, 1)]
    assert equal(merging.fisher(models, fishers=little, normalise=False), value(3, 3))


def test_equal_information_is_an_average() -> None:
    fishers = [FISHERS[0]] * 3
    for weights in (None, (1, 2, 5)):
        merged = merging.fisher(MODELS, fishers=fishers, weights=weights)
        assert_close(merged, merging.average(MODELS, weights=weights))


def test_statistics_have_no_information_and_are_averaged() -> None:
    merged = merging.fisher(MODELS, fishers=FISHERS, weights=(1, 2, 5))
    average = merging.average(MODELS, weights=(1, 2, 5))
    assert isinstance(merged, dict)
    assert isinstance(average, dict)
    for name in STATISTICS:
        torch.testing.assert_close(merged[name], average[name])
    assert not torch.allclose(merged["stem.weight"], average["stem.weight"])


@given(seed=st.integers(0, 50), count=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_equal_models_give_themselves(seed: int, count: int) -> None:
    model = parameters(random_model(seed))
    fishers = [FISHERS[number % 3] for number in range(count)]
    assert equal(merging.fisher([model] * count, fishers=fishers), model)


@given(order=st.permutations(range(3)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_models_does_not_matter_without_a_floor(order: list[int]) -> None:
    merged = merging.fisher(MODELS, fishers=FISHERS, floor=0)
    again = merging.fisher([MODELS[one] for one in order], fishers=[FISHERS[one] for one in order], floor=0)
    assert_close(again, merged)


@given(run=ways_to_run, normalise=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_length_of_parts_and_threads_change_nothing(run: RunOptions, normalise: bool) -> None:
    merged = merging.fisher(MODELS, fishers=FISHERS, normalise=normalise)
    assert equal(merging.fisher(MODELS, fishers=FISHERS, normalise=normalise, run=run), merged)


def test_skipped_heads_have_no_say(tmp_path: Path) -> None:
    run = RunOptions(skip=("body.*",))
    models = [model | {"body.weight": torch.zeros(index + 1, 5)} for index, model in enumerate(MODELS)]
    fishers = [
        fisher | {"body.weight": torch.full((index + 1, 5), 1e9)} for index, fisher in enumerate(FISHERS)
    ]
    merged = merging.fisher(models, fishers=fishers, run=run)
    assert equal(merged, merging.fisher(MODELS, fishers=FISHERS, run=run))


def test_a_recipe_of_files_gives_the_same_bytes(tmp_path: Path) -> None:
    paths: dict[str, list[str]] = {"model": [], "fisher": []}
    for kind, contents in (("model", MODELS), ("fisher", FISHERS)):
        for number, content in enumerate(contents):
            paths[kind].append(str(tmp_path / f"{kind}{number}.safetensors"))
            save_file(content, paths[kind][-1])
    out = merging.fisher(
        paths["model"], fishers=paths["fisher"], weights=(1, 2, 3), out=tmp_path / "out.safetensors"
    )
    assert isinstance(out, Path)
    recipe = Recipe.read(out)
    assert recipe.options == {
        "fishers": paths["fisher"],
        "weights": [1.0, 2.0, 3.0],
        "floor": 1e-6,
        "normalise": True,
    }
    again = merging.merge(recipe.how, recipe.models, None, tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()
    loaded = merging.open_source(out)
    merged = merging.fisher(MODELS, fishers=FISHERS, weights=(1, 2, 3))
    assert equal({name: loaded.whole(name) for name in loaded.specs}, merged)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fishers": FISHERS[:2]}, "2 Fisher informations were given for 3 models"),
        ({"weights": (1, 1)}, "2 weights were given for 3 models"),
        ({"weights": (1, -1, 1)}, "must not be negative"),
        ({"weights": (1, float("nan"), 1)}, "must not be negative"),
        ({"floor": -1.0}, r"floor is -1\.0"),
        ({"floor": float("nan")}, "floor is nan"),
        (
            {"fishers": [{"other": torch.ones(1)}] * 3},
            "Fisher information 1 names none of the merged tensors",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merging.fisher(MODELS, **({"fishers": FISHERS} | changed))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, r"Fisher information 2 has no tensor 'stem\.bias', which Fisher information 1 has"),
        (torch.ones(4), r"'stem\.bias' has shape \(4,\) in Fisher information 2 and \(5,\) in the models"),
        (torch.full((5,), float("nan")), r"Fisher information 2: tensor 'stem\.bias' holds NaN"),
        (torch.full((5,), -1.0), r"Fisher information 2: tensor 'stem\.bias' holds negative values"),
    ],
)
@pytest.mark.parametrize("normalise", [True, False])
def test_information_that_does_not_fit_is_refused_by_name(
    tensor: Tensor | None, message: str, normalise: bool
) -> None:
    damaged = {name: one for name, one in FISHERS[1].items() if name != "stem.bias"}
    if tensor is not None:
        damaged["stem.bias"] = tensor
    with pytest.raises(MergeError, match=message):
        merging.fisher(MODELS, fishers=[FISHERS[0], damaged, FISHERS[2]], normalise=normalise)


def test_information_of_zeros_cannot_be_normalised() -> None:
    with pytest.raises(MergeError, match="Fisher information 1 is 0 everywhere"):
        merging.fisher([value(1), value(2)], fishers=[value(0), value(1)])
