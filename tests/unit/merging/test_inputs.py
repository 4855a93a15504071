"""Models are checked against each other, and what does not fit is refused with the tensor's name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_models import random_model
from torch import Tensor

from deltapatch.merging import MergeError
from deltapatch.merging.chunks import Part
from deltapatch.merging.inputs import Inputs, check_inputs, in_order
from deltapatch.merging.sources import MemorySource

Model = dict[str, Tensor]


def checked(models: list[Model], base: Model | None = None, **options: Any) -> Inputs:
    sources = [MemorySource(model, f"model {number}") for number, model in enumerate(models, 1)]
    return check_inputs(sources, None if base is None else MemorySource(base, "the base"), **options)


def test_floating_tensors_are_merged_and_others_copied(models: list[Model]) -> None:
    inputs = checked(models)

    assert list(inputs.copied) == ["norm.num_batches_tracked"]
    assert set(inputs.merged) == set(models[0]) - set(inputs.copied)


# What is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda model: model.pop("stem.bias"),
            "{other} has no tensor 'stem.bias', which model 1 has; models of different architectures",
        ),
        (
            lambda model: model.update({"extra": torch.ones(1)}),
            "model 1 has no tensor 'extra', which {other} has; models of different architectures",
        ),
        (
            lambda model: model.update({"stem.bias": torch.ones(6)}),
            r"tensor 'stem.bias' has shape \(6,\) in {other} and \(5,\) in model 1",
        ),
        (
            lambda model: model.update({"stem.bias": model["stem.bias"].half()}),
            "tensor 'stem.bias' is torch.float16 in {other} and torch.float32 in model 1",
        ),
        (
            lambda model: model.update({"stem.bias": torch.ones(5, dtype=torch.int64)}),
            "tensor 'stem.bias' is torch.int64 in {other} and torch.float32 in model 1",
        ),
    ],
)
@pytest.mark.parametrize("other", ["model 2", "the base"])
def test_what_differs_is_refused_by_name(
    base: Model, models: list[Model], other: str, change: Callable[[Model], Any], reason: str
) -> None:
    change(models[1] if other == "model 2" else base)

    with pytest.raises(MergeError, match=reason.format(other=other)):
        checked(models, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("other", ["model 2", "the base"])
def test_values_that_are_none_are_refused_by_name(
    base: Model, models: list[Model], other: str, value: float
) -> None:
    (models[1] if other == "model 2" else base)["body.weight"][6, 4] = value
    inputs = checked(models, base)

    inputs.chunk(Part("body.weight", 0, 34))
    with pytest.raises(MergeError, match=f"{other}: tensor 'body.weight' holds NaN or infinite values"):
        inputs.chunk(Part("body.weight", 30, 35))


def test_integers_that_differ_are_refused_by_name(models: list[Model]) -> None:
    for number, model in enumerate(models):
        model["position_ids"] = torch.tensor([0, 1, number])

    with pytest.raises(
        MergeError, match=r"tensor 'position_ids' holds torch\.int64 that differ between model 1"
    ):
        checked(models)
    assert "position_ids" not in checked(models, skip=["position*"]).copied


def test_integers_that_are_equal_are_copied(models: list[Model]) -> None:
    for model in models:
        model["position_ids"] = torch.tensor([0, 1, 2])

    assert checked(models).copied["position_ids"].label == "model 1"


def test_counts_of_batches_may_differ(models: list[Model]) -> None:
    models[1]["norm.num_batches_tracked"] = torch.tensor(99)

    assert checked(models).copied["norm.num_batches_tracked"].label == "model 1"


def test_no_models_are_refused(base: Model) -> None:
    with pytest.raises(MergeError, match="there is no model to merge; give one or more"):
        checked([])
    with pytest.raises(MergeError, match="no floating tensor is left to merge"):
        checked([base], skip=["*"])
    with pytest.raises(MergeError, match="no floating tensor is left to merge"):
        checked([{}, {}])


# Options


def test_skipped_heads_may_differ_and_are_the_bases(base: Model, models: list[Model]) -> None:
    base["fc.weight"] = torch.ones(1000, 2)
    models[0]["fc.weight"], models[1]["fc.weight"], models[1]["fc.bias"] = (torch.ones(n) for n in (3, 4, 5))

    inputs = checked(models, base, skip=["fc.*"])
    assert inputs.copied["fc.weight"].label == "the base"
    assert "fc.bias" not in inputs.copied
    assert not any(name.startswith("fc.") for name in inputs.merged)
    assert not any(name.startswith("fc.") for name in checked(models, skip=["fc.*"]).copied)


def test_mixed_dtypes_are_merged_where_they_are_allowed(models: list[Model]) -> None:
    models[1]["stem.bias"] = models[1]["stem.bias"].double()
    models[2]["stem.bias"] = models[2]["stem.bias"].half()

    inputs = checked(models, mixed_dtypes=True)
    chunk = inputs.chunk(Part("stem.bias", 0, 5))
    assert inputs.merged["stem.bias"].dtype == torch.float32
    assert {part.dtype for part in chunk.models} == {torch.float64}
    with pytest.raises(MergeError, match=r"tensor 'stem\.bias' is torch\.int64"):
        checked([models[0], models[1] | {"stem.bias": torch.ones(5, dtype=torch.int64)}], mixed_dtypes=True)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float8_e5m2, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_chunks_are_at_least_fp32(dtype: torch.dtype, computed: torch.dtype) -> None:
    chunk = checked([random_model(1, dtype)], random_model(0, dtype)).chunk(Part("body.weight", 3, 20))

    assert chunk.base is not None
    assert {part.dtype for part in (*chunk.models, chunk.base, *chunk.deltas)} == {computed}
    assert {part.shape for part in (*chunk.models, chunk.base)} == {(17,)}
    assert (chunk.start, chunk.shape) == (3, (7, 5))


@pytest.mark.parametrize("chunk_elements", [1, 4, 60, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_cover_every_element_once_and_in_order(
    models: list[Model], chunk_elements: int, threads: int
) -> None:
    inputs = checked(models, chunk_elements=chunk_elements, threads=threads)
    found: dict[str, list[Tensor]] = {}
    for name, part in inputs.over_chunks(lambda chunk: (chunk.name, chunk.models[0])):
        assert len(part) <= chunk_elements
        found.setdefault(name, []).append(part)

    assert "nothing" not in found
    for name, parts in found.items():
        assert torch.equal(torch.cat(parts), models[0][name].flatten())


def test_a_tensor_that_is_wanted_whole_is_not_cut(models: list[Model]) -> None:
    inputs = checked(models, chunk_elements=4)

    chunks = inputs.over_chunks(
        lambda chunk: (chunk.name, len(chunk.models[0])),
        ["stem.bias", "body.weight"],
        frozenset(["body.weight"]),
    )
    assert list(chunks) == [("stem.bias", 4), ("stem.bias", 1), ("body.weight", 35)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_error_in_one_part_ends_the_work(threads: int) -> None:
    begun: list[int] = []

    def work(part: Part) -> int:
        begun.append(part.start)
        if part.start == 3:
            raise RuntimeError("of part 3")
        return part.start

    results: list[int] = []
    with pytest.raises(RuntimeError, match="of part 3"):
        results.extend(in_order(work, (Part("w", start, start + 1) for start in range(1000)), threads))
    assert max(begun) <= 3 + 3 * threads
