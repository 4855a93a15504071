"""Task vectors with a coefficient for each block: what is added, in which groups, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltapatch import merging
from deltapatch.merging import MergeError, RunOptions


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {"conv.weight": drawn(3, 2, 3, 3), "norm.weight": drawn(5), "scale": drawn(), "none": drawn(0, 4)}


BASE = state(0)
MODELS = [state(1), state(2)]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_every_kind_of_tensor_gets_its_own_coefficients() -> None:
    coefficients = {
        "conv.weight": [0.5, 1.0],
        "norm.weight": [-1.0, 0.0],
        "scale": [2.0, 3.0],
        "none": [1, 1],
    }
    merged = merging.atlas(MODELS, BASE, coefficients=coefficients)
    for name, (first, second) in coefficients.items():
        deltas = [model[name] - BASE[name] for model in MODELS]
        torch.testing.assert_close(merged[name], BASE[name] + first * deltas[0] + second * deltas[1])


def test_zeros_give_the_base_and_one_gives_the_model() -> None:
    zeros = merging.atlas(MODELS, BASE, coefficients={name: [0, 0] for name in BASE})
    assert same(zeros, BASE)
    one = merging.atlas(MODELS, BASE, coefficients={name: [0, 1] for name in BASE})
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, MODELS[1][name])


def test_equal_coefficients_are_task_arithmetic() -> None:
    merged = merging.atlas(MODELS, BASE, coefficients={name: [0.3, 0.3] for name in BASE})
    assert same(merged, merging.task_arithmetic(MODELS, BASE, scale=0.3))


def test_the_order_of_the_models_does_not_matter() -> None:
    forth = merging.atlas(MODELS, BASE, coefficients={name: [0.2, -0.7] for name in BASE})
    back = merging.atlas(MODELS[::-1], BASE, coefficients={name: [-0.7, 0.2] for name in BASE})
    for name in BASE:
        torch.testing.assert_close(forth[name], back[name])


def test_groups_of_entries_have_their_own_coefficients() -> None:
    base, model = {"w": torch.zeros(30_000)}, {"w": torch.ones(30_000)}
    merged = merging.atlas([model], base, coefficients={"w": [[1.0, 2.0, 3.0]]}, partitions=3)
    values, counts = merged["w"].unique(return_counts=True)
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert (counts - 10_000).abs().max() < 400  # five standard deviations
    other = merging.atlas([model], base, coefficients={"w": [[1.0, 2.0, 3.0]]}, partitions=3, seed=1)
    assert 0.2 < (merged["w"] == other["w"]).double().mean() < 0.5


def test_tensors_of_one_shape_are_split_differently() -> None:
    base = {name: torch.zeros(10_000) for name in "ab"}
    model = {name: torch.ones(10_000) for name in "ab"}
    merged = merging.atlas([model], base, coefficients={name: [[0.0, 1.0]] for name in "ab"}, partitions=2)
    assert 0.45 < (merged["a"] == merged["b"]).double().mean() < 0.55


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 60), threads=st.integers(1, 3), partitions=st.integers(1, 4))
def test_parts_and_threads_change_no_bit(length: int, threads: int, partitions: int) -> None:
    row = [0.1 * number for number in range(partitions)]
    coefficients = {name: [row, row[::-1]] for name in BASE}
    whole, parted = (
        merging.atlas(MODELS, BASE, coefficients=coefficients, partitions=partitions, seed=3, run=run)
        for run in (RunOptions(), RunOptions(chunk_elements=length, threads=threads))
    )
    assert same(whole, parted)


def test_a_file_repeats_itself_from_its_recipe(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, tensors in (("base", BASE), ("model", MODELS[0])):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    out = tmp_path / "merged.safetensors"
    coefficients = {name: [[0.5, 0.25]] for name in BASE}
    merging.atlas(
        [tmp_path / "model.safetensors"],
        tmp_path / "base.safetensors",
        coefficients=coefficients,
        partitions=2,
        out=out,
    )
    recipe = merging.Recipe.read(out)
    assert json.loads(recipe.to_json())["options"]["coefficients"] == coefficients
    again = merging.merge(recipe.how, recipe.models, recipe.base, tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("coefficients", "partitions", "message"),
    [
        ({"conv.weight": [1, 1], "scale": [1, 1], "none": [1, 1]}, 1, "'norm.weight' has no coefficients"),
        ({name: [1] for name in BASE}, 1, "'conv.weight' do not fit 2 models"),
        ({name: [1, 1] for name in BASE}, 2, "'conv.weight' do not fit 2 models and partitions=2"),
        ({"conv": [1, 1]}, 1, "given for 'conv'"),
        ({}, 0, "0 groups"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(
    coefficients: dict[str, list[float]], partitions: int, message: str
) -> None:
    with pytest.raises(MergeError, match=message):
        merging.atlas(MODELS, BASE, coefficients=coefficients, partitions=partitions)


def test_a_skipped_tensor_needs_no_coefficients_and_is_the_bases() -> None:
    coefficients = {name: [1.0, 0.0] for name in BASE if name != "scale"}
    merged = merging.atlas(MODELS, BASE, coefficients=coefficients, run=RunOptions(skip=("scale",)))
    assert torch.equal(merged["scale"], BASE["scale"])
