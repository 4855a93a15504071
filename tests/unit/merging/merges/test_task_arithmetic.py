"""Adding, taking off and transferring task vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import STATISTICS, assert_close, equal, random_model, ways_to_run, weights
from torch import Tensor

from deltapatch import merging
from deltapatch.merging import MergeError, RunOptions

Model = dict[str, Tensor]


def scalar(value: float) -> Model:
    return {"w": torch.tensor([float(value)])}


def test_the_scale_multiplies_the_sum() -> None:
    assert equal(merging.task_arithmetic([scalar(3), scalar(0)], scalar(1), scale=0.5), scalar(1.5))


def test_signs_take_off_and_make_analogies() -> None:
    assert equal(merging.task_arithmetic([scalar(3)], scalar(1), scale=1, signs=(-1,)), scalar(-1))
    analogy = merging.task_arithmetic([scalar(3), scalar(7), scalar(2)], scalar(1), scale=1, signs=(1, 1, -1))
    assert equal(analogy, scalar(1 + 2 + 6 - 1))


def test_scale_0_gives_the_base_and_1_the_only_model(base: Model, models: list[Model]) -> None:
    assert equal(merging.task_arithmetic(models, base, scale=0), base)
    assert_close(merging.task_arithmetic(models[:1], base, scale=1), models[0])


@given(scale=st.floats(-2, 2))
def test_models_that_are_the_base_give_the_base(scale: float) -> None:
    base = random_model(0)

    assert equal(merging.task_arithmetic([base, base], base, scale=scale), base)


@given(first=st.floats(-1, 1), second=st.floats(-1, 1))
def test_weights_are_linear_in_the_scale(first: float, second: float) -> None:
    base, models = weights(random_model(0)), [weights(random_model(seed)) for seed in (1, 2)]

    def moved(scale: float) -> Model:
        merged = merging.task_arithmetic(models, base, scale=scale)
        return {name: merged[name] - base[name] for name in base}

    one, two, both = moved(first), moved(second), moved(first + second)
    for name in base:
        torch.testing.assert_close(one[name] + two[name], both[name], atol=1e-5, rtol=1e-5)


@given(run=ways_to_run, scale=st.floats(-1, 1))
def test_the_length_of_parts_and_threads_change_nothing(run: RunOptions, scale: float) -> None:
    base, models = random_model(0), [random_model(seed) for seed in (1, 2, 3)]

    merged = merging.task_arithmetic(models, base, scale=scale)
    assert equal(merging.task_arithmetic(models, base, scale=scale, run=run), merged)


def test_the_order_of_the_models_does_not_matter(base: Model, models: list[Model]) -> None:
    assert_close(
        merging.task_arithmetic(models, base, signs=(1, -1, 0.5)),
        merging.task_arithmetic(models[::-1], base, signs=(0.5, -1, 1)),
    )


def test_small_differences_of_halves_are_not_lost() -> None:
    # 1 + 1/1024 is the fp16 number after 1. Each model adds one step, and a quarter of four is one again.
    base = {"w": torch.ones(1, dtype=torch.float16)}
    models = [{"w": torch.tensor([1 + 1 / 1024], dtype=torch.float16)}] * 4

    assert equal(merging.task_arithmetic(models, base, scale=0.25), models[0])


# Norm statistics


def test_norm_statistics_follow_the_formula_where_it_mixes_models(base: Model, models: list[Model]) -> None:
    merged = merging.task_arithmetic(models, base, scale=0.3)

    for name in STATISTICS:
        expected = base[name] + 0.3 * sum(model[name] - base[name] for model in models)
        torch.testing.assert_close(merged[name], expected)


def test_norm_statistics_become_the_mean_where_the_scale_is_too_large_for_them(
    base: Model, models: list[Model]
) -> None:
    merged = merging.task_arithmetic(models, base, scale=0.8)

    for name in STATISTICS:
        torch.testing.assert_close(merged[name], torch.stack([model[name] for model in models]).mean(0))


def test_no_variance_goes_below_0() -> None:
    base, models = {"norm.running_var": torch.tensor([4.0])}, [{"norm.running_var": torch.tensor([0.5])}] * 8

    assert merging.task_arithmetic(models, base, scale=1)["norm.running_var"].item() == 0.5
    assert (
        merging.task_arithmetic([{"norm.running_var": torch.tensor([9.0])}], base, scale=1, signs=(-1,))
        == base
    )


# What is refused


def test_a_sign_for_each_model_is_asked_for(base: Model, models: list[Model]) -> None:
    with pytest.raises(MergeError, match="2 signs were given for 3 models"):
        merging.task_arithmetic(models, base, signs=(1, -1))


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare"])
def test_a_merge_of_task_vectors_asks_for_the_base(models: list[Model], name: str) -> None:
    with pytest.raises(MergeError, match=f"{name} works on what models add to their base; give the base"):
        getattr(merging, name)(models, None)
