"""Second moments of what enters each linear and convolution layer: all that RegMean knows of the data."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...touching import Freezer
from ..sources import MergeError

_ELEMENTS = 2**22
"""How many unfolded values are in memory at a time, in fp64."""


def layer_grams(module: nn.Module, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """XᵀX / rows of the inputs X of every linear and 2-D convolution layer, as `regmean` weights models by.

    A row of X is what one product with the weight takes in: an input vector (of a token, where there are
    many), or the part of the padded image under a kernel, in the order of the weight's own dimensions. It is
    read from the product itself and not from the layer's settings, so that a layer that pads in a way of its
    own is right, and one that does not use its weight as it is stored is left out. `regmean` averages what is
    left out: other kinds of layers, torch's ``MultiheadAttention``, and compiled or scripted parts.

    Args:
        module: the model; it runs in eval mode and stays as it is.
        images: batches of shape (B, C, H, W), on the module's device; a few hundred images are usual.

    Returns:
        Layer name -> fp64 tensor of shape (d, d), where d is the number of inputs, or of input channels times
        kernel height times kernel width; for a convolution of several groups (groups, d, d), with d of one
        group. Large layers take much memory: 170 MB for 512 channels and 3x3 kernels. safetensors'
        ``save_file`` stores it for a recipe.

    Raises:
        MergeError: there is no image.
    """
    recorder = _Inputs(module)
    with Freezer(module).frozen(hold_mode=True), torch.no_grad():
        for batch in images:
            with recorder:
                module(batch)
    if not recorder.rows:
        raise MergeError("no image went through a linear or convolution layer; give one or more images")
    means = {name: recorder.sums[name] / rows for name, rows in recorder.rows.items()}
    return {
        name: (mean[0] if len(mean) == 1 else mean).clone() for name, mean in recorder.by_every_name(means)
    }


class _Inputs(TorchFunctionMode):
    """Adds up the inputs of products with a module's weights while the module runs.

    Attributes:
        sums: layer -> Σ x xᵀ of each group, shape (groups, d, d).
        rows: layer -> how many were added up.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self._names: dict[int, list[str]] = {}
        self._weights: list[Tensor] = []  # held, so that their ids stay theirs
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name.rpartition(".")[2] == "weight":
                self._names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
                self._weights.append(parameter)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        matrices = _MATRICES.get(func)
        if matrices is not None:
            weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
            names = self._names.get(id(weight))
            if names is not None:
                for columns in matrices(*args, **kwargs):
                    self._add(names[0], columns)
        return func(*args, **kwargs)

    def by_every_name(self, found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The same for every name under which a layer stands in the module."""
        for names in self._names.values():
            if names[0] in found:
                yield from ((name, found[names[0]]) for name in names)

    def _add(self, name: str, columns: Tensor) -> None:
        """Adds columns, shape (groups, d, n)."""
        groups, width, count = columns.shape
        columns = columns.double()
        if name not in self.sums:
            self.sums[name] = columns.new_zeros(groups, width, width)
        self.sums[name].baddbmm_(columns, columns.mT)
        self.rows[name] = self.rows.get(name, 0) + count


def _of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
    """The columns that a linear product takes in, in parts of shape (1, d, n)."""
    del bias
    width = weight.shape[1]
    for rows in input.reshape(-1, width).split(max(_ELEMENTS // width, 1)):
        yield rows.T[None]


def _of_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Iterator[Tensor]:
    """The columns that a 2-D convolution takes in, in parts of shape (groups, d, n)."""
    del bias
    kernel, dilation = tuple(weight.shape[2:]), _pair(dilation)
    images = input if input.ndim == 4 else input[None]
    images = functional.pad(images, _padding(padding, kernel, dilation))
    places = images.shape[2] * images.shape[3]
    width = weight[0].numel()
    for part in images.split(max(_ELEMENTS // (groups * width * places), 1)):
        unfolded = functional.unfold(part, kernel, dilation=dilation, stride=_pair(stride))
        yield unfolded.unflatten(1, (groups, width)).permute(1, 2, 0, 3).flatten(2)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


def _padding(
    padding: str | int | Sequence[int], kernel: tuple[int, ...], dilation: tuple[int, int]
) -> list[int]:
    """What is added left, right, above and below, as `functional.pad` wants it."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        missing = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return [part for one in reversed(missing) for part in (one // 2, one - one // 2)]
    assert not isinstance(padding, str)
    height, width = _pair(padding)
    return [width, width, height, height]


_MATRICES: dict[Callable[..., Any], Callable[..., Iterator[Tensor]]] = {
    functional.linear: _of_linear,
    functional.conv2d: _of_convolution,
}
