"""The layers of a base: modules with tensors of their own, in the order in which they run.

Read from the record of one forward pass, as stages are: a tensor that no operation was given is none of a
layer's, and a tensor of a module that is never called (the output projection inside torch's attention, say)
belongs to the module around it that is.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from .touching import Touch, touched
from .trace import ModuleCall, Trace

LayerKind = Literal["convolution", "linear", "normalisation", "other"]

STATISTICS = ("running_mean", "running_var")
"""What normalisation layers call the statistics that they keep."""


@dataclass(frozen=True)
class OwnTensor:
    """A parameter or buffer of a layer.

    Attributes:
        name: as the layer calls it; with a dot where it belongs to a module inside that is never called.
        shape: its shape.
        is_parameter: whether it is a parameter; otherwise a buffer.
    """

    name: str
    shape: tuple[int, ...]
    is_parameter: bool


@dataclass(frozen=True)
class Grid:
    """What a two-dimensional convolution does to the positions of a map.

    Attributes:
        kernel_size: height and width.
        stride: vertical and horizontal.
        keeps: whether a map of H x W positions becomes one of ceil(H / stride) x ceil(W / stride).
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    keeps: bool


@dataclass(frozen=True)
class Layer:
    """A module that has tensors of its own and runs.

    Attributes:
        path: the module's name in the base; "" is the base itself.
        kind: what it computes with them.
        tensors: parameters, and buffers that its output depends on.
        in_channels: of a convolution or linear layer; 0 for others.
        out_channels: of a convolution or linear layer, or the channels that are normalised; 0 for others.
        grid: for two-dimensional convolutions.
    """

    path: str
    kind: LayerKind
    tensors: tuple[OwnTensor, ...]
    in_channels: int = 0
    out_channels: int = 0
    grid: Grid | None = None

    @property
    def parameters(self) -> tuple[OwnTensor, ...]:
        """Those of the tensors that are parameters."""
        return tuple(tensor for tensor in self.tensors if tensor.is_parameter)

    @property
    def has_statistics(self) -> bool:
        """Whether it normalises with statistics that were gathered while the base was trained."""
        return self.kind == "normalisation" and {tensor.name for tensor in self.tensors} >= set(STATISTICS)

    def tensor(self, name: str) -> OwnTensor | None:
        """The tensor of that name; None if it has none."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def find_layers(trace: Trace, called: Set[str]) -> tuple[Layer, ...]:
    """Every layer that ran, in the order of first calls; a layer that runs several times stands once.

    Args:
        trace: the record of one forward pass.
        called: the modules that are called when nobody records; see `called_modules`.
    """
    first_calls: dict[str, ModuleCall] = {}
    for call in trace.calls:
        if call.path in called:
            first_calls.setdefault(call.path, call)
    found = (_layer(trace, call, set(first_calls)) for call in first_calls.values())
    return tuple(layer for layer in found if layer.tensors)


@torch.no_grad()
def called_modules(root: nn.Module, example: Tensor) -> set[str]:
    """Names of the modules that a forward pass calls.

    A record sees more: torch's transformer layers call what is inside of them only while hooks hang on it,
    and otherwise compute with its tensors in one piece.
    """
    called: set[str] = set()

    def noted(path: str) -> Touch:
        def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.add(path)
            return forward(*args, **kwargs)

        return touch

    with touched({module: noted(path) for path, module in root.named_modules()}):
        root(example)
    return called


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises: torch's own kinds, and others that are named so and hold vectors."""
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return True
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    named_so = any("norm" in cls.__name__.lower() for cls in type(module).__mro__)
    return named_so and bool(own) and all(tensor.squeeze().ndim <= 1 for tensor in own)


def _layer(trace: Trace, call: ModuleCall, called: set[str]) -> Layer:
    module = call.module
    kind = _kind(module)
    tensors = _own_tensors(trace, module, call.path, called, kind == "normalisation")
    if kind in ("convolution", "linear") and not any(tensor.name == "weight" for tensor in tensors):
        kind = "other"
    inputs, outputs = _channels(module, kind, tensors)
    return Layer(call.path, kind, tensors, inputs, outputs, _grid(trace, call, kind))


def _kind(module: nn.Module) -> LayerKind:
    if isinstance(module, _ConvNd):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    return "normalisation" if is_normalisation(module) else "other"


def _own_tensors(
    trace: Trace, module: nn.Module, path: str, called: set[str], with_buffers: bool
) -> tuple[OwnTensor, ...]:
    """The module's tensors that were used, and those of modules inside it that were never called."""
    named: list[tuple[str, Tensor, bool]] = []
    for name, inner in module.named_modules():
        full = f"{path}.{name}".strip(".")
        if name and any(_is_within(full, other) and _is_within(other, path) for other in called - {path}):
            continue
        prefix = f"{name}." if name else ""
        named += [(prefix + own, tensor, True) for own, tensor in inner.named_parameters(recurse=False)]
        if with_buffers and not name:
            named += [(own, tensor, False) for own, tensor in inner.named_buffers(recurse=False)]
    return tuple(
        OwnTensor(name, tuple(tensor.shape), is_parameter)
        for name, tensor, is_parameter in named
        if tensor.is_floating_point() and trace.uses(tensor)
    )


def _is_within(path: str, outer: str) -> bool:
    return not outer or (path + ".").startswith(outer + ".")


def _channels(module: nn.Module, kind: LayerKind, tensors: tuple[OwnTensor, ...]) -> tuple[int, int]:
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if kind == "normalisation":
        return 0, max((max(tensor.shape, default=1) for tensor in tensors), default=0)
    return 0, 0


def _grid(trace: Trace, call: ModuleCall, kind: LayerKind) -> Grid | None:
    module = call.module
    if kind != "convolution" or not isinstance(module, nn.Conv2d) or not call.inputs or not call.outputs:
        return None
    (height, width), stride = module.kernel_size, module.stride
    given, made = trace.shapes[call.inputs[0]][-2:], trace.shapes[call.outputs[0]][-2:]
    expected = tuple(ceil(size / step) for size, step in zip(given, stride, strict=True))
    return Grid((height, width), (stride[0], stride[1]), made == expected)
