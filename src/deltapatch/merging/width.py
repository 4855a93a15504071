"""Iterative feature merging: a narrower network, without data, by merging channels that are nearly alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..trees import tensors_in
from .channel_groups import channel_groups
from .channels import ChannelGroup, Use
from .sources import MergeError

_NEAR = 1e-8
"""Squared distances below this share of the squared lengths are worked out from differences."""

_AT_ONCE = 2**22
"""How many entries of such differences are in memory at a time."""

_WIDTHS = {
    "makes": ("out_channels", "out_features"),
    "takes": ("in_channels", "in_features"),
    "scales": ("num_features",),
}


@dataclass(frozen=True)
class MergedChannels:
    """What became of the channels of one group of layers.

    Attributes:
        layers: paths of the layers that make them; several where an addition ties them.
        channels: how many there were.
        left: how many are left, the feature complexity of the layers.
    """

    layers: tuple[str, ...]
    channels: int
    left: int


@dataclass(frozen=True)
class WidthReport:
    """What `merge_features` did.

    Attributes:
        groups: the groups of channels that could be merged.
        skipped: layer -> why its channels stayed.
        parameters: how many parameters the network had.
        parameters_left: how many it has now.
    """

    groups: tuple[MergedChannels, ...]
    skipped: Mapping[str, str]
    parameters: int
    parameters_left: int

    @property
    def complexity(self) -> dict[str, int]:
        """Layer -> channels left, of the layers that were not skipped."""
        return {layer: group.left for group in self.groups for layer in group.layers}


@torch.no_grad()
def merge_features(
    module: nn.Module,
    example: Tensor,
    *,
    beta: float = 0.1,
    max_ratio: float = 1.0,
    layers: Sequence[str] = ("*",),
) -> tuple[nn.Module, WidthReport]:
    """Merges channels of one network that make nearly the same of their input and are used in nearly the same
    way (Chen, Zhou, Yan, "Going beyond neural network feature similarity", ICLR 2024).

    Channels that are tied, such as those of a residual stream, are merged together. The squared distance of
    two channels is taken over all weights that make or take them. The closest pair is merged as long as its
    distance is at most ``beta`` times the largest there is: what makes and normalises the channel is
    averaged over everything that was merged into it, and what takes it is summed. So channels that are
    duplicates are merged without any change of the outputs, whatever follows them: batch norm, or an
    activation that is not homogeneous. (The released script sums what makes the channels, running variances
    too, by which a batch norm's outputs become √2 times too large.) Distances are taken of means, so that
    merged channels stay comparable to others.

    Handled are convolutions and linear layers with batch norms, activations, pooling, flattening and sums
    between them. Channels that reach anything else stay, and the report says why: depth-wise and grouped
    convolutions, concatenations, other norms, attention, the outputs. That the merged network computes what
    it should is checked by running it beside one of the old width with the same merged values.

    Args:
        module: a network that torch.fx can trace; it stays as it is.
        example: a batch that it can be run on, on its device, such as ``torch.zeros(1, 3, 224, 224)``;
            nothing is learned from it.
        beta: from 0, which merges duplicates only, to 1, which merges everything; 0.01 to 0.3 are usual.
        max_ratio: which share of a group's channels may be merged into others at most; one is always left.
        layers: names or shell patterns; channels are merged where all layers that make them match.

    Returns:
        (a copy of the network with fewer channels, what was merged and what was not).

    Raises:
        MergeError: options are out of range, the network cannot be traced, or the check fails.

    Example:
        >>> smaller, report = merge_features(resnet, torch.zeros(1, 3, 224, 224), layers=["layer3.*",
        "layer4.*"]) >>> report.complexity["layer4.0.conv1"]
    """
    if not 0 <= beta <= 1 or not 0 <= max_ratio <= 1:
        raise MergeError(f"beta is {beta} and max_ratio is {max_ratio}; give numbers from 0 to 1")
    narrow, wide = deepcopy(module), deepcopy(module)
    merged: list[MergedChannels] = []
    skipped: dict[str, str] = {}
    for group in channel_groups(module, example):
        asked = all(any(fnmatchcase(layer, pattern) for pattern in layers) for layer in group.makers)
        if group.kept_for or not asked:
            skipped |= dict.fromkeys(group.makers, group.kept_for or "it was not asked for")
            continue
        owner = merge_closest(_distances(module, group), beta, max_ratio)
        left = int(owner.max()) + 1
        merged.append(MergedChannels(group.makers, group.channels, left))
        if left < group.channels:
            for use in group.uses:
                _change(narrow, use, _reduced(use, owner), left)
                _change(wide, use, _spread(use, owner), group.channels)
    _check(narrow, wide, example)
    report = WidthReport(tuple(merged), skipped, _parameters(module), _parameters(narrow))
    return narrow, report


def merge_closest(distances: NDArray[np.float64], beta: float, max_ratio: float) -> NDArray[np.int64]:
    """Merges the closest two of n points again and again, each time putting their mean in their place.

    A mean's distances follow from those of its two points (Lance and Williams), with counts c,
    d(k, ij) = (c_i d(k, i) + c_j d(k, j)) / (c_i + c_j) - c_i c_j d(i, j) / (c_i + c_j)²,
    so a merge costs one row of the matrix.

    Args:
        distances: squared distances, shape (n, n), symmetric with zeros on the diagonal; not changed.
        beta: merging ends where the smallest distance is above beta times the largest.
        max_ratio: and after so many merges, as a share of n.

    Returns:
        For each point the number of what it was merged into, shape (n,), counted in the order of the first
        points.
    """
    number = len(distances)
    table = distances.astype(np.float64, copy=True)
    counts = np.ones(number)
    owner = np.arange(number)
    names = np.arange(number)  # whose points the rows that are left stand for
    merges = min(math.floor(max_ratio * number), number - 1)
    for size in range(number, number - merges, -1):
        rest = table[:size, :size]
        np.fill_diagonal(rest, 0.0)
        largest = rest.max()
        np.fill_diagonal(rest, np.inf)
        i, j = sorted(divmod(int(rest.argmin()), size))
        smallest = rest[i, j]
        if smallest > beta * largest:
            break
        total = counts[i] + counts[j]
        with np.errstate(invalid="ignore"):
            row = (counts[i] * rest[i] + counts[j] * rest[j]) / total
        row = np.maximum(row - counts[i] * counts[j] / total**2 * smallest, 0.0)
        rest[i], rest[:, i], counts[i] = row, row, total
        owner[owner == names[j]] = names[i]
        # The last row takes the place of the one that is gone.
        rest[j], rest[:, j], counts[j], names[j] = rest[-1], rest[:, -1], counts[size - 1], names[size - 1]
    order = {name: place for place, name in enumerate(dict.fromkeys(owner.tolist()))}
    return np.array([order[name] for name in owner.tolist()], dtype=np.int64)


def _distances(module: nn.Module, group: ChannelGroup) -> NDArray[np.float64]:
    """Squared distances of channels over every weight that makes or takes them; vectors do not count."""
    total = np.zeros((group.channels, group.channels))
    for use in group.uses:
        tensor = _tensor(module, use)
        if tensor.ndim > 1:
            total += squared_distances(_by_channel(tensor, use).flatten(1).double()).cpu().numpy()
    return total


def squared_distances(rows: Tensor) -> Tensor:
    """Of all rows of an fp64 matrix (n, d) from each other, fp64 (n, n); exactly 0 for equal rows.

    Products are much faster than differences, but not exact where rows are nearly equal; those are done
    again.
    """
    products = rows @ rows.T
    lengths = products.diagonal()
    sums = lengths[:, None] + lengths
    distances = (sums - 2 * products).clamp_min(0).triu(1)
    near = (distances <= _NEAR * sums).triu(1).nonzero()
    for pairs in near.split(max(_AT_ONCE // max(rows.shape[1], 1), 1)):
        i, j = pairs.unbind(1)
        distances[i, j] = (rows[i] - rows[j]).square().sum(1)
    return distances + distances.T


def _by_channel(tensor: Tensor, use: Use) -> Tensor:
    """The tensor with channels first: (channels, …)."""
    if use.repeat > 1:
        tensor = tensor.unflatten(use.axis, (-1, use.repeat))
    return tensor.movedim(use.axis, 0)


def _as_before(tensor: Tensor, use: Use) -> Tensor:
    """Undoes `_by_channel`."""
    tensor = tensor.movedim(0, use.axis)
    return tensor.flatten(use.axis, use.axis + 1) if use.repeat > 1 else tensor


def _reduced(use: Use, owner: NDArray[np.int64]) -> Callable[[Tensor], Tensor]:
    """A tensor of fewer channels: what takes them is summed, the rest averaged."""
    places = torch.from_numpy(owner)

    def change(tensor: Tensor) -> Tensor:
        given = _by_channel(tensor, use).double()
        place = places.to(given.device)
        merged = given.new_zeros(int(owner.max()) + 1, *given.shape[1:]).index_add(0, place, given)
        if use.role != "takes":
            merged /= place.bincount().reshape(-1, *[1] * (given.ndim - 1))
        return _as_before(merged, use).to(tensor.dtype).contiguous()

    return change


def _spread(use: Use, owner: NDArray[np.int64]) -> Callable[[Tensor], Tensor]:
    """The same in the old width: merged channels as duplicates, which share what takes them."""
    places = torch.from_numpy(owner)

    def change(tensor: Tensor) -> Tensor:
        merged = _by_channel(_reduced(use, owner)(tensor.double()), use)
        place = places.to(merged.device)
        if use.role == "takes":
            merged = merged / place.bincount().reshape(-1, *[1] * (merged.ndim - 1))
        return _as_before(merged[place], use).to(tensor.dtype).contiguous()

    return change


def _change(module: nn.Module, use: Use, change: Callable[[Tensor], Tensor], channels: int) -> None:
    """Exchanges a layer's tensor, and the number of channels that the layer says it has."""
    layer = module.get_submodule(use.layer)
    old = _tensor(module, use)
    new = change(old)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(layer, use.tensor, new)
    for name in _WIDTHS[use.role]:
        if hasattr(layer, name):
            setattr(layer, name, channels * use.repeat)


def _tensor(module: nn.Module, use: Use) -> Tensor:
    return cast(Tensor, getattr(module.get_submodule(use.layer), use.tensor))


def _check(narrow: nn.Module, wide: nn.Module, example: Tensor) -> None:
    """Raises a MergeError unless both give the same, up to rounding."""
    try:
        found, expected = (tensors_in(deepcopy(one).eval()(example)) for one in (narrow, wide))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MergeError(
            f"the narrower network does not run ({reason}); leave out the layers whose width its code relies"
            " on"
        ) from error
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        tolerance = math.sqrt(torch.finfo(other.dtype).eps) if other.is_floating_point() else 0.0
        if one.shape != other.shape or bool(((one - other).abs() > tolerance * scale).any()):
            raise MergeError(
                "the narrower network does not give what the merged channels should; leave out the layers"
                " whose width its code relies on"
            )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
