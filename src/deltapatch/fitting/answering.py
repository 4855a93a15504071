"""The models that a training step runs: each owns exactly the parameters that train, and nothing of the
base.
"""

import torch
from torch import Tensor, nn

from ..acting import touches_of
from ..base import Base
from ..patch import Patch
from ..touching import touched
from .surveying import Trunk


class WholeModel(nn.Module):
    """Images -> the patch's logits, through the whole base."""

    def __init__(self, base: Base, patch: Patch) -> None:
        super().__init__()
        self.patch = patch
        self._base = (base,)  # in a tuple, so that the base's parameters are not registered here

    def forward(self, inputs: list[Tensor]) -> Tensor:
        (base,) = self._base
        with base.freezer.frozen(), touched(touches_of(base, self.patch), instead_of=base.module):
            return base.module(inputs[0].to(base.dtype))


class TailModel(nn.Module):
    """Trunk activations -> the patch's logits.

    Attributes:
        feature_noise: standard deviation of the noise that is added to the activations while training,
        relative to
            the standard deviation of each tensor.
    """

    def __init__(self, trunk: Trunk, patch: Patch, feature_noise: float = 0.0) -> None:
        super().__init__()
        self.patch = patch
        self.feature_noise = feature_noise
        self._trunk = (trunk,)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        (trunk,) = self._trunk
        assert trunk.split is not None
        if self.training and self.feature_noise:
            inputs = [_with_noise(tensor, self.feature_noise) for tensor in inputs]
        return trunk.split.tail([trunk.precision.arranged(tensor) for tensor in inputs], self.patch)


def _with_noise(tensor: Tensor, size: float) -> Tensor:
    """The tensor with Gaussian noise; as it is where it does not hold floating numbers."""
    if not tensor.is_floating_point():
        return tensor
    spread = tensor.float().std().to(tensor.dtype)
    return tensor + torch.randn_like(tensor) * (size * spread)


class HeadModel(nn.Module):
    """Pooled features -> the head's logits."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.head(inputs[0])
