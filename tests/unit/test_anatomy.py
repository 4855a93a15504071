"""Stages, joins and classifier of networks written in every way that is in use."""

from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import squeezenet1_1
from toys import Net, NormUnit, Unit

from deltapatch.anatomy import Anatomy, HeadSite
from deltapatch.errors import AnatomyError
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patched import PatchedModel


def _anatomy(module: nn.Module, size: int = 8) -> Anatomy:
    return load_base(module.eval(), size=size).anatomy


def _of_units(*units: nn.Module, width: int = 4, features: int | None = None) -> Anatomy:
    torch.manual_seed(0)
    return _anatomy(Net(units, width, features))


def _sub_blocks(anatomy: Anatomy) -> list[list[str]]:
    return [[sub_block.path for sub_block in stage.sub_blocks] for stage in anatomy.stages]


# --- known families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sub_blocks", "skips"),
    [
        ("resnet18", [2, 2, 2, 2], [3, 3, 3, 3]),
        ("resnet50", [3, 4, 6, 3], [6, 10, 21, 6]),
        ("convnext_tiny", [3, 3, 9, 3], [6, 6, 45, 6]),
    ],
)
def test_a_stage_of_n_sub_blocks_has_n_times_n_plus_1_half_skips(
    name: str, sub_blocks: list[int], skips: list[int]
) -> None:
    anatomy = load_base(f"timm/{name}", weights="random", size=64).anatomy
    assert [len(stage.sub_blocks) for stage in anatomy.stages] == sub_blocks
    assert [stage.skips for stage in anatomy.stages] == skips


def test_resnet_stages_are_projected_by_the_first_shortcut() -> None:
    stages = load_base("timm/resnet50", weights="random", size=64).anatomy.stages
    assert [stage.path for stage in stages] == ["layer1", "layer2", "layer3", "layer4"]
    assert [(stage.in_channels, stage.channels) for stage in stages] == [
        (64, 256),
        (256, 512),
        (512, 1024),
        (1024, 2048),
    ]
    assert all(stage.projects for stage in stages)
    assert all(sub_block.join.addition is not None for stage in stages for sub_block in stage.sub_blocks)


def test_vision_transformer_blocks_are_one_stage_of_tokens() -> None:
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    (stage,) = _anatomy(module, size=32).stages
    assert (stage.path, len(stage.sub_blocks), stage.layout, stage.projects) == ("blocks", 3, "NLC", False)
    assert all(sub_block.join.has_shortcut for sub_block in stage.sub_blocks)


def test_channels_last_maps_are_told_from_tokens() -> None:
    torch.manual_seed(0)
    module = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(2, 2))
    assert [stage.layout for stage in _anatomy(module, size=64).stages] == ["NHWC", "NHWC"]


# --- ways to write a residual unit ------------------------------------------------------------------------


class Written(nn.Module):
    """A residual unit whose forward is any function of the branch and the input."""

    def __init__(
        self, forward: Callable[["Written", Tensor], Tensor], stride: int = 1, outputs: int = 4
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(4, outputs, 3, stride, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.norm = nn.BatchNorm2d(4)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def _functional_relu(unit: Written, x: Tensor) -> Tensor:
    return functional.relu(unit.branch(x) + x)


def _out_plus_equals(unit: Written, x: Tensor) -> Tensor:
    out = unit.branch(x)
    out += x
    return functional.relu(out, inplace=True)


def _torch_add(unit: Written, x: Tensor) -> Tensor:
    return torch.relu(torch.add(x, unit.branch(x)))


def _pre_activation(unit: Written, x: Tensor) -> Tensor:
    return x + unit.branch(functional.relu(unit.norm(x)))


def _in_place_on_the_input(unit: Written, x: Tensor) -> Tensor:
    return x.add_(unit.branch(x))


@pytest.mark.parametrize(
    ("written", "shortcut", "overwrites"),
    [
        (_functional_relu, 1, False),
        (_out_plus_equals, 1, False),
        (_torch_add, 0, False),
        (_pre_activation, 0, False),
        (_in_place_on_the_input, 0, True),
    ],
)
def test_a_residual_unit_is_read_however_it_is_written(
    written: Callable[[Written, Tensor], Tensor], shortcut: int, overwrites: bool
) -> None:
    anatomy = _of_units(Written(written), Written(written), Written(written))
    assert _sub_blocks(anatomy) == [["stage.0", "stage.1", "stage.2"]]
    (stage,) = anatomy.stages
    for sub_block in stage.sub_blocks:
        assert sub_block.join.has_shortcut
        assert sub_block.join.addition == 0
        assert sub_block.join.shortcut == shortcut
        assert sub_block.overwrites_input == overwrites


class PaddedUnit(nn.Module):
    """The unit of the CIFAR ResNet: a shortcut without weights, subsampled and padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, 2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(functional.relu(self.conv1(x)))
        out += functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return functional.relu(out)


def test_a_zero_padded_shortcut_projects() -> None:
    anatomy = _of_units(PaddedUnit(), NormUnit(8, 8), features=8)
    (stage,) = anatomy.stages
    assert (stage.in_channels, stage.channels, stage.projects) == (4, 8, True)
    assert [sub_block.join.addition for sub_block in stage.sub_blocks] == [0, 0]


class PostNormLayer(nn.Module):
    """A transformer layer that normalises after each addition, so that no addition is its last step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.mlp(x))


class Tokens(nn.Module):
    """Patches, some layers on tokens, and a classifier on their mean."""

    def __init__(self, layers: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_post_norm_layers_join_at_their_output() -> None:
    torch.manual_seed(0)
    (stage,) = _anatomy(Tokens([PostNormLayer(8), PostNormLayer(8)], 8)).stages
    assert stage.layout == "NLC"
    assert [sub_block.join.addition for sub_block in stage.sub_blocks] == [None, None]
    assert [sub_block.join.has_shortcut for sub_block in stage.sub_blocks] == [False, False]


def test_plain_convolutions_in_a_row_are_a_stage_without_shortcuts() -> None:
    units = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
    (stage,) = _of_units(*units).stages
    assert [sub_block.join.has_shortcut for sub_block in stage.sub_blocks] == [False, False, False]
    assert not stage.projects


def test_one_residual_unit_is_a_stage() -> None:
    (stage,) = _of_units(Unit(4)).stages
    assert (len(stage.sub_blocks), stage.skips) == (1, 1)


def test_a_change_of_width_begins_a_new_stage() -> None:
    anatomy = _of_units(Unit(4), Unit(4), Unit(4, 8), Unit(8), features=8)
    assert _sub_blocks(anatomy) == [["stage.0", "stage.1"], ["stage.2", "stage.3"]]
    assert [stage.path for stage in anatomy.stages] == ["stage.0-1", "stage.2-3"]
    assert [stage.projects for stage in anatomy.stages] == [False, True]


# --- what cannot be a stage -------------------------------------------------------------------------------


class Twice(nn.Module):
    """One unit that runs twice: what it should compute the second time, a patch could not say."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.unit = Unit(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.unit(self.unit(self.stem(x))).mean((2, 3)))


def test_a_module_that_is_called_twice_is_no_sub_block() -> None:
    torch.manual_seed(0)
    assert _anatomy(Twice()).stages == ()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) + torch.rand(5)


def test_a_model_that_is_not_deterministic_is_refused() -> None:
    with pytest.raises(AnatomyError, match="Noisy gave two different answers to one input in eval mode"):
        _anatomy(Noisy())


def test_a_model_that_fails_on_its_own_input_size_is_refused_with_the_reason() -> None:
    with pytest.raises(
        AnatomyError, match=r"Linear failed on an input of shape \(2, 3, 8, 8\): .*mat1 and mat2"
    ):
        _anatomy(nn.Linear(5, 2))


class WithoutTensor(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


def test_a_model_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(AnatomyError, match="returned no tensor"):
        _anatomy(WithoutTensor())


def test_a_model_without_stages_takes_a_head_and_refuses_delta_with_the_reason() -> None:
    torch.manual_seed(0)
    base = load_base(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 7), nn.ReLU(), nn.Linear(7, 5)), size=8)
    assert base.anatomy.stages == ()
    with pytest.raises(
        AnatomyError, match=r"no stage was found in this base: .* the head method works on any base"
    ):
        Delta().build(base, ("a", "b"))
    model = PatchedModel(base)
    model.add_patch("task", Head().build(base, ("a", "b")))
    assert model(torch.zeros(2, 3, 8, 8), patch="task").shape == (2, 2)


def test_more_stages_than_there_are_cannot_be_asked_for() -> None:
    anatomy = _of_units(Unit(4), Unit(4))
    assert anatomy.last_stages("all") == anatomy.last_stages(1) == anatomy.stages
    with pytest.raises(AnatomyError, match=r"modules=2 asks for 2 stages, but this base has 1 \(stage\)"):
        anatomy.last_stages(2)


def test_finding_an_anatomy_leaves_the_callers_model_as_it_was() -> None:
    module = Net([NormUnit(4, 4), NormUnit(4, 4)], 4).train()
    mean = module.stage[0].norm1.running_mean.clone()
    assert load_base(module, size=8).anatomy.stages
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(module.stage[0].norm1.running_mean, mean)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# --- classifier -------------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """A distilled transformer's way: two classifiers, averaged where it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6))
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return (self.first(features) + self.second(features)) / 2


class Features(nn.Module):
    """A body that returns what it is asked for, as detectors' backbones and num_classes=0 models do."""

    def __init__(self, output: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output(self.body(x))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Net([Unit(4)], 4), HeadSite("fc", 4, "NC")),
        (TwoHeads(), HeadSite("first", 6, "NC")),
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), HeadSite("0", 3, "NCHW")),
        (Features(lambda maps: maps.mean((2, 3))), HeadSite(None, 6, "NC")),
        (Features(lambda maps: maps), HeadSite(None, 6, "NCHW")),
        (Features(lambda maps: maps.flatten(2).transpose(1, 2)), HeadSite(None, 6, "NLC")),
        (Features(lambda maps: {"low": maps[:, :2], "high": maps}), HeadSite(None, 6, "NCHW")),
        (Features(lambda maps: (maps, maps.mean((2, 3)))), HeadSite(None, 6, "NC")),
    ],
)
def test_the_head_reads_what_the_last_weights_read_or_else_the_output(
    module: nn.Module, expected: HeadSite
) -> None:
    assert _anatomy(module).head == expected


def test_an_output_of_five_dimensions_has_no_place_for_a_head() -> None:
    with pytest.raises(AnatomyError, match=r"output has shape \(2, 6, 8, 8, 1\); a head needs 2, 3 or 4"):
        _anatomy(Features(lambda maps: maps[..., None]))


def test_squeezenets_classifier_is_its_last_convolution() -> None:
    torch.manual_seed(0)
    base = load_base(squeezenet1_1(weights=None), size=64)
    assert base.anatomy.head == HeadSite("classifier.1", 512, "NCHW")
    model = PatchedModel(base)
    model.add_patch("task", Head().build(base, ("a", "b"), seed=0))
    features: list[Tensor] = []
    handle = base.submodule("classifier.1").register_forward_pre_hook(
        lambda _, args: features.append(args[0])
    )
    logits = model(base.example(), patch="task")
    handle.remove()
    torch.testing.assert_close(logits, model.patches["task"].head(features[0].mean((2, 3))))


@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 512), ("mobilenetv2_100", 1280), ("mobilenetv3_small_100", 1024)]
)
def test_a_model_without_classifier_gets_a_head_on_its_pooled_output(name: str, features: int) -> None:
    torch.manual_seed(0)
    base = load_base(timm.create_model(name, num_classes=0), size=64)
    assert base.anatomy.head == HeadSite(None, features, "NC")
    model = PatchedModel(base)
    model.add_patch("task", Head().build(base, ("a", "b", "c")))
    expected = model.patches["task"].head(model(base.example()))
    assert torch.equal(model(base.example(), patch="task"), expected)
