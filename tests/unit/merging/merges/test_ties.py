"""TIES: what is kept, which signs win, and what is made of the entries that have them."""

import itertools
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import STATISTICS, assert_close, equal, random_model, ways_to_run, weights
from torch import Tensor

from deltapatch import merging
from deltapatch.merging import MergeError, RunOptions
from deltapatch.merging.inputs import Inputs, check_inputs
from deltapatch.merging.merges._trimming import find_trims
from deltapatch.merging.sources import MemorySource

Model = dict[str, Tensor]

TASKS = [[4.0, -3, 2, -1], [-1.0, 2, 3, 4], [3.0, 1, -2, -4]]


def vectors(*tasks: list[float]) -> list[Model]:
    return [{"w": torch.tensor(task, dtype=torch.float32)} for task in tasks]


def zeros(*, like: Model) -> Model:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def straightforward_ties(models: list[Model], base: Model, keep: float, combine: str = "mean") -> Model:
    """TIES on whole flattened vectors, by sorting."""
    names = sorted(base)
    flat_base = torch.cat([base[name].flatten() for name in names]).double()
    rows = []
    for model in models:
        row = torch.cat([(model[name] - base[name]).flatten() for name in names]).double()
        order = torch.sort(row.abs().float(), descending=True, stable=True).indices
        row[order[floor(round(keep * len(row), 6)) :]] = 0
        rows.append(row)
    stack = torch.stack(rows)
    signs = stack.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    chosen = torch.where(stack * signs > 0, stack, 0)
    if combine == "mean":
        merged = chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)
    elif combine == "sum":
        merged = chosen.sum(0)
    else:
        merged = chosen.abs().amax(0) * signs
    parts = (flat_base + merged).float().split([base[name].numel() for name in names])
    return {name: part.reshape(base[name].shape) for name, part in zip(names, parts, strict=True)}


# Closed forms


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("mean", [3.5, -3, 3, 4]), ("sum", [7.0, -3, 3, 4]), ("max", [4.0, -3, 3, 4])],
)
def test_three_tasks_worked_out_by_hand(combine: Any, expected: list[float]) -> None:
    merged = merging.ties(vectors(*TASKS), {"w": torch.zeros(4)}, keep=0.5, combine=combine)

    assert equal(merged, {"w": torch.tensor(expected)})


def test_the_scale_multiplies_what_is_added_to_the_base() -> None:
    base = {"w": torch.tensor([1.0, 2, 3, 4])}
    models = [{"w": base["w"] + model["w"]} for model in vectors(*TASKS)]

    assert equal(merging.ties(models, base, keep=0.5, scale=2), {"w": torch.tensor([8.0, -4, 9, 12])})
    assert equal(merging.ties(models, base, keep=0.5, scale=0), base)


def test_an_entry_that_cancels_out_takes_the_sign_of_the_majority() -> None:
    base = {"w": torch.zeros(4)}

    mostly_negative = merging.ties(vectors([5, -1, -1, 1], [-5, -1, -1, 1]), base, keep=1)
    assert equal(mostly_negative, {"w": torch.tensor([-5.0, -1, -1, 1])})
    mostly_positive = merging.ties(vectors([5, 1, 1, -1], [-5, 1, 1, -1]), base, keep=1)
    assert equal(mostly_positive, {"w": torch.tensor([5.0, 1, 1, -1])})


def test_an_entry_that_cancels_out_stays_the_bases_where_there_is_no_majority() -> None:
    merged = merging.ties(vectors([5, -1, 1], [-5, -1, 1]), {"w": torch.zeros(3)}, keep=1)

    assert equal(merged, {"w": torch.tensor([0.0, -1, 1])})


def test_the_majority_is_that_of_all_tensors() -> None:
    base = {"a": torch.zeros(1), "b": torch.zeros(3)}
    models = [{"a": torch.tensor([sign]), "b": -torch.ones(3)} for sign in (2.0, -2.0)]

    assert merging.ties(models, base, keep=1)["a"].item() == -2


# What is kept


def inputs_of(task: Model, chunk_elements: int = 4) -> Inputs:
    source = MemorySource(task, "model 1")
    return check_inputs(
        [source], MemorySource(zeros(like=task), "the base"), chunk_elements=chunk_elements, threads=2
    )


@given(
    values=st.lists(st.sampled_from([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]), min_size=1, max_size=40),
    hundredths=st.integers(1, 100),
    chunk_elements=st.integers(1, 50),
)
def test_exactly_the_share_is_kept_also_of_many_equal_entries(
    values: list[float], hundredths: int, chunk_elements: int
) -> None:
    half = len(values) // 2
    task = {"b": torch.tensor(values[:half]), "a": torch.tensor(values[half:])}
    inputs = inputs_of(task, chunk_elements)

    (trim,) = find_trims(inputs, list(task), lambda chunk: chunk.deltas, hundredths / 100)
    parts = list(inputs.over_chunks(lambda chunk: trim(chunk, chunk.deltas[0]), ["a", "b"]))
    kept, entries = torch.cat(parts), torch.cat([task["a"], task["b"]])

    count = hundredths * len(values) // 100
    assert int((kept != 0).sum()) == count
    order = torch.sort(entries.abs(), descending=True, stable=True).indices
    assert torch.equal(kept.nonzero()[:, 0], order[:count].sort().values)
    assert torch.equal(kept[kept != 0], entries[kept != 0])


def test_the_threshold_is_one_of_all_tensors_together() -> None:
    task = {"large": torch.tensor([10.0, 20, 30, 40]), "small": torch.tensor([1.0, 2, 3, 4])}

    merged = merging.ties([task], zeros(like=task), keep=0.5)
    assert equal(merged, {"large": task["large"], "small": torch.zeros(4)})


def test_a_share_means_the_decimal_that_was_written() -> None:
    # In binary 0.29 * 100 is 28.999999999999996.
    task = {"w": torch.arange(1.0, 101)}

    assert int((merging.ties([task], zeros(like=task), keep=0.29)["w"] != 0).sum()) == 29


def test_magnitudes_that_share_their_upper_bits_are_told_apart() -> None:
    steps = torch.arange(1000, dtype=torch.int32)
    values = (torch.ones(1000).view(torch.int32) + steps).view(torch.float32)
    task = {"w": values[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]}

    merged = merging.ties([task], zeros(like=task), keep=0.123)["w"]
    assert torch.equal(merged[merged != 0].sort().values, values[-123:])


def test_a_share_below_one_entry_keeps_none() -> None:
    assert equal(merging.ties(vectors([1, 2, 3]), {"w": torch.zeros(3)}, keep=0.3), {"w": torch.zeros(3)})


def test_the_order_of_tensors_in_a_model_does_not_matter() -> None:
    models = [weights(random_model(seed, among=3)) for seed in (1, 2)]
    base = zeros(like=models[0])
    merged = merging.ties(models, base, keep=0.3)

    turned = [dict(reversed(model.items())) for model in models]
    assert equal(merging.ties(turned, dict(reversed(base.items())), keep=0.3), merged)
    assert equal(merging.ties([models[0], turned[1]], base, keep=0.3), merged)


# Against a straightforward implementation


@given(
    seeds=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    among=st.sampled_from([None, 2, 3, 10]),
    keep=st.sampled_from([0.05, 0.2, 0.37, 0.5, 0.9, 1.0]),
    combine=st.sampled_from(["mean", "sum", "max"]),
    run=ways_to_run,
)
def test_it_is_what_sorting_whole_vectors_gives(
    seeds: list[int], among: int | None, keep: float, combine: Any, run: RunOptions
) -> None:
    base = weights(random_model(1000, among=among))
    models = [weights(random_model(seed, among=among)) for seed in seeds]

    merged = merging.ties(models, base, keep=keep, combine=combine, run=run)
    expected = straightforward_ties(models, base, keep, combine)
    assert all(torch.equal(merged[name], expected[name]) for name in base)


@settings(max_examples=30)
@given(run=ways_to_run, among=st.sampled_from([None, 2, 4]), keep=st.sampled_from([0.1, 0.5, 1.0]))
def test_the_length_of_parts_and_threads_change_nothing(
    run: RunOptions, among: int | None, keep: float
) -> None:
    base, models = random_model(0), [random_model(seed, among=among) for seed in (1, 2, 3)]

    assert equal(merging.ties(models, base, keep=keep, run=run), merging.ties(models, base, keep=keep))


@given(among=st.sampled_from([None, 2, 4]), keep=st.sampled_from([0.1, 0.5, 1.0]))
def test_the_order_of_the_models_does_not_matter(among: int | None, keep: float) -> None:
    base, models = random_model(0), [weights(random_model(seed, among=among)) for seed in (1, 2, 3)]
    base = weights(base)

    merged = merging.ties(models, base, keep=keep)
    for order in itertools.permutations(models):
        assert equal(merging.ties(order, base, keep=keep), merged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_merged_and_kept(dtype: torch.dtype) -> None:
    base = weights(random_model(0, dtype))
    models = [weights(random_model(seed, dtype)) for seed in (1, 2)]

    merged = merging.ties(models, base, keep=0.4)
    wide = merging.ties(
        [{name: tensor.double() for name, tensor in model.items()} for model in models],
        {name: tensor.double() for name, tensor in base.items()},
        keep=0.4,
    )
    for name in base:
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name], wide[name].to(dtype))


# Identities


def test_models_that_are_the_base_give_the_base(base: Model) -> None:
    assert equal(merging.ties([base, base], base), base)


def test_equal_models_give_themselves_where_all_is_kept(base: Model, models: list[Model]) -> None:
    assert_close(merging.ties([models[0]] * 3, base, keep=1), models[0])


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
def test_norm_statistics_are_the_models_mean(base: Model, models: list[Model], combine: Any) -> None:
    merged = merging.ties(models, base, keep=0.1, combine=combine)

    for name in STATISTICS:
        torch.testing.assert_close(merged[name], torch.stack([model[name] for model in models]).mean(0))


def test_norm_statistics_are_not_counted_among_the_entries() -> None:
    task = {"norm.running_var": torch.full((4,), 100.0), "w": torch.tensor([1.0, 2, 3, 4])}

    merged = merging.ties([task], zeros(like=task), keep=0.5)
    assert equal(merged, {"norm.running_var": task["norm.running_var"], "w": torch.tensor([0.0, 0, 3, 4])})


# What is refused


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(keep: float) -> None:
    with pytest.raises(MergeError, match=r"keep of a ties merge is .*; give a share above 0 and at most 1"):
        merging.ties(vectors(*TASKS), {"w": torch.zeros(4)}, keep=keep)


def test_another_way_to_combine_is_refused() -> None:
    with pytest.raises(MergeError, match="combine is 'median'; give one of mean, sum, max"):
        merging.ties(vectors(*TASKS), {"w": torch.zeros(4)}, combine="median")  # type: ignore[arg-type]
