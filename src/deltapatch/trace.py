"""A record of one forward pass: which module was called with what, and which operation made which value.

This is what `deltapatch.anatomy` reads. Nothing here knows what a stage is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .trees import tensors_in

ADDITIONS = frozenset({torch.add, torch.Tensor.add, torch.Tensor.add_})
"""What ``a + b``, ``a += b``, ``torch.add(a, b)`` and their relatives look like to a function mode."""

_WEIGHTED = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "bilinear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "bmm",
        "mm",
        "addmm",
        "baddbmm",
        "einsum",
        "multi_head_attention_forward",
    ]
)


@dataclass(frozen=True)
class Operation:
    """One torch function call. Values are numbers: each tensor gets a new one whenever it is written."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    owner: int
    """Index of the innermost module call that it ran in."""
    is_addition: bool
    is_plain: bool
    """Whether it had exactly two arguments and no keyword (``a + b``, not ``torch.add(a, b, alpha=2)``)."""

    @property
    def is_weighted(self) -> bool:
        """Whether it mixes channels or positions with weights (convolution, linear, matrix product)."""
        return self.name in _WEIGHTED


@dataclass
class ModuleCall:
    """One call of one module; ``operations[start:end]`` of the trace ran inside it."""

    path: str
    module: nn.Module
    parent: int
    start: int
    inputs: tuple[int, ...]
    end: int = -1
    outputs: tuple[int, ...] = ()


@dataclass
class Trace:
    """Everything that happened in one forward pass."""

    calls: list[ModuleCall] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    producer: dict[int, int] = field(default_factory=dict)
    """Value -> index of the operation that made it; values without one came from outside."""
    overwritten: dict[int, int] = field(default_factory=dict)
    """Value -> index of the in-place operation that destroyed it."""
    outputs: tuple[int, ...] = ()
    """The values that the root module returned."""
    used: frozenset[int] = frozenset()
    """Identities of all tensors that an operation was given or made; see `uses`."""

    def uses(self, tensor: Tensor) -> bool:
        """Whether an operation was given the tensor, which must have lived since before the record."""
        return id(tensor) in self.used

    def children(self) -> dict[str, list[int]]:
        """Parent path -> calls of its direct children in the order in which they ran, once-called modules
        only.
        """
        times: dict[str, int] = {}
        for call in self.calls:
            times[call.path] = times.get(call.path, 0) + 1
        groups: dict[str, list[int]] = {}
        for index, call in enumerate(self.calls):
            if call.path and times[call.path] == 1:
                groups.setdefault(call.path.rpartition(".")[0], []).append(index)
        return groups

    def source(self, value: int, through: Iterable[int] = ()) -> Iterator[int]:
        """The value, then what it was made from as long as that is one value of the same shape, unweighted.

        Activations, dropouts, scalings by a parameter and identities are looked through; a value of
        ``through`` is where the walk ends.
        """
        stop = set(through)
        while True:
            yield value
            if value in stop or value not in self.producer:
                return
            operation = self.operations[self.producer[value]]
            made = [v for v in operation.inputs if v in self.producer or v in stop]
            if operation.is_weighted or len(made) != 1 or self.shapes[made[0]] != self.shapes[value]:
                return
            value = made[0]


class _Recorder(TorchFunctionMode):
    """Fills a `Trace` while it is active. Keeps every tensor alive, so that identities stay unique."""

    def __init__(self, root: nn.Module, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.paths = {module: path for path, module in root.named_modules()}
        self.stack: list[int] = []
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []

    def number(self, tensor: Tensor) -> int:
        known = self.numbers.get(id(tensor))
        return self.new_number(tensor) if known is None else known

    def new_number(self, tensor: Tensor) -> int:
        self.alive.append(tensor)
        self.numbers[id(tensor)] = len(self.trace.shapes)
        self.trace.shapes.append(tuple(tensor.shape))
        return self.numbers[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in((args, kwargs or {}))
        inputs = tuple(self.number(t) for t in given)
        versions = {id(t): t._version for t in given}
        result = func(*args, **(kwargs or {}))
        # An operation that hands its argument back untouched (dropout in eval mode, contiguous()) made
        # nothing.
        made = [t for t in tensors_in(result) if versions.get(id(t)) != t._version]
        if made:
            index = len(self.trace.operations)
            for tensor in made:
                if id(tensor) in versions:
                    self.trace.overwritten[self.numbers[id(tensor)]] = index
            outputs = tuple(self.new_number(t) for t in made)
            self.trace.producer.update(dict.fromkeys(outputs, index))
            self.trace.operations.append(
                Operation(
                    name=getattr(func, "__name__", str(func)),
                    inputs=inputs,
                    outputs=outputs,
                    owner=self.stack[-1] if self.stack else -1,
                    is_addition=func in ADDITIONS,
                    is_plain=len(args) == 2 and len(inputs) == 2 and not kwargs,
                )
            )
        return result

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = self.stack[-1] if self.stack else -1
        inputs = tuple(self.number(t) for t in tensors_in((args, kwargs)))
        self.stack.append(len(self.trace.calls))
        call = ModuleCall(self.paths[module], module, parent, len(self.trace.operations), inputs)
        self.trace.calls.append(call)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.trace.calls[self.stack.pop()]
        call.end = len(self.trace.operations)
        call.outputs = tuple(self.number(t) for t in tensors_in(output))


def record(root: nn.Module, example: Tensor) -> tuple[Trace, Any]:
    """Runs ``root(example)`` once without gradients and returns the record and the output.

    The hooks that this needs are taken off again, whatever happens.
    """
    trace = Trace()
    recorder = _Recorder(root, trace)
    handles: list[Any] = []
    try:
        for module in recorder.paths:
            handles.append(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.after, with_kwargs=True))
        with torch.no_grad(), recorder:
            output = root(example)
    finally:
        for handle in handles:
            handle.remove()
    trace.outputs = tuple(recorder.number(t) for t in tensors_in(output))
    trace.used = frozenset(recorder.numbers)
    return trace, output
