"""The models that a training step runs: each owns exactly the parameters that train, and nothing of the
base.
"""

from torch import Tensor, nn

from ..acting import touches_of
from ..base import Base
from ..patch import Patch
from ..split import Split
from ..touching import touched


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
    """Trunk activations -> the patch's logits."""

    def __init__(self, split: Split, patch: Patch) -> None:
        super().__init__()
        self.patch = patch
        self._split = (split,)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self._split[0].tail(inputs, self.patch)


class HeadModel(nn.Module):
    """Pooled features -> the head's logits."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.head(inputs[0])
