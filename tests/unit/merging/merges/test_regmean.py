"""Layers are solved for by least squares over what enters them in each model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import assert_close, equal, ways_to_run
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from toys import OwnNet, enliven

from deltapatch import merging
from deltapatch.merging import MergeError, Recipe, RunOptions

Model = dict[str, Tensor]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int) -> Model:
    """A convolution of two groups, a linear layer and others that are no layers' weights."""
    return {
        "conv.weight": drawn(4, 2, 2, 2, seed=seed),
        "conv.bias": drawn(4, seed=seed + 10),
        "fc.weight": drawn(3, 5, seed=seed + 20),
        "scale": drawn(seed=seed + 30),
        "empty": torch.zeros(0, 3),
    }


def moments(width: int, seed: int, *groups: int) -> Tensor:
    inputs = drawn(*groups, 40, width, seed=seed).double() + 0.5
    return inputs.mT @ inputs / 40


def gram(seed: int) -> Model:
    return {"conv": moments(8, seed, 2), "fc": moments(5, seed + 40)}


MODELS = [model(seed) for seed in (1, 2, 3)]
GRAMS = [gram(seed) for seed in (1, 2, 3)]


def linear(*rows: list[float]) -> Model:
    return {"fc.weight": torch.tensor(rows)}


def regmean(models: list[Any], grams: list[Any], **options: Any) -> Model:
    merged = merging.regmean(models, grams=grams, **options)
    assert isinstance(merged, dict)
    return merged


def test_a_layer_of_one_weight_is_a_weighted_mean() -> None:
    grams = [{"fc": torch.tensor([[number]])} for number in (1.0, 3.0)]
    merged = regmean([linear([2.0]), linear([6.0])], grams)
    torch.testing.assert_close(merged, linear([5.0]))


@pytest.mark.parametrize(
    ("off_diagonal", "expected"),
    [(1.0, [3 / 31, 38 / 31]), (0.9, [0.115101, 1.199102]), (0.0, [0.25, 1.0])],
)
def test_two_inputs_have_the_solution_worked_out_by_hand(off_diagonal: float, expected: list[float]) -> None:
    grams = [
        {"fc": torch.tensor([[1.0, 0.5], [0.5, 1.0]])},
        {"fc": torch.tensor([[3.0, 0.0], [0.0, 1.0]])},
    ]
    merged = regmean([linear([1.0, 0.0]), linear([0.0, 2.0])], grams, off_diagonal=off_diagonal)
    torch.testing.assert_close(merged, linear(expected), rtol=0, atol=2e-6)


def test_inputs_without_correlation_give_the_average() -> None:
    identity = {"conv": torch.eye(8).repeat(2, 1, 1), "fc": torch.eye(5)}
    assert_close(regmean(MODELS, [identity] * 3), merging.average(MODELS))


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_a_linear_layer_minimises_the_squared_error_over_all_inputs(ridge: float) -> None:
    inputs = [drawn(40, 5, seed=seed).double() for seed in (5, 6)]
    layers = [drawn(3, 5, seed=seed) for seed in (7, 8)]
    grams = [{"fc": rows.T @ rows / len(rows)} for rows in inputs]
    merged = regmean([{"fc.weight": one} for one in layers], grams, off_diagonal=1, ridge=ridge)
    wanted = [rows @ layer.double().T for rows, layer in zip(inputs, layers, strict=True)]
    solution = torch.linalg.lstsq(torch.cat(inputs), torch.cat(wanted)).solution.T
    torch.testing.assert_close(merged["fc.weight"].double(), solution, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": 1},
        {"padding": (2, 0), "stride": (1, 2)},
        {"padding": 2, "dilation": 2},
        {"padding": "same", "dilation": 2, "groups": 2},
        {"padding": 1, "stride": 2, "groups": 4},
    ],
    ids=str,
)
def test_a_convolution_minimises_the_squared_error_over_all_outputs(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, (3, 2), bias=False, **settings).double() for _ in range(2)]
    images = [drawn(12, 4, 7, 6, seed=seed).double() + 0.2 for seed in (1, 2)]
    grams = [
        merging.layer_grams(nn.Sequential(one), [seen]) for one, seen in zip(layers, images, strict=True)
    ]
    states = [{"0.weight": one.weight.detach()} for one in layers]
    merged = regmean(states, grams, off_diagonal=1, ridge=0)["0.weight"]
    assert merged.dtype == torch.float64
    # The error is quadratic in the weights, so autograd gives its normal equations, whatever the settings.
    weight = merged.clone().requires_grad_()
    stated = {name: getattr(layers[0], name) for name in ("stride", "padding", "dilation", "groups")}
    error = sum(
        (functional.conv2d(seen, weight, **stated) - layer(seen).detach()).square().sum()
        for layer, seen in zip(layers, images, strict=True)
    )
    assert isinstance(error, Tensor)
    (slope,) = torch.autograd.grad(error, weight)
    answers = [layer(seen).detach() for layer, seen in zip(layers, images, strict=True)]
    start = torch.cat(answers).square().sum()
    assert float(error.detach()) < 0.9 * float(start)
    assert float(slope.abs().max()) < 1e-9 * float(start)


def test_a_convolution_is_the_least_squares_solution_on_unfolded_inputs() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2, bias=False) for _ in range(2)]
    images = [drawn(6, 3, 9, 8, seed=seed) for seed in (1, 2)]
    grams = [
        merging.layer_grams(nn.Sequential(one), [seen]) for one, seen in zip(layers, images, strict=True)
    ]
    states = [{"0.weight": one.weight.detach()} for one in layers]
    rows = [functional.unfold(seen, 3, 2, 2, 2).transpose(1, 2).flatten(0, 1).double() for seen in images]
    wanted = [one @ state["0.weight"].flatten(1).T.double() for one, state in zip(rows, states, strict=True)]
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T
    merged = regmean(states, grams, off_diagonal=1, ridge=0)["0.weight"]
    torch.testing.assert_close(merged.double().flatten(1), solution, rtol=1e-4, atol=1e-5)


def test_all_but_layers_weights_is_averaged() -> None:
    merged, average = regmean(MODELS, GRAMS), merging.average(MODELS)
    assert isinstance(average, dict)
    for name in ("conv.bias", "scale", "empty"):
        torch.testing.assert_close(merged[name], average[name])
    for name in ("conv.weight", "fc.weight"):
        assert not torch.allclose(merged[name], average[name], atol=1e-3)


@given(seed=st.integers(0, 50), count=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_equal_models_give_themselves(seed: int, count: int) -> None:
    one = model(seed)
    assert equal(regmean([one] * count, GRAMS[:count]), one)


@given(order=st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_the_order_of_the_models_does_not_matter(order: list[int]) -> None:
    again = regmean([MODELS[one] for one in order], [GRAMS[one] for one in order])
    assert_close(again, regmean(MODELS, GRAMS))


@given(factor=st.floats(-3, 3))
@settings(max_examples=15, deadline=None)
def test_it_is_linear_in_the_models(factor: float) -> None:
    scaled = [{name: factor * tensor for name, tensor in one.items()} for one in MODELS]
    expected = {name: factor * tensor for name, tensor in regmean(MODELS, GRAMS).items()}
    assert_close(regmean(scaled, GRAMS), expected)


@given(run=ways_to_run)
@settings(max_examples=20, deadline=None)
def test_the_length_of_parts_and_threads_change_nothing(run: RunOptions) -> None:
    assert equal(regmean(MODELS, GRAMS, run=run), regmean(MODELS, GRAMS))


def test_an_input_that_is_always_zero_has_the_average() -> None:
    grams = [{"fc": one["fc"].clone()} for one in GRAMS]
    for one in grams:
        one["fc"][2], one["fc"][:, 2] = 0, 0
    models = [{"fc.weight": one["fc.weight"]} for one in MODELS]
    merged = regmean(models, grams)["fc.weight"]
    torch.testing.assert_close(merged[:, 2], torch.stack([one["fc.weight"][:, 2] for one in models]).mean(0))


def test_a_group_into_which_only_zeros_go_has_the_average() -> None:
    grams = [one | {"conv": one["conv"] * torch.tensor([0.0, 1.0])[:, None, None]} for one in GRAMS]
    merged, average = regmean(MODELS, grams)["conv.weight"], merging.average(MODELS)
    assert isinstance(average, dict)
    torch.testing.assert_close(merged[:2], average["conv.weight"][:2])
    torch.testing.assert_close(merged[2:], regmean(MODELS, GRAMS)["conv.weight"][2:])


def test_fewer_images_than_inputs_need_the_ridge() -> None:
    rows = [drawn(2, 5, seed=seed).double() for seed in (1, 2)]
    grams = [{"fc": one.T @ one / 2} for one in rows]
    models = [{"fc.weight": one["fc.weight"]} for one in MODELS[:2]]
    merged = regmean(models, grams, off_diagonal=1)["fc.weight"]
    for seen, one in zip(rows, models, strict=True):  # four rows and five inputs: all answers can be met
        torch.testing.assert_close(
            seen @ merged.double().T, seen @ one["fc.weight"].double().T, rtol=1e-3, atol=1e-3
        )
    with pytest.raises(MergeError, match=r"layer 'fc' have no stable inverse.* larger ridge"):
        regmean(models, [{"fc": torch.ones(5, 5)}] * 2, off_diagonal=1, ridge=0)


def test_what_is_gathered_of_networks_fits_their_state_dicts() -> None:
    modules: list[nn.Module] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        modules.append(OwnNet())
        enliven(modules[-1], seed)
    images = [drawn(40, 3, 8, 8, seed=seed) for seed in (3, 4)]
    grams = [merging.layer_grams(one, [seen]) for one, seen in zip(modules, images, strict=True)]
    run = RunOptions(skip=("classifier.*",))
    merged, average = regmean(modules, grams, run=run), merging.average(modules, run=run)
    assert isinstance(average, dict)
    assert "classifier.weight" not in merged
    differing = {
        name for name, tensor in merged.items() if not torch.allclose(tensor.float(), average[name].float())
    }
    assert differing == {f"{layer}.weight" for layer in grams[0] if layer != "classifier"}


def test_a_recipe_of_files_gives_the_same_bytes(tmp_path: Path) -> None:
    paths: dict[str, list[str]] = {"model": [], "grams": []}
    for kind, contents in (("model", MODELS), ("grams", GRAMS)):
        for number, content in enumerate(contents):
            paths[kind].append(str(tmp_path / f"{kind}{number}.safetensors"))
            save_file(content, paths[kind][-1])
    out = merging.regmean(paths["model"], grams=paths["grams"], out=tmp_path / "out.safetensors")
    assert isinstance(out, Path)
    recipe = Recipe.read(out)
    assert recipe.options == {"grams": paths["grams"], "off_diagonal": 0.9, "ridge": 1e-6}
    again = merging.merge(recipe.how, recipe.models, None, tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()
    loaded = merging.open_source(out)
    assert equal({name: loaded.whole(name) for name in loaded.specs}, regmean(MODELS, GRAMS))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grams": GRAMS[:2]}, "2 sets of Gram matrices were given for 3 models"),
        ({"off_diagonal": 1.1}, r"off_diagonal is 1\.1"),
        ({"ridge": -1e-6}, "ridge is -1e-06"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"grams": [{"other": torch.eye(2)}] * 3}, "Gram matrices 1 names no layer"),
        ({"grams": [{"fc": torch.eye(4)}] * 3}, r"layer 'fc' has a Gram matrix of shape \(4, 4\)"),
        ({"grams": [{"fc": torch.ones(5)}] * 3}, r"layer 'fc' has a Gram matrix of shape \(5,\)"),
        ({"grams": [{"conv": torch.ones(3, 8, 8)}] * 3}, "which does not fit its weight"),
        ({"grams": [*GRAMS[:2], {"conv": GRAMS[2]["conv"]}]}, "Gram matrices 3 has no layer 'fc'"),
        (
            {"grams": [*GRAMS[:2], GRAMS[2] | {"fc": torch.eye(6)}]},
            r"shape \(6, 6\) in Gram matrices 3 and \(5, 5\) in Gram matrices 1",
        ),
        (
            {"grams": [*GRAMS[:2], GRAMS[2] | {"fc": torch.full((5, 5), float("inf"))}]},
            "Gram matrices 3: tensor 'fc' holds NaN",
        ),
    ],
)
def test_matrices_and_options_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merging.regmean(MODELS, **({"grams": GRAMS} | changed))
