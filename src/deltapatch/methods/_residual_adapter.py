"""What parallel and series residual adapters share: their places, their options, and the 1x1 convolution."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy import Anatomy
from ..base import Base
from ..errors import AnatomyError, DeltapatchError
from ..joining import unseen
from ..layers import Layer
from ..method import Method, check_modules
from ..normalising import Gathering, NormPart, Statistics
from ..touching import Touch
from ..trees import tensors_in

Start = Literal["zero", "published"]


class Adapter(nn.Module):
    """A, a 1x1 convolution without bias: (N, inputs, H, W) -> (N, outputs, ceil(H / s), ceil(W / s)).

    Attributes:
        weight: shape (outputs, inputs, 1, 1).
    """

    def __init__(
        self, inputs: int, outputs: int, stride: tuple[int, int], start: Start, dropout: float
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, 1, 1))
        self.stride = stride
        self.dropout = dropout
        if start == "published":
            nn.init.normal_(self.weight, std=math.sqrt(2 / outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout2d(x, self.dropout, self.training)
        return functional.conv2d(x, self.weight.to(x.dtype), stride=self.stride)


class AdapterPart(nn.Module):
    """What a patch owns at one convolution."""

    @abstractmethod
    def adapted(self, x: Tensor, z: Tensor) -> Tensor:
        """What takes the place of the convolution's output.

        Args:
            x: the convolution's input, shape (N, C_in, H, W).
            z: its output, shape (N, C_out, H', W').
        """

    def touch(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """What the convolution computes while the patch is active."""
        output = forward(*args, **kwargs)
        with unseen():
            return self.adapted(tensors_in((args, kwargs))[0], output)


@dataclass(frozen=True)
class ResidualAdapter(Method):
    """Adapters at the convolutions of one kernel size, and norms of the task's own; see the subclasses."""

    modules: int | Literal["all"] = "all"
    kernel_size: int = 3
    statistics: Statistics = "own"
    init: Start = "zero"
    dropout: float = 0.0

    site_type: ClassVar[type] = Layer
    learning_rate: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        check_modules(self.modules)
        if self.kernel_size < 1:
            raise DeltapatchError(f"kernel_size must be 1 or more, not {self.kernel_size}")
        if not 0 <= self.dropout < 1:
            raise DeltapatchError(f"dropout must be 0 or more and below 1, not {self.dropout}")

    @abstractmethod
    def adapter(self, site: Layer) -> AdapterPart:
        """New parameters for one convolution."""

    def sites(self, anatomy: Anatomy) -> tuple[Layer, ...]:
        layers = anatomy.layers_from(self.modules)
        if not any(map(self._is_adapted, layers)):
            raise AnatomyError(self._nothing_found(anatomy))
        return tuple(layer for layer in layers if layer.kind == "normalisation" or self._is_adapted(layer))

    def part(self, site: Layer) -> nn.Module:
        if site.kind == "normalisation":
            return NormPart(site, affine=True, statistics=self.statistics)
        return self.adapter(site)

    def initialise(self, site: Layer, part: nn.Module, base: Base) -> None:
        if isinstance(part, NormPart):
            part.start_from(base.submodule(site.path))

    def gathering(self) -> Gathering | None:
        return Gathering() if self.statistics == "re-estimated" else None

    def touches(self, site: Layer, part: nn.Module) -> Mapping[str, Touch]:
        if isinstance(part, NormPart):
            return {site.path: part.touch()}
        return {site.path: cast(AdapterPart, part).touch}

    def _is_adapted(self, layer: Layer) -> bool:
        size = (self.kernel_size, self.kernel_size)
        return layer.grid is not None and layer.grid.kernel_size == size and layer.grid.keeps

    def _nothing_found(self, anatomy: Anatomy) -> str:
        size = self.kernel_size
        where = "this base" if self.modules == "all" else f"the last {self.modules} stages of this base"
        message = f"{where} has no {size}x{size} convolution, which the {self.name} method adapts; "
        grids = [layer.grid for layer in anatomy.layers_from(self.modules) if layer.grid is not None]
        # A convolution that steps as far as it is wide cuts an image into patches.
        others = sorted({g.kernel_size[0] for g in grids if g.keeps and g.stride[0] < min(g.kernel_size)})
        if others:
            return message + f"kernel_size={others[0]} adapts those that it has"
        return message + "the lora and norm methods work on layers of other kinds"
