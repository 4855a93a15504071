"""A layer that computes with other tensors for one call: the way in which a patch changes weights.

The layer's own class runs on a *stand-in*, a shallow copy that shares everything with the layer but the
tensors that are exchanged. So a convolution stays the convolution that it is (grouped, dilated, padded,
weight-standardised), and the base's own tensors are never written, whatever other threads do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from .errors import AnatomyError
from .joining import unseen
from .touching import Touch, is_shadowed

USUAL_MOMENTUM = 0.1
"""Of running statistics, as torch has it."""


@dataclass(frozen=True)
class Exchange:
    """A touch: the layer runs with the tensors that ``tensors(layer)`` gives in place of its own.

    Attributes:
        tensors: the layer -> name of a tensor -> what stands in its place, computed anew in each call.
        training: whether the layer runs in train mode, as a norm that gathers its own statistics does.
        momentum: of the layer's running statistics; None keeps the layer's own.
    """

    tensors: Callable[[nn.Module], Mapping[str, Tensor]]
    training: bool = False
    momentum: float | None = None

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module = _owner(forward)
        with unseen():
            tensors = self.tensors(module)
        copy = stand_in(module, tensors)
        copy.training = self.training
        if self.momentum is not None:
            copy.__dict__["momentum"] = self.momentum
        elif self.training and copy.__dict__.get("momentum", USUAL_MOMENTUM) is None:
            # Such a norm averages over all batches that it has counted, and the patch counts none.
            copy.__dict__["momentum"] = USUAL_MOMENTUM
        if not self.training:
            return type(module).forward(copy, *args, **kwargs)
        # A norm in train mode counts its batches; that addition is none of the sub-block's around it.
        with unseen():
            return type(module).forward(copy, *args, **kwargs)


def stand_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A shallow copy of a module with some of its tensors exchanged; the module itself is not changed.

    Args:
        module: the module.
        tensors: name -> tensor; a name with a dot belongs to a module inside, which is copied too.
    """
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    if is_shadowed(module, "forward"):
        del copy.__dict__["forward"]
    for kind in ("_parameters", "_buffers"):
        mine: dict[str, Any] = module.__dict__[kind]
        copy.__dict__[kind] = {name: own.get(name, tensor) for name, tensor in mine.items()}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(child, {})[rest] = tensor
    children: dict[str, Any] = module.__dict__["_modules"]
    exchanged = {name: stand_in(children[name], found) for name, found in inner.items()}
    copy.__dict__["_modules"] = {**children, **exchanged}
    return copy


def chained(first: Touch, second: Touch) -> Touch:
    """One touch for a module that two touches are for; where one exchanges tensors, it is the inner one.

    Raises:
        AnatomyError: both exchange tensors, so one would undo the other.
    """
    if isinstance(first, Exchange) and isinstance(second, Exchange):
        raise AnatomyError("two methods of one patch change the weights of one layer; leave one of them out")
    outer, inner = (second, first) if isinstance(first, Exchange) else (first, second)

    def both(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return outer(partial(inner, forward), *args, **kwargs)

    return both


def merged(touches: Mapping[Any, Touch], others: Mapping[Any, Touch]) -> dict[Any, Touch]:
    """Both sets of touches; those of one module are chained, the first set's outermost."""
    shared = {key: chained(touches[key], others[key]) for key in touches.keys() & others.keys()}
    return {**touches, **others, **shared}


def _owner(forward: Callable[..., Any]) -> nn.Module:
    """The module whose forward it is."""
    module = getattr(forward, "__self__", None)
    if not isinstance(module, nn.Module) or getattr(forward, "__func__", None) is not type(module).forward:
        name = type(module).__name__ if isinstance(module, nn.Module) else "a module"
        raise AnatomyError(
            f"{name} has a forward of its own on the instance, so it cannot run with other weights; take off"
            " what wrapped it (offloading hooks, say) and load the base again"
        )
    return module
