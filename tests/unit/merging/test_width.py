"""Feature merging: duplicates leave the outputs as they are, and what is not known to be safe stays."""

from collections.abc import Callable, Iterable
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from toys import OwnNet, copied_state, enliven, same_state

from deltapatch.merging import MergeError, merge_features
from deltapatch.merging.width import merge_closest, squared_distances

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def chain(activation: Callable[[], nn.Module] = nn.ReLU, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, bias=False),
        nn.BatchNorm2d(width),
        activation(),
        nn.Flatten(),
        nn.Linear(4 * width, 9),
        activation(),
        nn.Linear(9, 5),
    ).eval()
    enliven(module)
    return module


@torch.no_grad()
def duplicate(
    module: nn.Module,
    copies: Iterable[int],
    makes: Iterable[str],
    scales: Iterable[str] = (),
    takes: Iterable[str] = (),
    repeat: int = 1,
) -> None:
    """Makes the given channels copies of channel 0 in every tensor that has them."""
    for number in copies:
        for layer in (*makes, *scales):
            for name, tensor in module.get_submodule(layer).state_dict().items():
                if name != "num_batches_tracked":
                    tensor[number] = tensor[0]
        for layer in takes:
            weight = module.get_submodule(layer).weight
            by_channel = weight.unflatten(1, (-1, repeat))
            by_channel[:, number] = by_channel[:, 0]


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return deepcopy(module).eval()(IMAGES)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid])
@pytest.mark.parametrize("copies", [[4], [2, 5]])
def test_duplicates_are_merged_and_the_outputs_stay(
    activation: Callable[[], nn.Module], copies: list[int]
) -> None:
    """With batch norm, behind a flattening, and for activations that are not homogeneous."""
    module = chain(activation)
    duplicate(module, copies, ["0"], ["1"], ["4"])
    duplicate(module, copies, ["4"], ["5"], ["8"], repeat=4)
    duplicate(module, copies, ["8"], takes=["10"])
    narrow, report = merge_features(module, IMAGES[:1], beta=0)
    left = 6 - len(copies)
    assert report.complexity == {"0": left, "4": left, "8": 9 - len(copies)}
    torch.testing.assert_close(outputs(narrow), outputs(module), rtol=1e-4, atol=1e-5)


def test_a_merged_norm_keeps_its_variance_and_the_next_layer_takes_the_sum() -> None:
    """Summed variances would make the norm's outputs too large by the root of two."""
    module = chain()
    duplicate(module, [3], ["0"], ["1"], ["4"])
    narrow, _ = merge_features(module, IMAGES[:1], beta=0)
    for name in ("running_var", "running_mean", "weight", "bias"):
        assert getattr(narrow[1], name)[0] == getattr(module[1], name)[0]
    assert torch.equal(narrow[0].weight[0], module[0].weight[0])
    assert torch.equal(narrow[4].weight[:, 0], 2 * module[4].weight[:, 0])


def test_a_residual_stream_is_merged_in_all_its_blocks() -> None:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    norms = ["narrow.0.norm2", "narrow.1.norm2"]
    takes = ["narrow.0.conv1", "narrow.1.conv1", "wide.0.conv1", "wide.0.project.0"]
    duplicate(module, [5, 9], ["stem", "narrow.0.conv2", "narrow.1.conv2"], norms, takes)
    duplicate(module, [1], ["wide.1.conv1"], ["wide.1.norm1"], ["wide.1.conv2"])
    narrow, report = merge_features(module, IMAGES[:1], beta=0)
    torch.testing.assert_close(outputs(narrow), outputs(module), rtol=1e-4, atol=1e-5)
    stream = next(group for group in report.groups if "stem" in group.layers)
    assert stream.layers == ("stem", "narrow.0.conv2", "narrow.1.conv2")
    assert (stream.channels, stream.left) == (16, 14)
    assert report.complexity["wide.1.conv1"] == 31
    assert report.complexity["wide.2.conv1"] == 32
    assert report.skipped == {"classifier": "they are the network's output"}


def test_hidden_features_of_tokens_are_merged() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(2), nn.Linear(64, 12), nn.GELU(), nn.Linear(12, 7)).eval()
    duplicate(module, [3, 4, 8], ["1"], takes=["3"])
    narrow, report = merge_features(module, IMAGES[:1], beta=0)
    assert report.complexity == {"1": 9}
    torch.testing.assert_close(outputs(narrow), outputs(module))


class Gated(nn.Module):
    """A squeeze-and-excitation unit in functions, with a norm that computes with its own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = OwnNorm(8)
        self.squeeze = nn.Conv2d(8, 6, 1)
        self.excite = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(self.norm(self.conv(x)), 2)
        gate = self.squeeze(x.mean((2, 3), keepdim=True)).relu_()
        x = x * torch.sigmoid(self.excite(gate))
        x = torch.nn.functional.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )


def test_gates_and_functions_are_followed() -> None:
    torch.manual_seed(0)
    module = Gated().eval()
    enliven(module)
    duplicate(module, [2, 7], ["conv", "excite"], ["norm"], ["squeeze", "fc"])
    duplicate(module, [4], ["squeeze"], takes=["excite"])
    narrow, report = merge_features(module, IMAGES[:1], beta=0)
    assert report.complexity == {"conv": 6, "excite": 6, "squeeze": 5}
    assert narrow.norm.num_features == 6
    torch.testing.assert_close(outputs(narrow), outputs(module), rtol=1e-4, atol=1e-5)


def test_distinct_channels_are_not_merged_at_zero_and_no_bit_changes() -> None:
    module = chain()
    narrow, report = merge_features(module, IMAGES[:1], beta=0)
    assert report.complexity == {"0": 6, "4": 6, "8": 9}
    assert same_state(narrow, copied_state(module))
    assert report.parameters == report.parameters_left


def test_the_result_is_a_narrower_network_and_the_given_one_stays() -> None:
    module = chain().train()
    module[0].weight.requires_grad_(False)
    before = copied_state(module)
    narrow, report = merge_features(module, IMAGES[:1], beta=1, max_ratio=0.5)
    assert same_state(module, before)
    assert report.complexity == {"0": 3, "4": 3, "8": 5}
    assert all(one.training for one in narrow.modules())
    assert [parameter.requires_grad for parameter in narrow.parameters()] == [False, *[True] * 10]
    assert report.parameters_left == sum(parameter.numel() for parameter in narrow.parameters())
    assert report.parameters_left < report.parameters
    assert (narrow[4].in_channels, narrow[4].out_channels, narrow[5].num_features) == (3, 3, 3)
    assert (narrow[8].in_features, narrow[8].out_features, narrow[10].in_features) == (12, 5, 5)
    fresh = chain(width=3)
    fresh[8], fresh[10] = nn.Linear(12, 5), nn.Linear(5, 5)
    fresh.load_state_dict(narrow.state_dict())
    assert torch.equal(outputs(fresh), outputs(narrow))


def test_one_channel_is_always_left() -> None:
    narrow, report = merge_features(chain(), IMAGES[:1], beta=1)
    assert set(report.complexity.values()) == {1}
    assert outputs(narrow).shape == (4, 5)


def test_only_the_layers_asked_for_are_merged() -> None:
    _, report = merge_features(chain(), IMAGES[:1], beta=1, max_ratio=0.5, layers=["4", "1*"])
    assert report.complexity == {"4": 3}
    assert report.skipped["0"] == "it was not asked for"


class Net(nn.Module):
    """Two convolutions with a function of the first one's maps between them."""

    def __init__(self, between: Callable[["Net", Tensor], Tensor], groups: int = 1, taken: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.other = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.last = nn.Conv2d(taken, 2, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def hooked(net: Net, x: Tensor) -> Tensor:
    return net.other(x)


@pytest.mark.parametrize(
    ("between", "options", "reason"),
    [
        (lambda net, x: net.other(x), {"groups": 6}, "'other' is a depth-wise or grouped convolution"),
        (lambda net, x: net.other(x), {"groups": 2}, "'other' is a depth-wise or grouped convolution"),
        (lambda net, x: torch.cat([x, net.other(x)], 1), {"taken": 12}, "they go into 'cat'"),
        (lambda net, x: net.norm(x), {}, "they go into 'norm' (LayerNorm)"),
        (lambda net, x: net.other(net.other(x)), {}, "'other' is called several times"),
        (lambda net, x: x * net.scale, {}, "they go into 'mul'"),
        (lambda net, x: x.softmax(1), {}, "they go into 'softmax'"),
        (lambda net, x: x[:, torch.arange(6)], {}, "they go into 'getitem'"),
        (lambda net, x: x / x.size(1), {}, "their number is read by 'size'"),
        (lambda net, x: x / x.shape[-3], {}, "their number is read by 'getitem'"),
        (lambda net, x: x + torch.ones(x.shape), {}, "they go into 'ones'"),
        (lambda net, x: x + x.mean(), {}, "they go into 'mean'"),
        (lambda net, x: x.view(-1, 6, 8, 8), {}, "they go into 'view'"),
        (
            lambda net, x: nn.functional.conv2d(x, net.other.weight, padding=1),
            {},
            "they go into 'conv2d'",
        ),
        (
            lambda net, x: net.other(x) + net.other.bias[0],
            {},
            "the tensors of 'other' are used outside of it too",
        ),
    ],
)
def test_what_is_not_known_to_keep_channels_apart_leaves_them(
    between: Callable[[Net, Tensor], Tensor], options: dict[str, int], reason: str
) -> None:
    module = Net(between, **options).eval()
    narrow, report = merge_features(module, IMAGES[:1], beta=1, max_ratio=0.5)
    assert report.skipped["first"] == reason
    assert same_state(narrow, copied_state(module))


def test_reading_other_sizes_and_kinds_does_no_harm() -> None:
    module = Net(lambda net, x: x.to(x.dtype) / (x.shape[0] + x.size(2) + x.dim()) * x.size()[3]).eval()
    _, report = merge_features(module, IMAGES[:1], beta=1, max_ratio=0.5)
    assert report.complexity == {"first": 3}


def test_layers_with_hooks_or_shared_weights_are_left() -> None:
    module = Net(hooked).eval()
    module.other.register_forward_pre_hook(lambda layer, args: None)
    _, report = merge_features(module, IMAGES[:1], beta=1)
    assert report.skipped["first"] == "they go into 'other' (Conv2d)"
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1)).eval()
    module[3].weight = module[1].weight
    _, report = merge_features(module, IMAGES[:1], beta=1)
    assert report.skipped == dict.fromkeys(["0", "1"], "'1' shares its weights") | {
        "3": "'3' shares its weights"
    }


def test_code_that_relies_on_a_width_is_found_by_running_it() -> None:
    with pytest.raises(MergeError, match="does not give what the merged channels should"):
        merge_features(Net(lambda net, x: x * net.first.out_channels).eval(), IMAGES[:1], beta=1)

    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 3)
            self.last = nn.Conv2d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.first.out_channels != 6:
                raise RuntimeError("six channels, please")
            return self.last(self.first(x))

    with pytest.raises(MergeError, match=r"does not run \(six channels, please\)"):
        merge_features(Strict().eval(), IMAGES[:1], beta=1)


def test_what_cannot_be_merged_at_all_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(MergeError, match=r"data flow of Branching cannot be read by torch\.fx"):
        merge_features(Branching(), IMAGES[:1])
    for options in ({"beta": -0.1}, {"beta": 1.5}, {"max_ratio": 2.0}):
        with pytest.raises(MergeError, match="from 0 to 1"):
            merge_features(chain(), IMAGES[:1], **options)


def naive(points: NDArray[np.float64], beta: float, merges: int) -> set[frozenset[int]]:
    """The same by the definition: means and counts, all distances anew for each merge."""
    clusters = [[number] for number in range(len(points))]
    for _ in range(merges):
        means = np.array([points[cluster].mean(0) for cluster in clusters])
        distances = cdist(means, means, "sqeuclidean")
        np.fill_diagonal(distances, np.inf)
        i, j = sorted(divmod(int(distances.argmin()), len(clusters)))
        if distances[i, j] > beta * distances[np.isfinite(distances)].max():
            break
        clusters[i] += clusters.pop(j)
    return {frozenset(cluster) for cluster in clusters}


@settings(max_examples=60, deadline=None)
@given(
    number=st.integers(1, 14),
    beta=st.floats(0, 1),
    max_ratio=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_the_closest_are_merged_as_by_the_definition(
    number: int, beta: float, max_ratio: float, seed: int
) -> None:
    points = np.random.default_rng(seed).standard_normal((number, 3))
    owner = merge_closest(cdist(points, points, "sqeuclidean"), beta, max_ratio)
    found = {frozenset(np.flatnonzero(owner == name).tolist()) for name in set(owner.tolist())}
    assert found == naive(points, beta, min(int(max_ratio * number), number - 1))
    firsts = [int(np.flatnonzero(owner == name)[0]) for name in range(int(owner.max()) + 1)]
    assert firsts == sorted(firsts)


def test_distances_are_exact_where_rows_are_equal() -> None:
    rows = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1000
    rows[7] = rows[3]
    rows[9] = rows[3] + 1e-7
    found = squared_distances(rows)
    expected = torch.from_numpy(cdist(rows, rows, "sqeuclidean"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found[3, 7] == found[7, 3] == 0
    assert torch.equal(found, found.T)
