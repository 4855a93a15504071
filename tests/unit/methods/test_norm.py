"""Norm adaptation: scale and shift of every kind of norm, and three ways with the statistics."""

import pytest
import timm
import torch
from torch import nn
from toys import OwnNet, enliven

from deltapatch.base import Base
from deltapatch.errors import AnatomyError, DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods.norm import Norm
from deltapatch.patched import PatchedModel


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    net = OwnNet().eval()
    enliven(net)
    return load_base(net, size=16, name="own")


@pytest.mark.parametrize("statistics", ["kept", "re-estimated", "own"])
@torch.no_grad()
def test_a_new_patch_is_the_base_bit_for_bit(base: Base, statistics: str) -> None:
    model = PatchedModel(base)
    model.add_patch("new", Norm(statistics=statistics).build(base))
    assert torch.equal(model(base.example(), patch="new"), base.module(base.example()))


def test_two_numbers_a_channel_train_and_two_more_are_kept_where_statistics_are_the_patchs(
    base: Base,
) -> None:
    channels = sum(
        module.num_features for module in base.module.modules() if isinstance(module, nn.BatchNorm2d)
    )
    kept, own = Norm().build(base), Norm(statistics="own").build(base)
    assert kept.num_parameters() == own.num_parameters() == 2 * channels
    assert sum(buffer.numel() for buffer in kept.buffers()) == 0
    assert sum(buffer.numel() for buffer in own.buffers()) == 2 * channels


def test_resnet50_has_the_published_count_of_norm_parameters() -> None:
    base = load_base(timm.create_model("resnet50").eval(), size=32)
    assert Norm().build(base).num_parameters() == 53_120


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnetv2_50x1_bit"])
def test_every_kind_of_norm_layer_is_trained(name: str) -> None:
    options = {"img_size": 32} if name.startswith("vit") else {}
    base = load_base(timm.create_model(name, **options).eval(), size=32)
    norms = (nn.LayerNorm, nn.GroupNorm)
    expected = sum(
        parameter.numel()
        for path, module in base.module.named_modules()
        if isinstance(module, norms) and not path.startswith(base.anatomy.head.path or "-")
        for parameter in module.parameters()
    )
    assert Norm().build(base).num_parameters() == expected > 0


def test_own_statistics_follow_the_batches_in_train_mode_and_rest_in_eval_mode(base: Base) -> None:
    patch = Norm(statistics="own").build(base, ("a", "b"))
    first = patch.parts[0]
    before = first.running_mean.clone()
    model = PatchedModel(base)
    model.add_patch("task", patch)
    images = base.example()
    with torch.no_grad():
        model(images, patch="task")
        assert torch.equal(first.running_mean, before)
        patch.train()
        model(images, patch="task")
    own = base.submodule("narrow.0.norm1")
    inputs = base.submodule("narrow.0.conv1")(base.submodule("stem")(images))
    expected = (1 - own.momentum) * before + own.momentum * inputs.mean((0, 2, 3))
    torch.testing.assert_close(first.running_mean, expected)
    assert torch.equal(own.running_mean, before)
    assert own.num_batches_tracked == 0


def test_a_norm_that_averages_over_all_its_batches_follows_with_the_usual_momentum() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, momentum=None)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    base = load_base(net.eval(), size=8)
    patch = Norm(statistics="own").build(base)
    model = PatchedModel(base)
    model.add_patch("task", patch)
    patch.train()
    with torch.no_grad():
        model(base.example(), patch="task")
        expected = 0.1 * net[0](base.example()).mean((0, 2, 3))
    torch.testing.assert_close(patch.parts[0].running_mean, expected)
    assert norm.momentum is None


def test_kept_statistics_stay_those_of_the_base_in_train_mode(base: Base) -> None:
    patch = Norm().build(base, ("a", "b")).train()
    model = PatchedModel(base)
    model.add_patch("task", patch)
    patch.train()
    with torch.no_grad():
        trained = model(base.example(), patch="task")
        patch.eval()
        assert torch.equal(trained, model(base.example(), patch="task"))


def test_frozen_batch_norms_whose_weights_are_buffers_are_trained_too() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    base = load_base(nn.Sequential(net, nn.Linear(4, 2)).eval(), size=8)
    patch = Norm().build(base)
    assert patch.num_parameters() == 8
    with torch.no_grad():
        patch.parts[0].bias.fill_(1)
        model = PatchedModel(base)
        model.add_patch("task", patch)
        images = base.example()
        torch.testing.assert_close(model(images, patch="task"), base.module[1](net(images) + 1))


def test_a_base_without_norms_is_refused() -> None:
    base = load_base(timm.create_model("vgg11", num_classes=2).eval(), size=32)
    with pytest.raises(AnatomyError, match="no normalisation layer"):
        Norm().build(base)


def test_options_that_cannot_be() -> None:
    with pytest.raises(DeltapatchError, match="modules must be 1"):
        Norm(modules=0)
