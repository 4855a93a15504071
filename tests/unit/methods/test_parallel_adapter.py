"""Parallel adapters as one folded convolution, at the base, and where they stand."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from toys import Net, NormUnit, OwnNet, copied_state, disturb, enliven, same_state, toy_base

from deltapatch.base import Base
from deltapatch.errors import AnatomyError, DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods._residual_adapter import Adapter
from deltapatch.methods.parallel_adapter import ParallelAdapter, ParallelPart
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    return load_base(module, size=16)


def _images(seed: int = 1, size: int = 16) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _answers(base: Base, patch: Patch, images: torch.Tensor) -> torch.Tensor:
    """The base's own answers while the patch, which has no head, is active."""
    model = PatchedModel(base)
    model.add_patch("task", patch)
    return model(images, patch="task")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
@torch.no_grad()
def test_a_convolution_and_its_adapter_are_one_with_another_centre_tap(stride: int, size: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, stride, padding=1)
    part = ParallelPart(Adapter(4, 6, (stride, stride), "published", 0.0))
    folded = nn.Conv2d(4, 6, 3, stride, padding=1)
    folded.load_state_dict(layer.state_dict())
    folded.weight[:, :, 1, 1] += part.adapter.weight[:, :, 0, 0]
    x = torch.randn(2, 4, size, size)
    torch.testing.assert_close(part.touch(layer.forward, x), folded(x))


@torch.no_grad()
def test_a_fitted_patch_is_the_base_with_folded_weights_and_the_tasks_norms(base: Base) -> None:
    patch = disturb(ParallelAdapter().build(base, seed=0))
    other = OwnNet().eval()
    other.load_state_dict(copied_state(base.module))
    for site, part in zip(patch.sites, patch.parts, strict=True):
        layer = other.get_submodule(site.path)
        if site.kind == "convolution":
            layer.weight[:, :, 1, 1] += part.adapter.weight[:, :, 0, 0]
        else:
            layer.load_state_dict(part.state_dict(), strict=False)
    images = _images()
    torch.testing.assert_close(_answers(base, patch, images), other(images))


@pytest.mark.parametrize("statistics", ["own", "kept"])
def test_a_new_patch_answers_as_the_base_bit_for_bit(base: Base, statistics: str) -> None:
    images = _images()
    patch = ParallelAdapter(statistics=statistics).build(base)
    assert torch.equal(_answers(base, patch, images), base.module(images))


def test_the_published_start_is_normal_with_variance_two_over_the_outputs() -> None:
    torch.manual_seed(0)
    weight = Adapter(300, 200, (1, 1), "published", 0.0).weight.detach()
    assert float(weight.std()) == pytest.approx((2 / 200) ** 0.5, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=0.002)


def test_each_3x3_convolution_has_an_adapter_of_a_ninth_of_it_and_each_norm_its_own_values(
    base: Base,
) -> None:
    patch = ParallelAdapter().build(base)
    convolutions = [m for m in base.module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    norms = [m for m in base.module.modules() if isinstance(m, nn.BatchNorm2d)]
    counted = sum(m.weight.numel() // 9 for m in convolutions) + sum(2 * m.num_features for m in norms)
    assert patch.num_parameters() == counted
    assert [site.path for site in patch.sites][:4] == [
        "stem",
        "narrow.0.conv1",
        "narrow.0.norm1",
        "narrow.0.conv2",
    ]


def test_modules_counts_stages_from_the_last(base: Base) -> None:
    paths = [site.path for site in ParallelAdapter(modules=1).sites(base.anatomy)]
    assert paths[0] == "wide.0.conv1"
    assert all(path.startswith("wide.") for path in paths)


def test_a_convolution_that_loses_the_maps_border_has_no_adapter() -> None:
    base = toy_base([NormUnit(4, 4), NormUnit(4, 4)])
    assert ParallelAdapter().sites(base.anatomy)[0].path == "stem"
    net = Net([NormUnit(4, 4), NormUnit(4, 4)], 4)
    net.stem = nn.Conv2d(3, 4, 3)
    sites = ParallelAdapter().sites(load_base(net.eval(), size=8).anatomy)
    assert sites[0].path == "stage.0.conv1"


def test_own_statistics_follow_the_task_in_train_mode_and_kept_ones_stay(base: Base) -> None:
    before = copied_state(base.module)
    for statistics, moves in (("own", True), ("kept", False)):
        patch = ParallelAdapter(statistics=statistics).build(base, ("a", "b"))
        buffers = {name: buffer.clone() for name, buffer in patch.named_buffers()}
        model = PatchedModel(base)
        model.add_patch("task", patch)
        model.train()
        model(_images(), patch="task")
        assert any(not torch.equal(buffer, buffers[name]) for name, buffer in patch.named_buffers()) == moves
    assert same_state(base.module, before)


def test_dropout_takes_whole_channels_of_the_adapters_input_in_train_mode_only() -> None:
    torch.manual_seed(0)
    adapter = Adapter(64, 64, (1, 1), "zero", 0.5)
    with torch.no_grad():
        adapter.weight.copy_(torch.eye(64).view(64, 64, 1, 1))
    x = torch.ones(1, 64, 3, 3)
    assert torch.equal(adapter.eval()(x), x)
    kept = adapter.train()(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert all(len(channel.unique()) == 1 for channel in kept[0])


def test_an_adapter_of_a_depthwise_convolution_joins_its_channels() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, 2, padding=1, groups=4)
    part = ParallelPart(Adapter(4, 4, (2, 2), "published", 0.0))
    x = torch.randn(2, 4, 7, 7)
    expected = layer(x) + functional.conv2d(x[:, :, ::2, ::2], part.adapter.weight)
    torch.testing.assert_close(part.touch(layer.forward, x), expected)


def test_a_base_without_such_a_convolution_is_refused_with_what_it_has() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1))
    bases = [load_base(module.to_empty(device="cpu").eval(), size=32) for module in (vit, convnext)]
    for base in bases:
        with torch.no_grad():
            for parameter in base.module.parameters():
                parameter.fill_(0.01)
    with pytest.raises(AnatomyError, match=r"no 3x3 convolution.*lora"):
        ParallelAdapter().sites(bases[0].anatomy)
    with pytest.raises(AnatomyError, match=r"no 3x3 convolution.*kernel_size=7 adapts"):
        ParallelAdapter().sites(bases[1].anatomy)
    assert ParallelAdapter(kernel_size=7).build(bases[1]).sites


def test_a_base_in_half_precision_computes_in_half_precision() -> None:
    base = toy_base([NormUnit(4, 4), NormUnit(4, 4)])
    base.module.bfloat16()
    images = _images(size=8).bfloat16()
    patch = ParallelAdapter().build(base)
    assert torch.equal(_answers(base, patch, images), base.module(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": 0}, "modules must be 1 or more"),
        ({"kernel_size": 0}, "kernel_size must be 1 or more"),
        ({"dropout": 1.0}, "dropout must be 0 or more and below 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        ParallelAdapter(**options)
