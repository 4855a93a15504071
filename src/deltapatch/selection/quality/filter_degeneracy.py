"""Filters that are near zero, alike, or untrained noise: what can be said of a base from its weights alone.

Source: "CNN Filter DB" (Gavrikov & Keuper, CVPR 2022), there for 3x3 convolutions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..score import SelectionError

_NEAR_ZERO = 0.01
"""A filter is near zero where its largest weight is below this share of the layer's largest."""


@dataclass(frozen=True)
class LayerFilters:
    """The filters of one convolution: its k x k kernels, one for each output and each input that it sees.

    Attributes:
        path: the layer's name.
        kernel_size: height and width.
        filters: how many there are, n.
        sparsity: share that is near zero, from 0 to 1; 1 for a layer of zeros.
        entropy: of the variances along the filters' principal axes, in powers of ten. Near 0 all filters are
            one pattern; about 0.9 is healthy for 3x3. None where there is nothing to compare: kernels of one
            number, and single filters.
        limit: the largest entropy that so many filters of this size can have, log₁₀ min(n - 1, kh · kw); None
            where the entropy is.
        orthogonality: from 0 (all outputs have one kernel) to 1 (all are orthogonal), over pairs of outputs
            that see the same inputs; None where no two do, as in depth-wise convolutions.
        threshold: entropy above which filters are like noise; None for kernels other than 3x3, for which it
            was not measured, and for nine filters or fewer, whose entropy their number limits.
    """

    path: str
    kernel_size: tuple[int, int]
    filters: int
    sparsity: float
    entropy: float | None
    limit: float | None
    orthogonality: float | None
    threshold: float | None

    @property
    def is_random(self) -> bool:
        """Whether the filters are like untrained noise."""
        return self.entropy is not None and self.threshold is not None and self.entropy > self.threshold


@dataclass(frozen=True)
class FilterDegeneracy:
    """The filters of all convolutions of a module.

    Attributes:
        layers: in the order of the module.
    """

    layers: tuple[LayerFilters, ...]

    @property
    def random(self) -> tuple[str, ...]:
        """Layers whose filters are like untrained noise."""
        return tuple(layer.path for layer in self.layers if layer.is_random)

    def mean(self, figure: Callable[[LayerFilters], float | None]) -> float | None:
        """The mean of a figure over the layers that have it; None where no layer does.

        Example:
            >>> filter_degeneracy(base.module).mean(lambda layer: layer.entropy)
        """
        values = [value for value in map(figure, self.layers) if value is not None]
        return math.fsum(values) / len(values) if values else None


def filter_degeneracy(module: nn.Module) -> FilterDegeneracy:
    """Sparsity, variance entropy and orthogonality of the filters of every two-dimensional convolution.

    With the n filters of a layer as rows W of shape (n, kh · kw), s the singular values of W less its mean
    row and p = s² / Σ s², the entropy is -Σ p log₁₀ p. With the kernels of the outputs as rows of unit
    length, the orthogonality is 1 - Σ_{i≠j} |cos| / (pairs). Kernels that are zero have no direction and are
    in no pair.

    Raises:
        SelectionError: there is no such convolution, or a weight is not finite.

    Example:
        >>> found = filter_degeneracy(torchvision.models.resnet18())
        >>> len(found.random)  # nothing is trained
        16
    """
    layers = tuple(
        _figures(path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Conv2d)
    )
    if not layers:
        raise SelectionError("this model has no two-dimensional convolution, so it has no filters to look at")
    return FilterDegeneracy(layers)


def random_threshold(filters: int) -> float:
    """The entropy above which 3x3 filters are like noise, by their number: the curve that the source fitted.

    Example:
        >>> round(random_threshold(64), 5)
        0.90556
    """
    return 1.2618047 / (1 + math.exp(-0.88767525 * (math.log2(filters) - 2.30436435))) - 0.31050834


@torch.no_grad()
def _figures(path: str, layer: nn.Conv2d) -> LayerFilters:
    weight = layer.weight.detach().cpu().double()
    if not weight.isfinite().all():
        raise SelectionError(
            f"the weight of '{path}' holds NaN or infinite numbers; get the base's weights again"
        )
    height, width = weight.shape[2:]
    rows = weight.reshape(-1, height * width)
    count = len(rows)
    has_shape = count > 1 and height * width > 1
    is_measured = (height, width) == (3, 3) and count > height * width
    return LayerFilters(
        path,
        (height, width),
        count,
        _sparsity(rows),
        _entropy(rows) if has_shape else None,
        math.log10(min(count - 1, height * width)) if has_shape else None,
        _orthogonality(weight, layer.groups),
        random_threshold(count) if is_measured else None,
    )


def _sparsity(rows: Tensor) -> float:
    largest = rows.abs().amax(1)
    # In a layer of zeros nothing is below a share of the largest, and yet all of it is near zero.
    return float((largest < _NEAR_ZERO * largest.max()).double().mean()) if largest.max() > 0 else 1.0


def _entropy(rows: Tensor) -> float:
    variances = torch.linalg.svdvals(rows - rows.mean(0)).square()
    largest = float(rows.abs().max())
    # Equal filters leave nothing but what rounding leaves.
    if float(variances.sum()) <= (1e-14 * largest) ** 2 * rows.numel():
        return 0.0
    shares = variances / variances.sum()
    return float(-torch.special.xlogy(shares, shares).sum()) / math.log(10)


def _orthogonality(weight: Tensor, groups: int) -> float | None:
    cosines, pairs = 0.0, 0
    for outputs in weight.flatten(1).chunk(groups):
        lengths = outputs.norm(dim=1)
        unit = outputs[lengths > 0] / lengths[lengths > 0, None]
        cosines += float((unit @ unit.T).abs().sum()) - len(unit)
        pairs += len(unit) * (len(unit) - 1)
    return min(max(1 - cosines / pairs, 0.0), 1.0) if pairs else None
