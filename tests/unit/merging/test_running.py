"""Carrying merges out: into memory or a file, in any parts and threads, in little memory."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import equal, random_model, ways_to_run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltapatch import merging
from deltapatch.errors import DeltapatchError
from deltapatch.merging import Merge, MergeError, Recipe, RunOptions
from deltapatch.merging.inputs import Inputs
from deltapatch.merging.rules import Chunk, Rule

Model = dict[str, Tensor]

MERGES: dict[str, dict[str, Any]] = {
    "average": {"weights": (1, 2, 3)},
    "task_arithmetic": {"scale": 0.3},
    "ties": {"keep": 0.4},
    "dare": {"drop": 0.6},
}


@pytest.fixture
def files(tmp_path: Path, base: Model, models: list[Model]) -> list[Path]:
    """The base's file, and the models'."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two", "three")]
    for path, model in zip(paths, (base, *models), strict=True):
        save_file(model, path)
    return paths


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith("deltapatch-tmp")]


# Files and memory


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_file_holds_what_is_returned_in_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base, *models = (random_model(seed, dtype) for seed in range(4))
    merged = getattr(merging, name)(models, base, **MERGES[name])

    path = tmp_path / "merged.safetensors"
    assert getattr(merging, name)(models, base, **MERGES[name], out=path) == path
    assert equal(load_file(path), merged)


@pytest.mark.parametrize("name", MERGES)
def test_models_from_files_give_what_models_in_memory_give(
    base: Model, models: list[Model], files: list[Path], name: str
) -> None:
    function = getattr(merging, name)

    assert equal(function(files[1:], files[0], **MERGES[name]), function(models, base, **MERGES[name]))


@settings(max_examples=20)
@given(run=ways_to_run, name=st.sampled_from(sorted(MERGES)))
def test_the_bytes_depend_on_neither_the_length_of_parts_nor_threads(
    tmp_path_factory: pytest.TempPathFactory, run: RunOptions, name: str
) -> None:
    folder = tmp_path_factory.mktemp("merges")
    base, *models = (random_model(seed) for seed in range(4))
    function = getattr(merging, name)

    first = function(models, base, **MERGES[name], out=folder / "a.safetensors")
    second = function(models, base, **MERGES[name], out=folder / "b.safetensors", run=run)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", MERGES)
def test_a_recipe_that_is_run_again_gives_the_same_bytes(
    tmp_path: Path, files: list[Path], name: str
) -> None:
    run = RunOptions(skip=("body.*",), dtype=torch.float16)
    first = getattr(merging, name)(
        files[1:], files[0], **MERGES[name], out=tmp_path / "first.safetensors", run=run
    )

    again = merging.merge_recipe(
        Recipe.read(first), tmp_path / "again.safetensors", RunOptions(chunk_elements=5, threads=2)
    )
    assert again.read_bytes() == first.read_bytes()


def test_a_recipe_of_models_in_memory_cannot_be_run_again(tmp_path: Path, models: list[Model]) -> None:
    path = merging.average(models, out=tmp_path / "merged.safetensors")

    with pytest.raises(MergeError, match="model 1: there is no such file"):
        merging.merge_recipe(Recipe.read(path))


def test_a_merged_model_can_replace_one_of_its_inputs(
    base: Model, models: list[Model], files: list[Path]
) -> None:
    merging.task_arithmetic(files[1:], files[0], out=files[1], run=RunOptions(chunk_elements=8))

    assert equal(load_file(files[1]), merging.task_arithmetic(models, base))


def test_inputs_are_left_as_they_are(base: Model, models: list[Model]) -> None:
    for name, options in MERGES.items():
        getattr(merging, name)(models, base, **options)

    assert equal(base, random_model(0))
    assert all(equal(model, random_model(seed)) for seed, model in enumerate(models, 1))


def test_modules_are_merged_as_their_state_dicts() -> None:
    modules = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    merged = merging.average(modules)

    assert equal(merged, merging.average([module.state_dict() for module in modules]))
    modules[0].load_state_dict(merged)


def test_skipped_tensors_are_the_bases_to_the_last_bit(base: Model, models: list[Model]) -> None:
    merged = merging.average(models, base, run=RunOptions(skip=("body.*",), dtype=torch.float16))

    assert torch.equal(merged["body.weight"], base["body.weight"])
    assert merged["stem.weight"].dtype == torch.float16
    assert merged["norm.num_batches_tracked"].item() == 7
    assert "body.weight" not in merging.average(models, run=RunOptions(skip=("body.*",)))


def test_the_result_has_the_dtype_that_was_asked_for(models: list[Model]) -> None:
    halves = [
        {name: tensor.half() for name, tensor in model.items() if "num" not in name} for model in models
    ]
    merged = merging.average(halves, run=RunOptions(dtype=torch.float32))
    expected = merging.average([{name: tensor.float() for name, tensor in model.items()} for model in halves])

    assert equal(merged, expected)


# Whole tensors, progress


@dataclass(frozen=True)
class LargestOfRow(Merge):
    """Every entry becomes the first model's largest of its row: needs whole matrices."""

    name: ClassVar[str] = "largest_of_row"
    needs_base: ClassVar[bool] = False

    def whole(self, inputs: Inputs, name: str) -> bool:
        return len(inputs.merged[name].shape) == 2

    def rule(self, inputs: Inputs) -> Rule:
        def largest(chunk: Chunk) -> Tensor:
            values = chunk.models[0]
            if len(chunk.shape) != 2:
                return values
            matrix = values.reshape(chunk.shape)
            return matrix.amax(1, keepdim=True).expand_as(matrix).flatten()

        return largest


def test_a_merge_gets_the_tensors_whole_that_it_asks_for(models: list[Model]) -> None:
    merged = merging.merge(LargestOfRow(), models[:1], run=RunOptions(chunk_elements=3))

    expected = models[0]["body.weight"].amax(1, keepdim=True).expand(7, 5)
    assert torch.equal(merged["body.weight"], expected)
    assert torch.equal(merged["stem.weight"], models[0]["stem.weight"])


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_counts_every_merged_element_once(models: list[Model], threads: int) -> None:
    told: list[int] = []
    merging.average(models, run=RunOptions(chunk_elements=8, threads=threads, progress=told.append))

    assert sum(told) == sum(tensor.numel() for tensor in models[0].values()) - 1
    assert max(told) == 8


# What goes wrong


def test_a_fault_that_is_found_late_leaves_the_old_file_only(tmp_path: Path, models: list[Model]) -> None:
    path = tmp_path / "merged.safetensors"
    merging.average(models, out=path)
    before = path.read_bytes()

    models[2]["body.weight"][6, 4] = float("nan")
    with pytest.raises(MergeError, match=r"model 3: tensor 'body\.weight' holds NaN or infinite values"):
        merging.average(models, out=path, run=RunOptions(chunk_elements=4, threads=2))
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_a_file_that_is_cut_off_while_it_is_merged_is_told_with_the_tensor(
    tmp_path: Path, files: list[Path]
) -> None:
    size = files[2].stat().st_size
    run = RunOptions(chunk_elements=4, threads=1, progress=lambda elements: os.truncate(files[2], size // 2))

    with pytest.raises(MergeError, match=r"two\.safetensors became shorter while '.+' was read"):
        merging.average(files[1:], out=tmp_path / "merged.safetensors", run=run)
    assert not (tmp_path / "merged.safetensors").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_that_the_dtype_cannot_hold_are_refused_by_name(dtype: torch.dtype) -> None:
    base, model = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 1.0, 60_000.0])}

    with pytest.raises(MergeError, match=r"merged values of tensor 'w' are not finite, or above \d+"):
        merging.task_arithmetic([model], base, scale=2, run=RunOptions(dtype=dtype))


def test_a_scale_that_is_no_number_is_refused(base: Model, models: list[Model]) -> None:
    with pytest.raises(MergeError, match=r"merged values of tensor '.+' are not finite"):
        merging.task_arithmetic(models, base, scale=float("nan"))


def test_results_of_other_names_and_places_are_refused(tmp_path: Path, models: list[Model]) -> None:
    with pytest.raises(MergeError, match=r"merged\.bin: merged models are written as \.safetensors"):
        merging.average(models, out=tmp_path / "merged.bin")
    with pytest.raises(DeltapatchError, match=r"merged\.safetensors cannot be written: No such file"):
        merging.average(models, out=tmp_path / "none" / "merged.safetensors")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chunk_elements": 0}, "chunk_elements is 0; give at least 1"),
        ({"chunk_elements": -5}, "chunk_elements is -5; give at least 1"),
        ({"threads": 0}, "threads is 0; give at least 1"),
        ({"dtype": torch.int8}, "dtype is torch.int8, which cannot hold merged values"),
    ],
)
def test_ways_to_run_that_make_no_sense_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(MergeError, match=reason):
        RunOptions(**options)


# Memory


def memory_bytes(kind: str) -> int:
    """What the system counts as this process's memory: "VmRSS" now, "VmHWM" the most since the last reset."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.fixture(scope="module")
def large_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Three models of 24 MB in two tensors, of which one is nearly all."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        model = {"large": torch.randn(2000, 2950, generator=generator), "small": torch.randn(100_000)}
        save_file(model, path)
    yield paths
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not count the peak"
)
@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "dare"])
def test_a_merge_of_files_takes_less_memory_than_half_a_tensor(
    tmp_path: Path, large_files: list[Path], name: str
) -> None:
    run = RunOptions(chunk_elements=2**15, threads=2)
    function = getattr(merging, name)
    function(large_files[1:], large_files[0], run=RunOptions(skip=("large",)))  # what is loaded once

    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    function(large_files[1:], large_files[0], out=tmp_path / "merged.safetensors", run=run)
    assert memory_bytes("VmHWM") - before < 12e6


def test_a_torch_checkpoint_holds_what_memory_gets(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}]
    path = merging.average(models, out=tmp_path / "merged.pth")
    stored = torch.load(path, weights_only=True)
    assert torch.equal(stored["state_dict"]["w"], torch.tensor([2.0, 4.0]))
    assert Recipe.model_validate_json(stored["deltapatch_merge"]).merge == "average"
    assert torch.equal(merging.average([path, path])["w"], torch.tensor([2.0, 4.0]))
    assert [one.name for one in tmp_path.iterdir()] == ["merged.pth"]


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="NaN"):
        merging.average(
            [{"w": torch.tensor([1.0])}, {"w": torch.tensor([float("nan")])}], out=tmp_path / "m.pt"
        )
    assert list(tmp_path.iterdir()) == []
