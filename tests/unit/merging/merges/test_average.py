"""The mean of models."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import assert_close, equal, random_model, ways_to_run
from torch import Tensor

from deltapatch import merging
from deltapatch.merging import MergeError, RunOptions

Model = dict[str, Tensor]


def test_the_mean_is_that_of_every_entry() -> None:
    one, two = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 4.0])}

    assert equal(merging.average([one, two]), {"w": torch.tensor([2.0, 1.0])})


def test_weights_count_by_their_share() -> None:
    one, two = {"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}

    for weights in ((1, 3), (0.25, 0.75), (10.0, 30.0)):
        assert equal(merging.average([one, two], weights=weights), {"w": torch.tensor([4.0])})
    assert equal(merging.average([one, two], weights=(0, 2)), two)


@given(seed=st.integers(0, 50), copies=st.integers(1, 5))
def test_equal_models_give_themselves(seed: int, copies: int) -> None:
    model = random_model(seed)

    assert_close(merging.average([model] * copies), model)


@given(run=ways_to_run, weights=st.none() | st.tuples(*[st.floats(0.1, 2)] * 3))
def test_the_length_of_parts_and_threads_change_nothing(run: RunOptions, weights: Any) -> None:
    models = [random_model(seed) for seed in (1, 2, 3)]

    merged = merging.average(models, weights=weights)
    assert equal(merging.average(models, weights=weights, run=run), merged)


def test_the_order_of_the_models_does_not_matter(models: list[Model]) -> None:
    merged = merging.average(models, weights=(1, 2, 3))

    for order in itertools.permutations(range(3)):
        again = merging.average([models[one] for one in order], weights=[one + 1 for one in order])
        assert_close(again, merged)


def test_halves_are_summed_in_fp32() -> None:
    # 2048 + 1 is no fp16 number, so a running sum in fp16 would stay at 2048.
    models = [{"w": torch.tensor([value], dtype=torch.float16)} for value in (2048, 1, 1, 1, 1)]

    assert equal(merging.average(models), {"w": torch.tensor([410.5], dtype=torch.float16)})


@pytest.mark.parametrize("weights", [(1, -1, 1), (0, 0, 0), (1, float("nan"), 1), (1, float("inf"), 1)])
def test_weights_that_are_no_shares_are_refused(models: list[Model], weights: tuple[float, ...]) -> None:
    with pytest.raises(MergeError, match="weights of an average must not be negative"):
        merging.average(models, weights=weights)


def test_a_weight_for_each_model_is_asked_for(models: list[Model]) -> None:
    with pytest.raises(MergeError, match="2 weights were given for 3 models"):
        merging.average(models, weights=(1, 1))
