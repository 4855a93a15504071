"""The control of norm adaptation: as many parameters as the norms have, but among the weights, at random."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import AnatomyError, DeltapatchError, PatchFileError
from ..exchange import Exchange
from ..layers import Layer
from ..method import Method, check_modules, register_method
from ..touching import Touch


@register_method("random-weights")
@dataclass(frozen=True)
class RandomWeights(Method):
    """Trains a few randomly chosen weights of each output channel; all others, and norms, stay the base's.

    W' = W + D, where D is 0 but for ``per_channel`` entries a row (an output channel), which start at 0, so
    that a patch starts exactly at the base. With 2 a channel it has as many parameters as the scales and
    shifts of batch normalisation after every convolution. Source: Frankle, Schwab, Morcos, ICLR 2021 (arXiv
    2003.00152), there as the control that tells what is special about norms. The choice depends on the seed
    and is in the file.

    Attributes:
        modules: from which of the last stages on weights are trained; "all" trains some in the whole base.
        per_channel: how many weights of each output channel; all of them where it has fewer.
        layers: "convolutions" as in the source, or "all" for linear layers too.
    """

    modules: int | Literal["all"] = "all"
    per_channel: int = 2
    layers: Literal["convolutions", "all"] = "convolutions"

    site_type: ClassVar[type] = Layer

    def __post_init__(self) -> None:
        check_modules(self.modules)
        if self.per_channel < 1:
            raise DeltapatchError(f"per_channel must be 1 or more weights, not {self.per_channel}")

    @classmethod
    def sizes(cls) -> tuple[Method, ...]:
        # A control, which is not meant to be used.
        return ()

    def sites(self, anatomy: Anatomy) -> tuple[Layer, ...]:
        kinds = ("convolution",) if self.layers == "convolutions" else ("convolution", "linear")
        found = tuple(layer for layer in anatomy.layers_from(self.modules) if layer.kind in kinds)
        if not found:
            raise AnatomyError(
                "this base has no convolution there, so the random-weights method has nothing to train;"
                " layers='all' trains weights of linear layers too"
            )
        return found

    def part(self, site: Layer) -> "SparseDifference":
        weight = site.tensor("weight")
        if weight is None or len(weight.shape) < 2:
            raise DeltapatchError(f"layer '{site.path}' has no weight with rows to choose from")
        return SparseDifference(weight.shape, self.per_channel, site.path)

    def touches(self, site: Layer, part: nn.Module) -> Mapping[str, Touch]:
        return {site.path: Exchange(cast(SparseDifference, part).tensors)}


class SparseDifference(nn.Module):
    """A difference to a weight that is 0 but for a few entries of each row.

    Attributes:
        positions: which entries of each flattened row, int64 of shape (rows, entries a row).
        difference: what is added to them, of the same shape.
    """

    positions: Tensor

    def __init__(self, shape: tuple[int, ...], per_row: int, path: str) -> None:
        super().__init__()
        self.path = path
        self.columns = prod(shape[1:])
        # The largest of random numbers: a choice without repetition, in every row for itself.
        chosen = torch.rand(shape[0], self.columns).topk(min(per_row, self.columns)).indices
        self.register_buffer("positions", chosen)
        self.difference = nn.Parameter(torch.zeros(chosen.shape))
        self.register_load_state_dict_post_hook(_check_positions)

    def tensors(self, layer: nn.Module) -> Mapping[str, Tensor]:
        """What stands in the place of the layer's own weight."""
        weight = cast(Tensor, layer.weight)
        rows = weight.flatten(1)
        changed = rows.scatter_add(1, self.positions, self.difference.to(weight.dtype))
        return {"weight": changed.view_as(weight)}


def _check_positions(part: SparseDifference, incompatible: Any) -> None:
    """A file may say anything, and a position outside of a row can end the whole process on some devices."""
    positions = part.positions
    if not positions.is_meta and not ((positions >= 0) & (positions < part.columns)).all():
        raise PatchFileError(
            f"the positions of the weights that train in layer '{part.path}' must be from 0 to"
            f" {part.columns - 1}, and the file has others; it is damaged, get a fresh copy or fit it again"
        )
