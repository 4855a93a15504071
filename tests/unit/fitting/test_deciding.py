"""Whether activations are kept follows from times, bytes and epochs, and is said with its reason."""

from dataclasses import replace

import pytest
import torch

from deltapatch.base import Base
from deltapatch.data import TaskData
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.deciding import BYTES_PER_SECOND, Costs, decide, impossible, sample

# 100 images whose rows take 1 ms to read, and whose trunk takes 40 ms.
COSTS = Costs(
    seconds=0.040,
    row_bytes=int(BYTES_PER_SECOND / 1000),
    missing_rows=100,
    rows=100,
    images=100,
    free_bytes=10**12,
)


def test_a_slow_trunk_is_kept_and_a_quick_one_is_not() -> None:
    assert decide(FitConfig(epochs=2), COSTS).keeps
    assert not decide(FitConfig(epochs=2), replace(COSTS, seconds=0.001)).keeps


def test_one_epoch_does_not_pay_for_many_views() -> None:
    """Eight views are eight passes of the trunk; without a cache there are two, and with 20 epochs 21."""
    eight = replace(COSTS, missing_rows=800, rows=800)
    config = FitConfig(augment="crop", views=8)
    assert not decide(replace(config, epochs=1), eight).keeps
    assert decide(replace(config, epochs=20), eight).keeps
    assert decide(replace(config, epochs=1), replace(eight, missing_rows=0)).keeps


def test_the_times_at_which_both_are_equal_part_them() -> None:
    """Keeping takes n t + n r + e n r and computing anew (1 + e) n t: equal at t = r (1 + e) / e."""
    config = FitConfig(epochs=4)
    row_seconds = COSTS.row_bytes / BYTES_PER_SECOND
    equal = row_seconds * 5 / 4
    assert decide(config, replace(COSTS, seconds=equal * 1.01)).keeps
    assert not decide(config, replace(COSTS, seconds=equal * 0.99)).keeps


def test_a_disk_without_room_is_named_with_its_room() -> None:
    decision = decide(FitConfig(), replace(COSTS, free_bytes=COSTS.row_bytes * 100))
    assert not decision.keeps
    assert "only 19 MiB of disk are free" in decision.why
    assert decide(FitConfig(), replace(COSTS, free_bytes=0, missing_rows=0)).keeps
    assert decide(FitConfig(cache="on"), replace(COSTS, seconds=0.0)).keeps


def test_the_reason_has_the_figures() -> None:
    line = str(decide(FitConfig(epochs=7), COSTS))
    assert line.startswith("trunk cache on: 100 rows of 195 KiB, 19 MiB; ")
    assert "40.0 ms an image" in line
    assert "at most 1.0 ms, 7 epochs" in line


@pytest.mark.parametrize(
    ("config", "divergence", "is_split", "why"),
    [
        (FitConfig(cache="off"), "layer4", True, "switched off"),
        (FitConfig(), "layer4", False, "the base cannot be cut at layer4"),
        (FitConfig(augment="crop"), "layer4", True, "augment=crop draws new crops in every epoch; views=8"),
    ],
)
def test_where_there_is_no_choice_the_reason_is_said(
    config: FitConfig, divergence: str, is_split: bool, why: str
) -> None:
    decision = impossible(config, divergence, is_split)
    assert decision is not None
    assert not decision.keeps
    assert why in decision.why


@pytest.mark.parametrize(
    ("config", "divergence"),
    [
        (FitConfig(), "layer4"),
        (FitConfig(augment="flip"), "layer4"),
        (FitConfig(augment="standard", views=4), "layer4"),
        (FitConfig(augment="crop"), None),
    ],
)
def test_elsewhere_there_is_one(config: FitConfig, divergence: str | None) -> None:
    assert impossible(config, divergence, is_split=True) is None


def test_a_sample_has_the_first_images_that_can_be_read(
    base: Base, task: TaskData, task_with_bad_images: TaskData
) -> None:
    assert task.train is not None
    assert task_with_bad_images.train is not None
    assert sample(task.train, base.preprocessing, 5).images.shape == (5, 1, 32, 32)
    assert sample(task.train, base.preprocessing, 5).seconds > 0
    bad = [i for i in range(24) if "bad" in task_with_bad_images.train.names(i)]
    noise = sample(task_with_bad_images.train.subset(bad), base.preprocessing).images
    assert noise.shape == (2, 1, 32, 32)
    assert torch.equal(noise, sample(task_with_bad_images.train.subset(bad), base.preprocessing).images)
