"""Series adapters as one composed convolution, at the base, and their parameters counted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import OwnNet, copied_state, disturb, enliven, same_state

from deltapatch.base import Base
from deltapatch.loading import load_base
from deltapatch.methods._residual_adapter import Adapter
from deltapatch.methods.series_adapter import SeriesAdapter, SeriesPart
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    return load_base(module, size=16)


def _images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _answers(base: Base, patch: Patch, images: Tensor) -> Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    return model(images, patch="task")


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_with_an_identity_norm_a_convolution_and_its_adapter_are_one_with_weight_i_plus_a_times_w(
    stride: int,
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride, padding=1, bias=False)
    part = SeriesPart(nn.BatchNorm2d(6, eps=0.0), Adapter(6, 6, (1, 1), "published", 0.0)).eval()
    composed = torch.einsum("oi,ichw->ochw", torch.eye(6) + part.adapter.weight[:, :, 0, 0], layer.weight)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(
        part.touch(layer.forward, x), functional.conv2d(x, composed, stride=stride, padding=1)
    )


@torch.no_grad()
def test_the_adapter_reads_what_its_own_norm_gives() -> None:
    """u = z + A BN(z), with numbers that can be followed by hand."""
    part = SeriesPart(nn.BatchNorm2d(1, eps=0.0), Adapter(1, 1, (1, 1), "zero", 0.0)).eval()
    part.norm.running_mean.fill_(2.0)
    part.norm.running_var.fill_(4.0)
    part.norm.weight.fill_(3.0)
    part.norm.bias.fill_(1.0)
    part.adapter.weight.fill_(0.5)
    z = torch.tensor([6.0]).view(1, 1, 1, 1)
    # BN(6) = 3 (6 - 2) / 2 + 1 = 7, and 6 + 7 / 2 = 9.5.
    assert float(part.adapted(z, z)) == 9.5


def test_a_new_patch_answers_as_the_base_bit_for_bit(base: Base) -> None:
    images = _images()
    for statistics in ("own", "kept"):
        patch = SeriesAdapter(statistics=statistics).build(base)
        assert torch.equal(_answers(base, patch, images), base.module(images))


def test_the_published_start_is_not_the_base(base: Base) -> None:
    images = _images()
    patch = SeriesAdapter(init="published").build(base, seed=0)
    assert not torch.allclose(_answers(base, patch, images), base.module(images), atol=1e-3)


def test_each_3x3_convolution_has_a_square_adapter_with_two_norm_vectors(base: Base) -> None:
    outputs = [
        m.out_channels for m in base.module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    norms = [m.num_features for m in base.module.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = sum(width * width + 2 * width for width in outputs) + 2 * sum(norms)
    assert SeriesAdapter().build(base).num_parameters() == expected


def test_both_norms_follow_the_task_in_train_mode_and_the_base_stays(base: Base) -> None:
    before = copied_state(base.module)
    patch = SeriesAdapter().build(base, ("a", "b"))
    buffers = {name: buffer.clone() for name, buffer in patch.named_buffers()}
    model = PatchedModel(base)
    model.add_patch("task", patch)
    model.train()
    model(_images(), patch="task")
    still = [name for name, buffer in patch.named_buffers() if torch.equal(buffer, buffers[name])]
    assert still == []
    assert same_state(base.module, before)


def test_the_adapters_own_norm_is_in_the_patch_and_loads_again(base: Base, tmp_path: Path) -> None:
    patch = disturb(SeriesAdapter(modules=1).build(base, seed=0))
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    images = _images()
    assert torch.equal(_answers(base, loaded, images), _answers(base, patch, images))
