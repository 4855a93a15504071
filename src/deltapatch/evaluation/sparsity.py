"""How much of a network a norm patch switches off: gains near zero, and channels that are dead after them.

As in Frankle, Schwab, Morcos, ICLR 2021 (arXiv 2003.00152), who find a quarter or more of the gains of a
network with random weights near zero when nothing but its norms is trained.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..base import Base
from ..data import ImageSet, evaluation_transform, load_batches
from ..errors import DeltapatchError
from ..normalising import NormPart
from ..patch import Patch
from ..patched import PatchedModel

THRESHOLD: Final = 0.01
"""Below this a gain counts as near zero, as in the source."""

_RELUS: Final = frozenset(
    {functional.relu, functional.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_}
)
_NAME: Final = "watched"


@dataclass(frozen=True)
class GainSparsity:
    """Gains near zero.

    Attributes:
        small: name of a norm layer -> how many of its |γ| are below the threshold.
        channels: name of a norm layer -> how many γ it has.
    """

    small: dict[str, int]
    channels: dict[str, int]

    @property
    def share(self) -> float:
        """Of all gains of the patch, from 0 to 1."""
        return sum(self.small.values()) / sum(self.channels.values())

    def share_of(self, layer: str) -> float:
        """Of the gains of one layer, from 0 to 1."""
        return self.small[layer] / self.channels[layer]


@dataclass(frozen=True)
class DeadChannels:
    """Channels whose ReLU gives zero at every position.

    Attributes:
        dead: for each ReLU, in the order in which they run: how many of its channels are zero for nearly all
            images.
        channels: for each ReLU: how many channels it has.
    """

    dead: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def share(self) -> float:
        """Of all channels of all ReLUs, from 0 to 1."""
        return sum(self.dead) / sum(self.channels)


def gain_sparsity(patch: Patch, threshold: float = THRESHOLD) -> GainSparsity:
    """Which share of the gains γ of a patch's norm layers is near zero: |γ| < threshold.

    Raises:
        DeltapatchError: the patch has no gains.
    """
    gains = dict(_gains(patch))
    if not gains:
        raise DeltapatchError(
            f"a {patch.method.name} patch has no gains of normalisation layers to count; fit one with the"
            " norm method"
        )
    small = {path: int((gain.abs() < threshold).sum()) for path, gain in gains.items()}
    return GainSparsity(small, {path: gain.numel() for path, gain in gains.items()})


def clamped(patch: Patch, threshold: float = THRESHOLD) -> Patch:
    """A copy of the patch in which gains near zero are exactly 0; shifts stay. The patch is not changed.

    Evaluated beside the patch, it tells whether the channels behind those gains matter:

    >>> evaluate(base, images, patch).accuracy.value - evaluate(base, images, clamped(patch)).accuracy.value
    """
    copy = deepcopy(patch)
    with torch.no_grad():
        for _, gain in _gains(copy):
            gain[gain.abs() < threshold] = 0.0
    return copy


def dead_channels(
    base: Base, images: ImageSet, patch: Patch | None = None, share: float = 0.99, batch_size: int = 64
) -> DeadChannels:
    """Which channels of the ReLUs are zero, at every position, for at least ``share`` of the images.

    The ReLUs are those of the whole model as it answers with the patch, written as modules or as functions;
    relatives with an upper bound (ReLU6) are not counted. Channels of maps stand on axis 1, of
    anything else on the last axis. Images that cannot be read are left out.

    Raises:
        DeltapatchError: ``share`` is no share, no image can be read, or the model has no ReLU.
    """
    if not 0 < share <= 1:
        raise DeltapatchError(f"share must be above 0 and at most 1, not {share}")
    model = PatchedModel(base)
    if patch is not None:
        model.add_patch(_NAME, patch)
    preprocessing = base.preprocessing if patch is None else patch.info.preprocessing
    ready = images.with_transform(evaluation_transform(preprocessing))
    watch = _ReLUWatch()
    with torch.inference_mode():
        for batch in load_batches(ready, batch_size=batch_size, shuffle=False).epoch(0):
            if len(batch.labels):
                with watch.forward_pass(len(batch.labels)):
                    given = batch.images.to(base.device, base.dtype)
                    model(given, patch=None if patch is None else _NAME)
    if not watch.images:
        raise DeltapatchError("there is no readable image among those given; check the data")
    if not watch.zeros:
        raise DeltapatchError(f"{base.name} runs no ReLU, so it has no channels that a ReLU could switch off")
    dead = tuple(int((zeros >= share * watch.images).sum()) for zeros in watch.zeros)
    return DeadChannels(dead, tuple(zeros.numel() for zeros in watch.zeros))


class _ReLUWatch:
    """Counts, for each channel of each ReLU, the images for which it is zero.

    Attributes:
        images: how many were seen.
        zeros: one tensor for each ReLU, of shape (channels,).
    """

    def __init__(self) -> None:
        self.images = 0
        self.zeros: list[Tensor] = []

    @contextmanager
    def forward_pass(self, images: int) -> Generator[None]:
        """Within the context the model answers for so many new images, once."""
        with _ReLUOutputs() as outputs:
            yield
        if not self.images:
            self.zeros = [torch.zeros_like(zeros) for zeros in outputs.zeros]
        for total, zeros in zip(self.zeros, outputs.zeros, strict=True):
            total += zeros
        self.images += images


class _ReLUOutputs(TorchFunctionMode):
    """While it lasts, the zeros of every ReLU's output are counted, in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _RELUS:
            axis = 1 if output.ndim == 4 else output.ndim - 1
            positions = [other for other in range(1, output.ndim) if other != axis]
            is_zero = output == 0
            for position in reversed(positions):
                is_zero = is_zero.all(position)
            self.zeros.append(is_zero.sum(0))
        return output


def _gains(patch: Patch) -> Iterator[tuple[str, Tensor]]:
    """Name of a norm layer -> its γ in the patch."""
    for site, part in zip(patch.sites, patch.parts, strict=True):
        if isinstance(part, NormPart) and "weight" in part.tensors():
            (path,) = patch.method.touches(site, part)
            yield path, part.tensors()["weight"]
