"""DARE: which entries are dropped, what becomes of the others, and how they are merged."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import STATISTICS, equal, random_model, ways_to_run, weights
from torch import Tensor

from deltapatch import merging
from deltapatch.merging import MergeError, RunOptions
from deltapatch.merging.merges.dare import keep_mask

Model = dict[str, Tensor]


def zeros(*, like: Model) -> Model:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


# Closed forms


def test_what_stays_is_rescaled(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([True, False, True])
    monkeypatch.setattr("deltapatch.merging.merges.dare.keep_mask", lambda *where: mask)

    merged = merging.dare([{"w": torch.tensor([1.0, 2, 3])}], {"w": torch.zeros(3)}, drop=0.5)
    assert equal(merged, {"w": torch.tensor([2.0, 0, 6])})


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_the_expectation_is_the_task_vector_and_the_variance_as_it_should_be(drop: float) -> None:
    number, delta = 200_000, 3.0
    task = {"w": torch.full((number,), delta)}

    rest = merging.dare([task], zeros(like=task), drop=drop)["w"].double()
    variance = delta**2 * drop / (1 - drop)
    assert rest.mean().item() == pytest.approx(delta, abs=5 * math.sqrt(variance / number))
    assert rest.var().item() == pytest.approx(variance, rel=0.05)
    assert rest.unique().tolist() == pytest.approx([0, delta / (1 - drop)])


@pytest.mark.parametrize(
    ("then", "plain"),
    [
        ("average", merging.average),
        ("task_arithmetic", lambda models, base: merging.task_arithmetic(models, base, scale=1)),
        ("ties", merging.ties),
    ],
)
def test_dropping_nothing_is_the_merge_that_follows(
    base: Model, models: list[Model], then: Any, plain: Any
) -> None:
    merged, expected = merging.dare(models, base, drop=0, then=then), plain(models, base)

    for name in base:
        torch.testing.assert_close(merged[name], expected[name])


def test_scale_0_gives_the_base(base: Model, models: list[Model]) -> None:
    for then in ("average", "task_arithmetic", "ties"):
        assert equal(merging.dare(models, base, scale=0, then=then), base)


def test_models_that_are_the_base_give_the_base(base: Model) -> None:
    for then in ("average", "task_arithmetic", "ties"):
        assert equal(merging.dare([base, base], base, then=then), base)


def test_the_sum_is_the_average_at_a_scale_for_each_model(base: Model, models: list[Model]) -> None:
    mean = merging.dare(models, base, drop=0.5)
    total = merging.dare(models, base, drop=0.5, then="task_arithmetic", scale=1 / 3)

    for name in base:
        torch.testing.assert_close(total[name], mean[name])


def test_ties_trims_what_the_drop_has_left() -> None:
    models = [weights(random_model(seed)) for seed in (1, 2, 3)]
    base = zeros(like=models[0])
    thinned = [
        merging.dare([model], base, drop=0.6, tasks=(str(number),)) for number, model in enumerate(models, 1)
    ]

    merged = merging.dare(models, base, drop=0.6, then="ties", keep=0.3)
    assert equal(merged, merging.ties(thinned, base, keep=0.3))
    assert not equal(merged, merging.ties(models, base, keep=0.3))


# Masks


def test_the_mask_of_a_seed_stays_the_same_from_version_to_version() -> None:
    bits = keep_mask(0, "1", "stem.weight", 0, 32, 0.5)

    assert "".join(map(str, bits.int().tolist())) == "01011110010010000010010000011000"


@given(
    start=st.integers(0, 200),
    number=st.integers(0, 100),
    drop=st.sampled_from([0.1, 0.5, 0.99]),
    seed=st.integers(-5, 5),
)
def test_a_part_of_a_mask_is_the_part_of_the_whole_one(
    start: int, number: int, drop: float, seed: int
) -> None:
    whole = keep_mask(seed, "cars", "w", 0, start + number, drop)

    assert torch.equal(keep_mask(seed, "cars", "w", start, number, drop), whole[start:])


def test_places_far_into_a_tensor_have_masks_too() -> None:
    far = keep_mask(0, "cars", "w", 2**40 + 3, 1000, 0.5)

    assert 400 < int(far.sum()) < 600
    assert torch.equal(far[5:], keep_mask(0, "cars", "w", 2**40 + 8, 995, 0.5))


def test_masks_of_other_seeds_tasks_and_tensors_have_nothing_in_common() -> None:
    number = 100_000
    first = keep_mask(0, "cars", "w", 0, number, 0.5)
    others = [("birds", "w", 0), ("cars", "v", 0), ("cars", "w", 1)]

    for task, tensor, seed in others:
        agreeing = int((first == keep_mask(seed, task, tensor, 0, number, 0.5)).sum())
        assert agreeing == pytest.approx(number / 2, abs=5 * math.sqrt(number) / 2)


def test_neighbours_are_dropped_independently() -> None:
    kept = keep_mask(0, "cars", "w", 0, 100_000, 0.5)

    for distance in (1, 2, 4, 8):
        agreeing = float((kept[distance:] == kept[:-distance]).float().mean())
        assert agreeing == pytest.approx(0.5, abs=0.01)


@settings(max_examples=30)
@given(
    run=ways_to_run,
    drop=st.sampled_from([0.2, 0.9]),
    then=st.sampled_from(["average", "task_arithmetic", "ties"]),
)
def test_the_length_of_parts_and_threads_change_nothing(run: RunOptions, drop: float, then: Any) -> None:
    base, models = random_model(0), [random_model(seed) for seed in (1, 2, 3)]

    merged = merging.dare(models, base, drop=drop, then=then, keep=0.5)
    assert equal(merging.dare(models, base, drop=drop, then=then, keep=0.5, run=run), merged)


def test_the_order_of_named_models_does_not_matter(base: Model, models: list[Model]) -> None:
    forth = merging.dare(models[:2], base, drop=0.5, tasks=("cars", "birds"))
    back = merging.dare(models[1::-1], base, drop=0.5, tasks=("birds", "cars"))

    assert equal(forth, back)
    assert not equal(forth, merging.dare(models[:2], base, drop=0.5, tasks=("birds", "cars")))


def test_another_model_does_not_change_what_the_first_ones_keep() -> None:
    models = [weights(random_model(seed)) for seed in (1, 2)]
    base = zeros(like=models[0])

    alone = merging.dare(models[:1], base, drop=0.5)
    beside_nothing = merging.dare([models[0], base], base, drop=0.5, then="task_arithmetic")
    assert equal(alone, beside_nothing)


def test_norm_statistics_are_never_dropped(base: Model, models: list[Model]) -> None:
    merged = merging.dare(models, base, drop=0.99)

    for name in STATISTICS:
        torch.testing.assert_close(merged[name], torch.stack([model[name] for model in models]).mean(0))


def test_a_recipe_repeats_the_masks(tmp_path: Path, base: Model, models: list[Model]) -> None:
    files = [
        merging.average([model], out=tmp_path / f"{name}.safetensors")
        for name, model in zip(("base", "cars", "birds"), (base, *models[:2]), strict=True)
    ]
    first = merging.dare(
        files[1:], files[0], drop=0.7, seed=5, tasks=("cars", "birds"), out=tmp_path / "a.safetensors"
    )

    merging.merge_recipe(merging.Recipe.read(first), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == first.read_bytes()


# What is refused


@pytest.mark.parametrize("drop", [1, 1.5, -0.1, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(base: Model, models: list[Model], drop: float) -> None:
    with pytest.raises(MergeError, match=r"drop of a dare merge is .*; give a share from 0 to below 1"):
        merging.dare(models, base, drop=drop)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 0, "then": "ties"}, "keep of a dare merge is 0; give a share above 0"),
        ({"then": "fisher"}, "then is 'fisher'; give one of average, task_arithmetic, ties"),
        ({"tasks": ("cars",)}, "1 names of tasks were given for 3 models; give as many"),
        ({"tasks": ("cars", "cars", "birds")}, "two tasks have one name"),
    ],
)
def test_other_options_are_refused(
    base: Model, models: list[Model], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(MergeError, match=reason):
        merging.dare(models, base, **options)
