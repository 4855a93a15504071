"""Means and variances of batch normalisation that a patch owns, found anew once its weights are merged."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...base import Base
from ...data import ImageSet
from ...fitting.answering import WholeModel
from ...fitting.gathering import gather
from ...layers import STATISTICS
from ...normalising import Gathering, NormPart
from ...patch import Patch
from .batches import ImageBatches
from .norm_statistics import re_estimate_norms


def re_estimate_patch(base: Base, patch: Patch, images: Sequence[ImageSet]) -> bool:
    """Gives a patch the statistics that the images have while it is active; the base's own stay as they are.

    They are those of the base's norms that the patch exchanges, and those of norms inside its own parts, such
    as a Δ-module's; found as `re_estimate_norms` does. In a base of half precision the former are gathered as
    a fit gathers them.

    Args:
        base: the patch's base.
        patch: in eval mode; nothing else of it changes.
        images: of one task or several; labels are not looked at.

    Returns:
        Whether the patch has any such statistics.

    Raises:
        DataError, MergeError: no image can be read.
    """
    exchanged = _exchanged(base, patch)
    if exchanged and base.dtype != torch.float32:
        gather(base, patch, images, Gathering())
        exchanged = []
    return bool(re_estimate_norms(_Patched(base, patch, exchanged), ImageBatches(images, base)))


def _exchanged(base: Base, patch: Patch) -> list[nn.Module]:
    """A norm for each one of the base's whose statistics are the patch's, which holds the patch's tensors."""
    found: list[nn.Module] = []
    for site, part in zip(patch.sites, patch.parts, strict=True):
        if not isinstance(part, NormPart) or not part.has_statistics:
            continue
        (path,) = patch.method.touches(site, part)
        count = cast(Tensor, part.running_mean).numel()
        norm = nn.BatchNorm2d(count, eps=float(getattr(base.submodule(path), "eps", 1e-5)), affine=False)
        for name in STATISTICS:
            norm.register_buffer(name, cast(Tensor, getattr(part, name)))
        found.append(norm)
    return found


class _Patched(nn.Module):
    """Images -> the patch's answers; a model whose norms are those whose statistics are the patch's."""

    def __init__(self, base: Base, patch: Patch, exchanged: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = WholeModel(base, patch)
        self.exchanged = nn.ModuleList(exchanged)

    def forward(self, images: Tensor) -> Tensor:
        return self.model([images])
