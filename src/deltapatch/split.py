"""Cuts a model where a patch begins: what runs before it (the trunk) need not run again.

No graph is rewritten. The tail is the model's own forward in which the modules of the trunk return empty
placeholders of the right shape, and the module at the divergence is handed the stored activations instead.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base
from .patch import Patch
from .patched import touches_of
from .touching import Touch, touched
from .trace import ModuleCall, Trace, record
from .trees import exchange_tensors, tensors_in


class _Reached(Exception):
    """Ends a forward pass at the divergence."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = given


@dataclass(frozen=True)
class Split:
    """A base cut before one module. Make one with `split_before`; it is verified equal to the whole.

    Attributes:
        base: the base.
        divergence: name of the module where the tail begins.
        placeholders: trunk module -> the structure that it returns, as tensors without memory for one image.
    """

    base: Base
    divergence: str
    placeholders: Mapping[nn.Module, Any]

    @torch.no_grad()
    def trunk(self, images: Tensor) -> list[Tensor]:
        """Runs the trunk; what the divergence is given, one row an image each: tensors of shape (N, ...)."""

        def stop(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            raise _Reached(tensors_in((args, kwargs)))

        with self.base.freezer.frozen():
            try:
                with touched({self.base.submodule(self.divergence): stop}, instead_of=self.base.module):
                    self.base.module(images)
            except _Reached as reached:
                return reached.given
        raise AssertionError("a verified split reaches its divergence")

    def tail(self, activations: list[Tensor], patch: Patch | None = None) -> Any:
        """The model's output from the activations on, with the patch's touches where there is one."""
        module = self.base.submodule(self.divergence)
        touches = {} if patch is None else touches_of(self.base, patch)
        inner = touches.get(module)

        def begin(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            args, kwargs = exchange_tensors((args, kwargs), iter(activations))
            return forward(*args, **kwargs) if inner is None else inner(forward, *args, **kwargs)

        images = len(activations[0])
        for trunk_module, template in self.placeholders.items():
            touches[trunk_module] = _placeholder_touch(template, images)
        touches[module] = begin
        size = self.base.preprocessing.input_size
        nothing = torch.zeros((), device=activations[0].device, dtype=self.base.dtype).expand(images, *size)
        with self.base.freezer.frozen(), touched(touches, instead_of=self.base.module):
            return self.base.module(nothing)


def split_before(base: Base, divergence: str) -> Split | None:
    """The base cut before a module, or before the innermost module around it where a cut gives the same
    answers.

    None where there is no such place: the tail needs more of the trunk than what one module is given.
    """
    while divergence:
        split = _split_at(base, divergence)
        if split is not None:
            return split
        divergence = divergence.rpartition(".")[0]
    return None


@torch.no_grad()
def _split_at(base: Base, divergence: str) -> Split | None:
    example = base.example()
    with base.freezer.frozen():
        trace, output = record(base.module, example)
        calls = [call for call in trace.calls if call.path == divergence]
        if len(calls) != 1:
            return None
        trunk_modules = _trunk_modules(trace, calls[0])
        if trunk_modules is None:
            return None
        split = Split(base, divergence, _templates(base, trunk_modules, example))
    given = split.trunk(example)
    if (
        not given
        or any(len(tensor) != len(example) for tensor in given if tensor.ndim)
        or not all(t.ndim for t in given)
    ):
        return None
    try:
        again = split.tail(given)
    except Exception:
        # Whatever went wrong among placeholders, the model runs whole instead.
        return None
    expected = tensors_in(output)
    same = all(map(torch.equal, tensors_in(again), expected)) and len(tensors_in(again)) == len(expected)
    return split if same else None


def _trunk_modules(trace: Trace, divergence: ModuleCall) -> list[nn.Module] | None:
    """The outermost modules that were through before the divergence began; None if one of them runs again
    later.
    """
    ancestors = {""}
    for part in divergence.path.split(".")[:-1]:
        ancestors.add(f"{max(ancestors, key=len)}.{part}".lstrip("."))
    before: list[nn.Module] = []
    for call in trace.calls:
        if call.path in ancestors or call is divergence:
            continue
        parent = trace.calls[call.parent] if call.parent >= 0 else None
        is_outermost = parent is None or parent.path in ancestors
        if is_outermost and call.end <= divergence.start:
            before.append(call.module)
    later = [call.module for call in trace.calls[trace.calls.index(divergence) :]]
    return None if _any_in(before, later) else before


def _any_in(modules: Iterable[nn.Module], others: list[nn.Module]) -> bool:
    known = set(others)
    return any(inner in known for module in modules for inner in module.modules())


def _templates(base: Base, modules: list[nn.Module], example: Tensor) -> dict[nn.Module, Any]:
    """What each trunk module returns for the example, as tensors that keep shape and dtype but no memory."""
    templates: dict[nn.Module, Any] = {}

    def note(module: nn.Module) -> Touch:
        def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            empty = (
                t.new_zeros(()).expand(1 if len(t) == len(example) else len(t), *t.shape[1:])
                for t in tensors_in(output)
            )
            templates[module] = exchange_tensors(output, empty)
            return output

        return touch

    with touched({module: note(module) for module in modules}):
        base.module(example)
    return templates


def _placeholder_touch(template: Any, images: int) -> Touch:
    def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return exchange_tensors(template, (t.expand(images, *t.shape[1:]) for t in tensors_in(template)))

    return touch
