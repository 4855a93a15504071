"""In what number format a fit computes: bf16 where the processor has it and the base bears it."""

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..base import Base
from ..patch import pooled
from ..split import walk

LARGEST_ERROR = 0.02
"""How far the base's features may be off in bf16, relative to their length, before a fit keeps to fp32."""


@dataclass(frozen=True)
class Precision:
    """The number format of a fit.

    Attributes:
        mixed: whether convolutions and matrix products are computed in bf16 (parameters stay as they are).
        device: where it is computed, such as "cpu".
        why: the reason, for people.
    """

    mixed: bool
    device: str
    why: str

    @property
    def name(self) -> Literal["bf16", "fp32"]:
        """As in `FitConfig.precision`."""
        return "bf16" if self.mixed else "fp32"

    def context(self) -> AbstractContextManager[Any]:
        """What a computation runs in."""
        return torch.autocast(self.device, dtype=torch.bfloat16) if self.mixed else nullcontext()

    def arranged(self, tensor: Tensor) -> Tensor:
        """A batch of maps in the memory order in which bf16 convolutions are fastest; others as they are."""
        if not self.mixed or tensor.ndim != 4:
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    def prepared(self, base: Base) -> Base:
        """The base as it is computed with: itself in fp32, and in bf16 a copy whose weights are cast once.

        Otherwise every step would cast them anew. Only plain convolutions and linear layers are changed; what
        standardises or otherwise computes with its weights keeps them.
        """
        if not self.mixed:
            return base
        copied = Base(deepcopy(base.module), base.name, base.source, base.preprocessing, base.classes)
        copied.__dict__.update(anatomy=base.anatomy, fingerprint=base.fingerprint)
        for module in copied.module.modules():
            if type(module) in (nn.Conv2d, nn.Linear):
                weight = self.arranged(cast(Tensor, module.weight).detach().to(torch.bfloat16))
                module.weight = nn.Parameter(weight, requires_grad=False)
        return copied


def choose_precision(wanted: Literal["auto", "fp32", "bf16"], base: Base, images: Tensor) -> Precision:
    """The format that was asked for; for "auto", bf16 if the device has it and the base's features stay.

    The same base, images and machine always give the same choice.

    Args:
        wanted: see `FitConfig.precision`.
        base: the frozen base.
        images: a few images of the task, shape (N, C, H, W), on the base's device.
    """
    device = base.device.type
    if wanted != "auto":
        return Precision(wanted == "bf16", device, "asked for")
    if base.dtype != torch.float32:
        return Precision(False, device, f"the base itself is in {str(base.dtype).removeprefix('torch.')}")
    if not has_bf16(device):
        return Precision(False, device, f"this {device} has no bf16 arithmetic")
    error = _feature_error(base, images, Precision(True, device, ""))
    if not error <= LARGEST_ERROR:
        return Precision(False, device, f"in bf16 the base's features would be off by {error:.1%}")
    return Precision(True, device, f"the base's features are off by {error:.1%}")


def has_bf16(device: str) -> bool:
    """Whether a kind of device multiplies in bf16 and not merely emulates it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    if device != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@torch.no_grad()
def _feature_error(base: Base, images: Tensor, mixed: Precision) -> float:
    """Length of the difference of the pooled features, relative to their length in fp32."""
    layout = base.anatomy.head.layout

    def features(given: Tensor) -> Tensor:
        found = walk(base, given, [], to_end=True).features
        assert found is not None
        return pooled(found, layout).float()

    exact = features(images)
    with mixed.context():
        rounded = features(mixed.arranged(images))
    return float((rounded - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))
