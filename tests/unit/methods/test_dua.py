"""BatchNormAdapt: the momentum schedule and what it makes of the statistics."""

import math

import pytest
import timm
import torch
from toys import OwnNet, enliven

from deltapatch.base import Base
from deltapatch.errors import AnatomyError, DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods.dua import BatchNormAdapt
from deltapatch.normalising import Gathering


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    net = OwnNet().eval()
    enliven(net)
    return load_base(net, size=16, name="own")


@pytest.mark.parametrize(("step", "weight"), [(1, 0.099), (2, 0.09336), (10, 0.058862), (80, 0.005708)])
def test_the_weight_of_a_step_is_the_published_one(step: int, weight: float) -> None:
    assert BatchNormAdapt().gathering().weight(step, 0, 64) == pytest.approx(weight, abs=5e-7)


def test_after_80_steps_of_one_mean_the_statistics_have_gone_865_thousandths_of_the_way() -> None:
    gathering = BatchNormAdapt().gathering()
    left = math.prod(1 - gathering.weight(step, 0, 64) for step in range(1, 81))
    assert 1 - left == pytest.approx(0.865270, abs=5e-7)


def test_over_all_images_the_weight_makes_a_cumulative_average() -> None:
    gathering = BatchNormAdapt(images="all").gathering()
    assert gathering == Gathering(None, 64, 0.1, 0.94, 0.005)
    mean, seen = 0.0, 0
    for step, (count, value) in enumerate([(4, 1.0), (4, 3.0), (2, 6.0)], start=1):
        weight = gathering.weight(step, seen, count)
        mean, seen = (1 - weight) * mean + weight * value, seen + count
    assert mean == pytest.approx((4 * 1 + 4 * 3 + 2 * 6) / 10)


def test_nothing_of_the_patch_trains_and_two_numbers_a_channel_are_kept(base: Base) -> None:
    patch = BatchNormAdapt().build(base)
    assert patch.num_parameters() == 0
    channels = sum(layer.out_channels for layer in base.anatomy.layers if layer.has_statistics)
    assert sum(buffer.numel() for buffer in patch.buffers()) == 2 * channels


def test_a_base_without_batch_statistics_is_refused() -> None:
    base = load_base(timm.create_model("convnext_atto", num_classes=2).eval(), size=32)
    with pytest.raises(AnatomyError, match="keeps no batch statistics"):
        BatchNormAdapt().build(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images must be 1"),
        ({"copies": 1}, "one has no variance"),
        ({"decay": 1.5}, "decay must be between 0 and 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        BatchNormAdapt(**options)
