"""Transferability by parameter distance: closed forms, the source's groups, and what is refused."""

import csv
from importlib.resources import files

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from deltapatch.selection.diagnosing.parameter_distance import (
    ESTIMATED,
    ParameterDistance,
    parameter_distance,
    random_start,
)
from deltapatch.selection.score import SelectionError


class Two(nn.Module):
    """A convolution, a norm, a linear layer and a classifier."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.middle = nn.Linear(2, 3)
        self.fc = nn.Linear(3, classes)


@torch.no_grad()
def filled(value: dict[str, float], classes: int = 2) -> Two:
    """A model whose weights have one value a layer."""
    model = Two(classes)
    for name, number in value.items():
        model.get_submodule(name).weight.fill_(number)  # pyright: ignore
    return model


def three(classes: int = 2) -> tuple[Two, Two, Two]:
    """θ_r, θ_A, θ_B with D(r, B) = (1.5, 3) and D(A, B) = (0.5, 2)."""
    return (
        filled({"conv": 2.5, "middle": -2.0, "fc": 0.0}),
        filled({"conv": 1.5, "middle": 3.0, "fc": 1.0}),
        filled({"conv": 1.0, "middle": 1.0, "fc": 2.0}, classes),
    )


def by_name(found: ParameterDistance) -> dict[str, float]:
    return {layer.name: layer.transferability for layer in found.layers}


def test_two_layers_in_closed_form() -> None:
    found = parameter_distance(*three())
    assert [(layer.from_random, layer.from_pretrained) for layer in found.layers] == [(1.5, 0.5), (3.0, 2.0)]
    assert by_name(found) == {"conv": 3.0, "middle": 1.5}
    assert found.transferability == 2.25
    assert found.classifier is not None
    assert (found.classifier.name, found.classifier.transferability) == ("fc", 2.0)
    assert not found.is_estimate
    assert found.warnings == ()


@pytest.mark.parametrize("scale", [1e-3, -7.0])
def test_scaling_all_three_changes_nothing(scale: float) -> None:
    scaled = [{name: tensor * scale for name, tensor in m.state_dict().items()} for m in three()]
    found = parameter_distance(*scaled)
    assert found.transferability == pytest.approx(2.25, rel=1e-6)
    assert "every weight of two or more dimensions counts" in found.warnings[0]


def test_pre_training_that_changed_nothing_gives_1() -> None:
    start, _, tuned = three()
    assert parameter_distance(start, start, tuned).transferability == 1


def test_frozen_layers_stand_apart_and_are_in_no_mean() -> None:
    start, pretrained, tuned = three()
    tuned.conv.load_state_dict(pretrained.conv.state_dict())
    found = parameter_distance(start, pretrained, tuned)
    assert by_name(found) == {"middle": 1.5}
    assert found.transferability == 1.5
    assert [layer.name for layer in found.frozen] == ["conv"]
    assert found.frozen[0].transferability == float("inf")


def test_a_classifier_for_other_classes_is_not_compared() -> None:
    found = parameter_distance(*three(classes=5))
    assert found.transferability == 2.25
    assert found.classifier is None
    assert found.warnings == (
        "the classifier 'fc' is not of one shape in the three models and is not compared",
    )


def test_the_classifier_can_be_named_or_said_to_be_missing() -> None:
    assert parameter_distance(*three(), classifier="middle").transferability == pytest.approx((3 + 2) / 2)
    assert parameter_distance(*three(), classifier="").transferability == pytest.approx((3 + 1.5 + 2) / 3)
    with pytest.raises(SelectionError, match=r"there is no layer 'head' to leave out .*the last is 'fc'"):
        parameter_distance(*three(), classifier="head")


def test_a_model_that_ends_in_a_convolution_has_to_name_its_classifier() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 2, 1))
    other = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 2, 1))
    with pytest.raises(SelectionError, match="the last layer, '1', is not linear"):
        parameter_distance(None, model, other)
    assert len(parameter_distance(None, model, other, classifier="1").layers) == 1


def resnet50_like(values: list[float]) -> dict[str, Tensor]:
    """Names of torchvision's ResNet-50, each weight of few entries with the value of its group of 18."""
    with torch.device("meta"):
        state = resnet50().state_dict()
    blocks = [f"layer{stage}.{block}" for stage, n in enumerate((3, 4, 6, 3), 1) for block in range(n)]
    groups = ["conv1", *blocks, "fc"]
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        group = next(i for i, g in enumerate([*groups, ""]) if name.startswith(f"{g}.") or not g)
        value = values[group] if group < len(groups) else 0.0
        # A shortcut of another value than its block would show in the mean if it were taken.
        made[name] = torch.full((1,) * tensor.ndim, 1000.0 if "downsample" in name else value)
    return made


def test_the_worked_example_of_a_resnet50_on_cifar10() -> None:
    table = files("deltapatch.selection") / "tables" / "paramdist_layerwise_resnet50_cifar10.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    wanted = [float(row["transferability"]) for row in rows]
    assert len(wanted) == 18
    tuned = {name: torch.zeros_like(tensor) for name, tensor in resnet50_like([0.0] * 18).items()}
    found = parameter_distance(resnet50_like(wanted), resnet50_like([1.0] * 18), tuned, select="name")
    assert len(found.layers) == 17
    assert [layer.transferability for layer in found.layers] == pytest.approx(wanted[:17])
    assert found.transferability == pytest.approx(7.785, abs=5e-4)
    assert found.classifier is not None
    assert found.classifier.name == "fc"
    assert found.layers[1].tensors == tuple(f"layer1.0.conv{i}.weight" for i in (1, 2, 3))


def test_by_type_the_shortcuts_of_a_resnet50_count_too() -> None:
    names = resnet50_like([0.0] * 18)
    with torch.device("meta"):
        model = resnet50()
    start, tuned = (
        {name: torch.full((1,) * t.ndim, value) for name, t in names.items()} for value in (3.0, 1.0)
    )
    found = parameter_distance(start, names, tuned | {"fc.weight": torch.ones(2, 2)}, select="type")
    assert len(found.layers) == 53
    # The module's own list of convolutions and linear layers is the same.
    weights = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [layer.name for layer in found.layers] == weights[:-1]


def test_layers_of_a_block_have_equal_weight_whatever_their_size() -> None:
    def block(one: float, other: float) -> dict[str, Tensor]:
        return {
            "a.conv1.weight": torch.full((1, 1, 1, 1), one),
            "a.conv2.weight": torch.full((8, 8, 3, 3), other),
            "fc.weight": torch.ones(1, 1) * one,
        }

    found = parameter_distance(block(4, 2), block(1, 3), block(0, 0), select="name")
    assert by_name(found) == {"a": pytest.approx((4 + 2) / (1 + 3))}


def test_projections_inside_torchs_attention_are_layers() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8), nn.Linear(4, 2))

    found = parameter_distance(None, model(), model())
    assert [layer.name for layer in found.layers] == [
        "0.self_attn.in_proj",
        "0.self_attn.out_proj",
        "0.linear1",
        "0.linear2",
    ]


def test_an_estimated_start_says_so_and_is_the_same_for_a_seed() -> None:
    _, pretrained, tuned = three()
    before = torch.random.get_rng_state()
    found = parameter_distance(None, pretrained, tuned, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found == parameter_distance(None, pretrained, tuned, seed=3)
    assert found != parameter_distance(None, pretrained, tuned, seed=4)
    assert found.is_estimate
    assert found.warnings == (ESTIMATED,)


def test_a_random_start_is_what_the_layers_draw_and_leaves_the_module_alone() -> None:
    model = three()[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = random_start(model, seed=1)
    assert set(start) == {name for name, _ in model.named_parameters()}
    torch.manual_seed(1)
    fresh = Two()
    assert all(torch.equal(start[name], tensor) for name, tensor in fresh.named_parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_that_cannot_be_drawn_are_left_out_and_named() -> None:
    class Own(nn.Linear):
        reset_parameters = None  # pyright: ignore

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.weight = nn.Parameter(torch.rand(2, 2))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()
            self.middle = nn.Linear(2, 2)
            self.fc = nn.Linear(2, 2)

    found = parameter_distance(None, Plain(), Plain())
    assert [layer.name for layer in found.layers] == ["middle"]
    assert found.warnings[1] == "weights that no random start can be drawn for are left out: 1, such as 'own'"


def test_what_cannot_be_compared_is_refused() -> None:
    start, pretrained, tuned = three()
    state = pretrained.state_dict()
    with pytest.raises(SelectionError, match="are equal in every convolution and linear layer"):
        parameter_distance(start, pretrained, pretrained)
    with pytest.raises(SelectionError, match="the fine-tuned weights are the random ones"):
        parameter_distance(tuned, pretrained, tuned, classifier="")
    with pytest.raises(SelectionError, match=r"the fine-tuned weights have no tensor 'conv.weight'"):
        parameter_distance(start, pretrained, {n: t for n, t in state.items() if n != "conv.weight"})
    with pytest.raises(SelectionError, match=r"'middle.weight' has shape \(1, 2\) in the random weights"):
        parameter_distance(state | {"middle.weight": torch.ones(1, 2)}, pretrained, tuned)
    with pytest.raises(SelectionError, match=r"'conv.weight' holds NaN or infinite numbers"):
        parameter_distance(
            start, pretrained, tuned.state_dict() | {"conv.weight": state["conv.weight"] * torch.nan}
        )
    with pytest.raises(SelectionError, match="can be estimated for a module only"):
        parameter_distance(None, state, tuned)
    with pytest.raises(SelectionError, match="no convolution or linear layer to compare"):
        parameter_distance(None, nn.BatchNorm2d(2), nn.BatchNorm2d(2))


def test_inputs_are_left_as_they_are() -> None:
    models = three()
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    parameter_distance(*models)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
