"""Filters that are zero, alike or noise: closed forms and the layers where something is not defined."""

import math

import pytest
import torch
from torch import Tensor, nn

from deltapatch.selection.quality.filter_degeneracy import (
    LayerFilters,
    filter_degeneracy,
    random_threshold,
)
from deltapatch.selection.score import SelectionError

UNIT = torch.eye(9).reshape(9, 1, 3, 3)


@torch.no_grad()
def figures(weight: Tensor, groups: int = 1) -> LayerFilters:
    outputs, inputs, *kernel = weight.shape
    layer = nn.Conv2d(inputs * groups, outputs, tuple(kernel), groups=groups)  # pyright: ignore
    layer.weight.copy_(weight)
    return filter_degeneracy(layer).layers[0]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_nine_unit_filters_have_the_entropy_of_eight_directions() -> None:
    found = figures(UNIT)
    assert found.entropy == pytest.approx(0.90309, abs=5e-6)
    assert found.limit == pytest.approx(math.log10(8))
    assert found.orthogonality == 1
    assert found.sparsity == 0


def test_unit_filters_of_both_signs_have_the_largest_entropy() -> None:
    found = figures(torch.cat([UNIT, -UNIT]))
    assert found.entropy == pytest.approx(0.95424, abs=5e-6)
    assert found.limit == pytest.approx(math.log10(9))
    # Of the 17 others one is parallel.
    assert found.orthogonality == pytest.approx(1 - 1 / 17)


def test_half_of_the_filters_zero_is_a_sparsity_of_a_half() -> None:
    found = figures(torch.cat([noise(6, 2, 3, 3), 1e-4 * noise(6, 2, 3, 3)]))
    assert found.sparsity == 0.5


def test_a_layer_of_zeros_is_all_sparse_without_variance_or_direction() -> None:
    found = figures(torch.zeros(4, 4, 3, 3))
    assert (found.sparsity, found.entropy, found.orthogonality) == (1, 0, None)
    assert not found.is_random


def test_equal_filters_have_no_entropy_and_no_orthogonality() -> None:
    found = figures(noise(1, 1, 3, 3).expand(20, 3, 3, 3))
    assert found.entropy == pytest.approx(0, abs=1e-9)
    assert found.orthogonality == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("filters", "expected"), [(64, 0.90556), (192, 0.93978), (4096, 0.95107)])
def test_the_threshold_is_the_sources(filters: int, expected: float) -> None:
    assert random_threshold(filters) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("shape", "entropy"), [((64, 3), 0.943), ((64, 64), 0.954)])
def test_noise_is_known_as_noise(shape: tuple[int, int], entropy: float) -> None:
    found = figures(noise(*shape, 3, 3))
    assert found.entropy == pytest.approx(entropy, abs=3e-3)
    assert found.is_random


def test_filters_of_few_patterns_are_no_noise() -> None:
    patterns = noise(3, 9)
    found = figures((noise(4096, 3) @ patterns).reshape(64, 64, 3, 3))
    assert found.entropy is not None
    assert found.entropy <= math.log10(3) + 1e-9
    assert not found.is_random


def test_scaling_changes_nothing() -> None:
    one, other = figures(noise(16, 4, 3, 3)), figures(1e-6 * noise(16, 4, 3, 3))
    assert (one.sparsity, one.entropy, one.orthogonality) == pytest.approx(
        (other.sparsity, other.entropy, other.orthogonality), rel=1e-5
    )


def test_kernels_of_one_number_have_no_entropy_but_sparsity_and_orthogonality() -> None:
    found = figures(torch.diag(torch.tensor([1.0, 1.0, 1e-5])).reshape(3, 3, 1, 1))
    assert (found.entropy, found.limit, found.threshold) == (None, None, None)
    assert found.sparsity == pytest.approx(7 / 9)
    assert found.orthogonality == 1


def test_depth_wise_filters_see_no_common_input() -> None:
    found = figures(noise(12, 1, 3, 3), groups=12)
    assert (found.filters, found.orthogonality) == (12, None)
    assert found.entropy is not None
    assert found.threshold == random_threshold(12)


def test_groups_are_compared_within_themselves() -> None:
    within = figures(torch.cat([UNIT[:2], UNIT[:2]]), groups=2)
    assert within.orthogonality == 1
    assert figures(torch.cat([UNIT[:2], UNIT[:2]])).orthogonality == pytest.approx(1 - 4 / 12)


def test_few_filters_and_other_sizes_have_no_threshold() -> None:
    assert figures(noise(3, 3, 3, 3)).threshold is None
    assert figures(noise(3, 4, 3, 3)).threshold is not None
    assert figures(noise(64, 64, 5, 5)).threshold is None
    assert figures(noise(64, 64, 5, 5)).limit == pytest.approx(math.log10(25))
    single = figures(noise(1, 1, 3, 3))
    assert (single.entropy, single.limit, single.orthogonality) == (None, None, None)


def test_all_convolutions_of_a_module_are_looked_at_and_averaged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 32, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = filter_degeneracy(model)
    assert [layer.path for layer in found.layers] == ["0", "2", "3"]
    assert found.random == ("0", "3")
    entropies = [layer.entropy for layer in found.layers if layer.entropy is not None]
    assert found.mean(lambda layer: layer.entropy) == pytest.approx(sum(entropies) / 2)
    assert found.mean(lambda layer: None) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_has_no_filters_is_refused() -> None:
    with pytest.raises(SelectionError, match="no two-dimensional convolution"):
        filter_degeneracy(nn.Linear(2, 2))
    with pytest.raises(SelectionError, match="the weight of '' holds NaN"):
        figures(torch.full((2, 2, 3, 3), torch.nan))
