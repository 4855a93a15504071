"""Which tensors of a network hold the same channels, read from its data flow.

A convolution makes channels with the rows of its weight, a batch norm scales them one by one, activations and
pools keep them apart, an addition ties those of both operands, and the next layers take them with the columns
of their weights. What is not known to keep channels apart ends the search, and all channels that reach it are
left as they are.
"""

from collections.abc import Iterable
from copy import deepcopy
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from .channels import ChannelGroup, Channels, Use
from .sources import MergeError

_CONVOLUTIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_POINTWISE_NAMES = """relu relu6 leakyrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid
    tanh softplus softsign identity dropout dropout1d dropout2d dropout3d alphadropout abs square clone
    contiguous detach float to clamp"""
_POINTWISE = frozenset(_POINTWISE_NAMES.split())
_POOLS = frozenset(
    f"{kind}pool{dimensions}d"
    for kind in ("max", "avg", "lp", "adaptiveavg", "adaptivemax")
    for dimensions in (1, 2, 3)
)
_ARITHMETIC = frozenset(("add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv"))
_REDUCTIONS = frozenset(("mean", "sum", "amax", "amin"))
_HARMLESS = frozenset(("dim", "ndim", "ndimension", "dtype", "device", "requires_grad", "is_floating_point"))


def channel_groups(module: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """The groups of channels that a network makes.

    Args:
        module: the network; it stays as it is.
        example: a batch that it is run on once.

    Raises:
        MergeError: its data flow cannot be read.
    """
    copied = deepcopy(module).eval()
    try:
        graph = fx.symbolic_trace(copied)
        graph.graph.eliminate_dead_code()
        with torch.no_grad():
            ShapeProp(graph).propagate(example)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MergeError(
            f"the data flow of {type(module).__name__} cannot be read by torch.fx ({reason}), so it is not"
            " known which channels belong together"
        ) from error
    flow = _Flow(copied, graph)
    for node in graph.graph.nodes:
        flow.follow(node)
    return flow.finished()


class _Flow:
    """Follows channels through a graph, node by node."""

    def __init__(self, module: nn.Module, graph: fx.GraphModule) -> None:
        self.modules = dict(module.named_modules())
        self.groups: list[ChannelGroup] = []
        self.values: dict[fx.Node, Channels] = {}
        self.shape_of: dict[fx.Node, tuple[Channels, int]] = {}
        self.shared = _shared_layers(module, graph)

    def finished(self) -> list[ChannelGroup]:
        """The groups, their tensors in the order in which the network lists its layers."""
        found = [group for group in self.groups if group.found() is group]
        order = {path: place for place, path in enumerate(self.modules)}
        for group in found:
            group.uses.sort(key=lambda use: order[use.layer])
        return found

    def follow(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            return
        if node.op == "output":
            self._keep(node, "they are the network's output")
        elif node.op == "call_module":
            self._module(node, str(node.target), self.modules[str(node.target)])
        elif node.op == "call_method" or _is_torch(node.target):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            self._operation(node, name.strip("_") if name.startswith("__") else name.removesuffix("_"))
        else:
            self._unknown(node)

    def _module(self, node: fx.Node, path: str, layer: nn.Module) -> None:
        hooked = layer._forward_hooks or layer._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
        kind = type(layer)
        if hooked or len(node.args) != 1 or node.kwargs or kind.__module__.split(".")[0] != "torch":
            self._unknown(node)
        elif kind in _CONVOLUTIONS or kind is nn.Linear:
            self._weighted(node, path, cast("nn.Conv2d | nn.Linear", layer))
        elif kind in _NORMS:
            self._norm(node, path, cast(nn.BatchNorm2d, layer))
        else:
            self._operation(node, kind.__name__.lower())

    def _weighted(self, node: fx.Node, path: str, layer: nn.Conv2d | nn.Linear) -> None:
        """A convolution or linear layer: ends the channels of its input and makes new ones."""
        shape, given = _shape(node), self.values.get(cast(fx.Node, node.args[0]))
        is_linear = isinstance(layer, nn.Linear)
        axis = len(shape) - 1 if is_linear else 1
        made = ChannelGroup(shape[axis])
        made.uses += [
            Use(path, name, 0, "makes") for name in ("weight", "bias") if getattr(layer, name) is not None
        ]
        self.groups.append(made)
        self.values[node] = Channels(made, axis)
        plain = is_linear or (layer.groups == 1 and len(shape) == _CONVOLUTIONS[type(layer)])
        reason = "" if plain else f"'{path}' is a depth-wise or grouped convolution"
        made.kept_for = reason or self.shared.get(path, "")
        if given is None:
            return
        group = given.group.found()
        if given.axis != axis or (given.repeat > 1 and not is_linear):
            reason = reason or f"'{path}' does not take them as its channels"
        group.kept_for = group.kept_for or made.kept_for or reason
        group.uses.append(Use(path, "weight", 1, "takes", given.repeat))

    def _norm(self, node: fx.Node, path: str, layer: nn.BatchNorm2d) -> None:
        given = self.values.get(cast(fx.Node, node.args[0]))
        if given is None:
            return
        group = given.group.found()
        if given.axis != 1 or given.repeat > 1:
            self._unknown(node)
            return
        group.kept_for = group.kept_for or self.shared.get(path, "")
        group.uses += [
            Use(path, name, 0, "scales") for name in _NORM_TENSORS if getattr(layer, name) is not None
        ]
        self.values[node] = given

    def _functional_norm(self, node: fx.Node) -> None:
        """A batch norm that a module computes with its own tensors."""
        given = self.values.get(node.all_input_nodes[0])
        if given is None:
            return
        uses: list[Use] = []
        for place, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1):
            tensor = node.kwargs.get(name, node.args[place] if len(node.args) > place else None)
            if isinstance(tensor, fx.Node) and tensor.op == "get_attr":
                path, _, own = str(tensor.target).rpartition(".")
                uses.append(Use(path, own, 0, "scales"))
            elif tensor is not None:
                given = Channels(given.group, -1)
        if given.axis != 1 or given.repeat > 1:
            self._unknown(node)
            return
        group = given.group.found()
        group.uses += uses
        group.kept_for = next(
            (self.shared[use.layer] for use in uses if use.layer in self.shared), group.kept_for
        )
        self.values[node] = given

    def _operation(self, node: fx.Node, name: str) -> None:
        """A function, method or module without parameters, by its name."""
        name = name.replace("_", "") if "pool" in name or "relu" in name else name
        if name in ("size", "getattr", "getitem"):
            self._shape_read(node, name)
            return
        if name == "batch_norm":
            self._functional_norm(node)
            return
        if any(one in self.shape_of for one in node.all_input_nodes):
            self._unknown(node)
            return
        operands = [one for one in node.all_input_nodes if _is_tensor(one)]
        known = [self.values[one] for one in operands if one in self.values]
        if not known:
            return
        first, before, after = known[0], _shape(operands[0]), _shape(node)
        result: Channels | None = None
        if name in _ARITHMETIC and len(known) == len(operands):
            result = self._tied(known, [_shape(one) for one in operands])
        elif len(operands) > 1:
            result = None
        elif name in _POINTWISE:
            result = first
        elif name in _POOLS:
            spatial = int(name[-2])
            result = first if first.axis == 1 and len(before) == len(after) == spatial + 2 else None
        elif name in ("flatten", "view", "reshape"):
            result = _flattened(node, name, first, before, after)
        elif name in _REDUCTIONS:
            result = _reduced(node, first, len(before))
        elif name in _HARMLESS and not after:
            return
        if result is None:
            self._unknown(node)
        else:
            self.values[node] = result

    def _tied(self, known: list[Channels], shapes: list[tuple[int, ...]]) -> Channels | None:
        """The channels of a sum or product, entry by entry, of values with the same channels."""
        first = known[0]
        if len({(one.axis, one.repeat, one.group.found().channels) for one in known}) > 1:
            return None
        if len({(len(shape), shape[first.axis]) for shape in shapes}) > 1:
            return None
        for other in known[1:]:
            first.group.tie(other.group)
        return first

    def _shape_read(self, node: fx.Node, name: str) -> None:
        """``x.size()``, ``x.shape`` and their entries: the number of channels must not be computed with."""
        source = node.args[0]
        index = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(source, fx.Node) or (name == "getattr" and index in _HARMLESS):
            return
        if source in self.values and not _is_tensor(node) and (index is None or index == "shape"):
            self.shape_of[node] = self.values[source], len(_shape(source))
            return
        if source in self.shape_of and name == "getitem":
            channels, rank = self.shape_of[source]
        elif source in self.values and name == "size":
            channels, rank = self.values[source], len(_shape(source))
        else:
            self._unknown(node)
            return
        if not isinstance(index, int) or index % rank == channels.axis:
            _keep(channels, f"their number is read by '{node.name}'")

    def _unknown(self, node: fx.Node) -> None:
        what = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
        kind = f" ({type(self.modules[what]).__name__})" if node.op == "call_module" else ""
        self._keep(node, f"they go into '{what}'{kind}")

    def _keep(self, node: fx.Node, reason: str) -> None:
        for one in node.all_input_nodes:
            if one in self.values:
                _keep(self.values[one], reason)
            if one in self.shape_of:
                _keep(self.shape_of[one][0], reason)


def _keep(channels: Channels, reason: str) -> None:
    """Channels that stay as they are; the first reason is enough."""
    group = channels.group.found()
    group.kept_for = group.kept_for or reason


def _flattened(
    node: fx.Node, name: str, given: Channels, before: tuple[int, ...], after: tuple[int, ...]
) -> Channels | None:
    """(N, C, …) as (N, C · …), where the code does not name the number."""
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    if name != "flatten" and (not sizes or sizes[-1] != -1):
        return None
    if given.axis != 1 or len(after) != 2 or after[0] != before[0]:
        return None
    return Channels(given.group, 1, given.repeat * prod(before[2:]))


def _reduced(node: fx.Node, given: Channels, dimensions: int) -> Channels | None:
    """A mean or sum over other axes than that of the channels."""
    axes: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    kept = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    if axes is None or isinstance(kept, fx.Node):
        return None
    axes = {axis % dimensions for axis in (axes if isinstance(axes, Iterable) else (axes,))}
    if given.axis in axes or not set(node.kwargs) <= {"dim", "keepdim"}:
        return None
    lower = 0 if kept else sum(axis < given.axis for axis in axes)
    return Channels(given.group, given.axis - lower, given.repeat)


def _shared_layers(module: nn.Module, graph: fx.GraphModule) -> dict[str, str]:
    """Layers whose tensors are used in more than one place -> what to say of it."""
    owners: dict[int, set[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        owners.setdefault(id(tensor), set()).add(name.rpartition(".")[0])
    shared = {
        path: f"'{path}' shares its weights" for paths in owners.values() if len(paths) > 1 for path in paths
    }
    calls: list[str] = []
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.append(str(node.target))
        elif node.op == "get_attr":
            path = str(node.target).rpartition(".")[0]
            users = list(node.users)
            if len(users) > 1 or any(user.target is not nn.functional.batch_norm for user in users):
                shared[path] = f"the tensors of '{path}' are used outside of it too"
            calls += [str(node.target)]
    several = {name for name in calls if calls.count(name) > 1}
    paths = {*several, *(name.rpartition(".")[0] for name in several)}
    return shared | {path: f"'{path}' is called several times" for path in paths}


def _is_torch(target: Any) -> bool:
    return (getattr(target, "__module__", None) or "torch").split(".")[0] in (
        "torch",
        "_operator",
        "builtins",
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("tensor_meta"), TensorMetadata)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape) if _is_tensor(node) else ()
