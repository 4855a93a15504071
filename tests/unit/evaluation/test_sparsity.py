"""Gains near zero and channels that are dead after them, planted and found again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digits import write_bad_image, write_digits
from toys import OwnNet, enliven, toy_base

from deltapatch.base import Base
from deltapatch.data import ImageSet, open_data, open_images
from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.answers import answer
from deltapatch.evaluation.sparsity import clamped, dead_channels, gain_sparsity
from deltapatch.loading import load_base
from deltapatch.methods.compose import Compose
from deltapatch.methods.head import Head
from deltapatch.methods.norm import Norm
from deltapatch.patch import Patch

CLASSES = tuple("0123456789")
# Of the two units of `narrow` and the three of `wide`: the first ReLU is after norm1, the second at the end.
CHANNELS = (16, 16, 16, 16, 32, 32, 32, 32, 32, 32)


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    return load_base(module, size=32)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    test = open_data(write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", test=12)).test
    assert test is not None
    return test


@pytest.fixture
def patch(base: Base) -> Patch:
    """All gains 1, and shifts at which no channel is dead."""
    patch = Norm().build(base, CLASSES, seed=0)
    with torch.no_grad():
        for part in patch.parts:
            part.weight.fill_(1.0)
            part.bias.fill_(0.5)
    return patch


@torch.no_grad()
def _plant(patch: Patch, layer: str, gains: list[float], shift: float = 0.5) -> None:
    """Puts these in the place of a layer's first gains, and the shift beside them."""
    paths = [site.path for site in patch.sites]
    part = patch.parts[paths.index(layer)]
    part.weight[: len(gains)] = torch.tensor(gains)
    part.bias[: len(gains)] = shift


def test_gains_near_zero_are_counted_layer_by_layer(patch: Patch) -> None:
    assert gain_sparsity(patch).share == 0
    _plant(patch, "narrow.0.norm1", [0.0, 0.009, -0.009, 0.01, -0.5])
    _plant(patch, "wide.2.norm2", [1e-5])
    found = gain_sparsity(patch)
    assert found.small["narrow.0.norm1"] == 3
    assert found.share_of("narrow.0.norm1") == 3 / 16
    assert found.share_of("wide.2.norm2") == 1 / 32
    # 16 channels four times; 32 six times and once in the projection.
    assert found.share == 4 / (4 * 16 + 7 * 32)
    assert gain_sparsity(patch, threshold=0.6).small["narrow.0.norm1"] == 5


def test_the_gains_of_a_composed_patch_are_those_of_its_norms(base: Base, patch: Patch) -> None:
    composed = Compose(("delta:modules=1", "norm")).build(base, CLASSES)
    assert gain_sparsity(composed).channels == gain_sparsity(patch).channels


def test_clamped_gains_are_zero_and_nothing_else_changes(patch: Patch) -> None:
    _plant(patch, "narrow.0.norm1", [0.009, -0.009, 0.02])
    before = {name: tensor.clone() for name, tensor in patch.state_dict().items()}
    copy = clamped(patch)
    changed = {name for name, tensor in copy.state_dict().items() if not torch.equal(tensor, before[name])}
    (name,) = changed
    assert copy.state_dict()[name][:4].tolist() == pytest.approx([0, 0, 0.02, 1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in patch.state_dict().items())


def test_a_clamped_patch_without_gains_near_zero_answers_the_same(
    base: Base, images: ImageSet, patch: Patch
) -> None:
    same = answer(base, images, clamped(patch)).probabilities
    assert np.array_equal(same, answer(base, images, patch).probabilities)
    _plant(patch, "narrow.0.norm1", [0.009] * 16)
    small, zero = (answer(base, images, p).probabilities for p in (patch, clamped(patch)))
    assert not np.array_equal(small, zero)
    np.testing.assert_allclose(small, zero, atol=0.02)


def test_planted_dead_channels_are_found(base: Base, images: ImageSet, patch: Patch) -> None:
    """With γ = 0 a channel is its shift: dead after a ReLU where that is not above 0."""
    before = dead_channels(base, images, patch)
    assert before.channels == CHANNELS
    _plant(patch, "narrow.0.norm1", [0.0] * 5, shift=-1.0)
    _plant(patch, "narrow.1.norm1", [0.0] * 7, shift=0.0)
    _plant(patch, "wide.1.norm1", [0.0] * 9, shift=1.0)
    after = dead_channels(base, images, patch)
    assert before.dead[0] == before.dead[2] == before.dead[6] == 0
    assert (after.dead[0], after.dead[2], after.dead[6]) == (5, 7, 0)
    assert after.share == sum(after.dead) / sum(CHANNELS)


def test_a_channel_is_dead_if_it_is_zero_for_so_large_a_share_of_the_images(tmp_path: Path) -> None:
    """The net's only ReLU gives 1 for the one white image of four, and 0 for the black ones."""
    base = toy_base([torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1, bias=False), torch.nn.ReLU())], width=1)
    torch.nn.init.zeros_(base.module.stem.bias)
    torch.nn.init.ones_(base.module.stem.weight)
    torch.nn.init.ones_(base.module.stage[0][0].weight)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    pixels[2] = 255
    path = tmp_path / "one.npz"
    np.savez(path, train_images=pixels, train_labels=np.array([0, 1, 0, 1]), classes=["a", "b"])
    images = open_data(path, validation=0).train
    assert images is not None
    found = {share: dead_channels(base, images, share=share).dead for share in (0.5, 0.75, 0.76, 1.0)}
    assert found == {0.5: (1,), 0.75: (1,), 0.76: (0,), 1.0: (0,)}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing(base: Base, images: ImageSet, patch: Patch, batch_size: int) -> None:
    _plant(patch, "narrow.0.norm1", [0.0] * 5, shift=-1.0)
    assert dead_channels(base, images, patch, batch_size=batch_size) == dead_channels(base, images, patch)


def test_the_base_is_counted_without_a_patch(base: Base, images: ImageSet) -> None:
    assert dead_channels(base, images).channels == CHANNELS


def test_what_cannot_be_counted_is_refused(base: Base, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(DeltapatchError, match="a head patch has no gains"):
        gain_sparsity(Head().build(base, CLASSES))
    with pytest.raises(DeltapatchError, match=r"not 1\.5"):
        dead_channels(base, images, share=1.5)
    with pytest.raises(DeltapatchError, match="no readable image"):
        dead_channels(base, open_images([write_bad_image(tmp_path / "bad.png")]))
    units = [torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.Tanh()) for _ in range(2)]
    with pytest.raises(DeltapatchError, match="runs no ReLU"):
        dead_channels(toy_base(units), images)
