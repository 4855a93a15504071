"""Runs a sub-block with its join in other hands: the one way in which a patch reaches inside a sub-block.

The sub-block's own forward runs as it is written. Where its join is an addition, that addition is taken over
while it runs; where the join is the output, the output is.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .anatomy import SubBlock
from .errors import AnatomyError
from .trace import ADDITIONS
from .trees import replace_tensor, tensors_in


class Junction(Protocol):
    """What meets at a join."""

    @property
    def total(self) -> Tensor:
        """Residual branch plus shortcut, exactly as the base computes it."""
        ...

    @property
    def residual(self) -> Tensor:
        """The residual branch F_i(f_{i-1}) alone."""
        ...

    @property
    def shortcut(self) -> Tensor | None:
        """What the base's own skip brings: f_{i-1}, projected where the base projects it; None without a
        skip.
        """
        ...


JoinRule = Callable[[Junction], Tensor]
"""What stands in the place of the base's ``residual + shortcut``."""


@dataclass(frozen=True)
class AddedJunction:
    """A join that is one addition in the sub-block."""

    residual: Tensor
    shortcut: Tensor
    shortcut_first: bool

    @property
    def total(self) -> Tensor:
        return self.shortcut + self.residual if self.shortcut_first else self.residual + self.shortcut


@dataclass(frozen=True)
class OutputJunction:
    """A join at the sub-block's output: what the sub-block added to its input counts as its residual
    branch.
    """

    total: Tensor
    shortcut: Tensor | None

    @property
    def residual(self) -> Tensor:
        return self.total if self.shortcut is None else self.total - self.shortcut


_unseen: ContextVar[bool] = ContextVar("deltapatch_unseen", default=False)


@contextmanager
def unseen() -> Generator[None]:
    """For what a patch computes inside a sub-block: its additions do not count as the sub-block's own."""
    token = _unseen.set(True)
    try:
        yield
    finally:
        _unseen.reset(token)


class _TakeOver(TorchFunctionMode):
    """Replaces the result of one addition among those that run while the mode is active."""

    def __init__(self, addition: int, shortcut: int, rule: JoinRule) -> None:
        super().__init__()
        self.addition = addition
        self.shortcut = shortcut
        self.rule = rule
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ADDITIONS or _unseen.get():
            return func(*args, **(kwargs or {}))
        self.seen += 1
        if self.seen != self.addition + 1:
            return func(*args, **(kwargs or {}))
        joined = self.rule(AddedJunction(args[1 - self.shortcut], args[self.shortcut], self.shortcut == 0))
        # In place for the caller who wrote `y.add_(x)` and goes on with y; one who wrote `y += x` goes on
        # with what is returned, which may have more rows.
        in_place = func is torch.Tensor.add_ and joined.shape == args[0].shape
        return args[0].copy_(joined) if in_place else joined


def run_sub_block(
    sub_block: SubBlock, forward: Callable[..., Any], args: Any, kwargs: Any, rule: JoinRule
) -> Any:
    """The output of ``forward(*args, **kwargs)`` with the sub-block's join computed by ``rule``.

    Raises:
        AnatomyError: the sub-block did not run the addition that the anatomy found in it.
    """
    join = sub_block.join
    if join.addition is not None and join.shortcut is not None:
        take_over = _TakeOver(join.addition, join.shortcut, rule)
        with take_over:
            output = forward(*args, **kwargs)
        if take_over.seen <= join.addition:
            raise AnatomyError(
                f"{sub_block.path} ran {take_over.seen} additions where {join.addition + 1} were"
                f" expected; the base"
                " runs differently from when it was loaded (another mode or input kind), load it again"
            )
        return output
    shortcut = state_in(sub_block, args, kwargs) if join.has_shortcut else None
    if shortcut is not None and sub_block.overwrites_input:
        shortcut = shortcut.clone()
    output = forward(*args, **kwargs)
    total = tensors_in(output)[sub_block.output_position]
    return replace_tensor(output, sub_block.output_position, rule(OutputJunction(total, shortcut)))


def state_in(sub_block: SubBlock, args: Any, kwargs: Any) -> Tensor:
    """The state f_{i-1} among what a sub-block is called with."""
    return tensors_in((args, kwargs))[sub_block.input_position]
