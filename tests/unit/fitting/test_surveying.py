"""What a pass of the base leaves behind is what classifier and divergence were given, on disk or not."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltapatch.base import Base
from deltapatch.data import TaskData, evaluation_transform, load_batches
from deltapatch.errors import DeltapatchError
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.deciding import sample
from deltapatch.fitting.examples import CachedExamples
from deltapatch.fitting.precision import Precision
from deltapatch.fitting.surveying import Survey, Surveyor, Trunk
from deltapatch.patch import pooled
from deltapatch.split import split_before

EXACT = Precision(False, "cpu", "")
Surveys = Callable[..., tuple[dict[str, Survey], Surveyor]]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAPATCH_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def surveys(base: Base, root: Path) -> Generator[Surveys]:
    opened: list[Surveyor] = []

    def run(task: TaskData, path: str | None = "layer4.0", **options: Any) -> Any:
        @contextmanager
        def watch(label: str, images: int) -> Generator[Callable[[int], None]]:
            bars.append((label, images))
            yield done.append

        bars: list[tuple[str, int]] = []
        done: list[int] = []
        config = FitConfig(**{"cache": "on", "cache_dtype": "fp32", "batch_size": 10, **options})
        trunk = Trunk(base, split_before(base, path) if path else None, EXACT)
        surveyor = Surveyor(trunk, config, watch)
        surveyor.bars, surveyor.done = bars, done
        opened.append(surveyor)
        assert task.train is not None
        splits = {"train": task.train} | ({} if task.val is None else {"val": task.val})
        found = surveyor.survey(splits, path, sample(task.train, base.preprocessing), None)
        return found, surveyor

    yield run
    for surveyor in opened:
        surveyor.close()


@torch.no_grad()
def _seen_by(base: Base, path: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = base.submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    base.module(images)
    handle.remove()
    return seen[0]


def _first_images(base: Base, task: TaskData) -> Tensor:
    assert task.train is not None
    prepared = task.train.with_transform(evaluation_transform(base.preprocessing))
    return next(iter(load_batches(prepared, batch_size=10, shuffle=False))).images


def _activations(found: Survey) -> Tensor:
    assert found.cache is not None
    steps = CachedExamples(found.cache, found.images.rows, found.labels, batch_size=100).epoch(0)
    return torch.cat([step.inputs[0] for step in steps])


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_survey_keeps_what_the_classifier_is_given(
    base: Base, task: TaskData, surveys: Surveys, cache: str
) -> None:
    found = surveys(task, cache=cache)[0]["train"]
    expected = pooled(_seen_by(base, "fc", _first_images(base, task)), "NC")
    assert torch.equal(found.features[:10], expected)
    assert task.train is not None
    assert found.labels.tolist() == task.train.labels.tolist()
    assert found.features.shape == (64, 128)


@pytest.mark.parametrize(("cache_dtype", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 1 / 254)])
def test_the_cache_holds_what_the_divergence_is_given(
    base: Base, task: TaskData, surveys: Surveys, cache_dtype: str, tolerance: float
) -> None:
    found = surveys(task, cache_dtype=cache_dtype)[0]["train"]
    expected = _seen_by(base, "layer4.0", _first_images(base, task))
    kept = _activations(found)[:10]
    assert kept.dtype == torch.float32
    largest = expected.abs().amax((1, 2, 3), keepdim=True)
    assert ((kept - expected).abs() <= tolerance * largest + 1e-12).all()


def test_a_second_survey_runs_the_base_on_nothing_and_finds_the_same(
    task: TaskData, surveys: Surveys
) -> None:
    first, filling = surveys(task)
    again, reading = surveys(task)
    assert [label for label, _ in filling.bars] == ["base on train images", "base on val images"]
    assert reading.bars == []
    for name in ("train", "val"):
        assert torch.equal(first[name].features, again[name].features)
        assert torch.equal(_activations(first[name]), _activations(again[name]))


@pytest.mark.parametrize(
    "options",
    [{"cache_dtype": "bf16"}, {"augment": "flip"}, {"augment": "crop", "views": 2}],
    ids=["stored otherwise", "flipped", "cropped"],
)
def test_what_rows_depend_on_makes_another_cache(
    task: TaskData, surveys: Surveys, options: dict[str, Any]
) -> None:
    surveys(task)
    assert surveys(task, **options)[1].bars != []


def test_another_base_another_place_and_other_images_make_other_caches(
    task: TaskData, surveys: Surveys, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    surveys(task)
    assert surveys(task, "layer3.0")[1].bars != []
    monkeypatch.setattr(type(task.train.store), "version", lambda self: "0" * 64)
    assert surveys(task)[1].bars != []
    monkeypatch.setitem(base.__dict__, "fingerprint", "sha256:" + "1" * 64)
    assert surveys(task)[1].bars != []


def test_a_half_filled_cache_is_filled_up(task: TaskData, surveys: Surveys, base: Base) -> None:
    """As after a kill between two batches."""
    whole = surveys(task)[0]["train"]
    expected, path = _activations(whole), whole.cache.path
    whole.cache._mark(whole.images.rows[20:], 0)
    again, surveyor = surveys(task)
    assert surveyor.bars == [("base on train images", 44)]
    assert again["train"].cache.path == path
    assert torch.equal(_activations(again["train"]), expected)


def test_rotten_bits_are_found_and_the_row_is_made_anew(task: TaskData, surveys: Surveys) -> None:
    found = surveys(task)[0]["train"]
    expected, cache = _activations(found), found.cache
    with (cache.path / "rows.bin").open("r+b") as file:
        file.seek(3 * cache.layout.stride + 5)
        byte = file.read(1)
        file.seek(3 * cache.layout.stride + 5)
        file.write(bytes([byte[0] ^ 0x40]))
    assert not torch.equal(_activations(found), expected)
    again, surveyor = surveys(task)
    assert surveyor.bars == [("base on train images", 1)]
    assert "1 damaged rows were made anew" in str(surveyor.decision)
    # A batch of one image: a convolution may choose another algorithm for it.
    torch.testing.assert_close(_activations(again["train"]), expected)


def test_views_stand_side_by_side_and_the_first_is_the_plain_image(
    base: Base, task: TaskData, surveys: Surveys
) -> None:
    plain = surveys(task)[0]["train"]
    flipped, surveyor = surveys(task, augment="flip")
    found = flipped["train"]
    assert [label for label, _ in surveyor.bars] == [
        "base on train images",
        "base on train images, view 1",
        "base on val images",
    ]
    assert torch.equal(_activations(found), _activations(plain))
    mirrored, _ = found.cache.read(found.images.rows[:10], torch.ones(10, dtype=torch.int64).numpy())
    expected = _seen_by(base, "layer4.0", _first_images(base, task).flip(-1))
    assert torch.equal(mirrored[0], expected)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_bad_images_have_no_row_and_are_told_each_time(
    task_with_bad_images: TaskData, surveys: Surveys, cache: str
) -> None:
    for _ in range(2):
        found, surveyor = surveys(task_with_bad_images, cache=cache)
        assert {name: len(part.bad) for name, part in found.items()} == {"train": 2, "val": 1}
        assert len(found["train"].labels) == len(found["train"].features) == len(found["train"].images) == 24
    assert sum(surveyor.done) == sum(images for _, images in surveyor.bars)


def test_without_a_place_only_features_are_kept(task: TaskData, surveys: Surveys) -> None:
    found, surveyor = surveys(task, path=None)
    assert "features alone" in str(surveyor.decision)
    assert found["train"].cache.layout.shapes == ()


def test_a_folder_that_cannot_be_written_switches_the_cache_off_and_says_so(
    task: TaskData, surveys: Surveys, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root.parent.mkdir(exist_ok=True)
    root.write_text("a file where the folder should be")
    found, surveyor = surveys(task, cache="auto", epochs=1000)
    assert found["train"].cache is None
    assert str(surveyor.decision) == "trunk cache off: its folder cannot be used, or its disk is full"
    assert str(root) in caplog.text
    with pytest.raises(DeltapatchError, match="cannot be opened"):
        surveys(task, cache="on")


@pytest.mark.parametrize("training", [True, False])
def test_a_survey_runs_the_base_in_eval_mode_whatever_its_mode_is(
    base: Base, task: TaskData, surveys: Surveys, training: bool
) -> None:
    expected = surveys(task, cache="off")[0]["train"].features
    base.module.train(training)
    try:
        assert torch.equal(surveys(task, cache="off")[0]["train"].features, expected)
        assert base.module.training == training
    finally:
        base.module.eval()
