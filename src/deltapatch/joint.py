"""Many patches on one batch: rows stand patch after patch, and each patch's own pieces see its own rows."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

_FEW = 4
"""Below so many patches a loop over their modules is as fast as one grouped computation."""
_SMALL = 50_000
"""Parameters of a module whose time on a processor goes into its calls rather than its arithmetic."""


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a batch are.

    Attributes:
        counts: rows of each patch; the first patch's rows come first.
        shared: whether the patches have all the same images. Then a computation that no patch has touched yet
            has ``counts[0]`` rows, which stand for every patch, until `fold` repeats them.
    """

    counts: tuple[int, ...]
    shared: bool = False

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return sum(self.counts)

    def fold(self, tensor: Tensor) -> Tensor:
        """The tensor with a row for each patch and image, of shape (total, ...)."""
        if len(tensor) == self.total:
            return tensor
        return tensor.repeat(len(self.counts), *[1] * (tensor.ndim - 1))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Each patch's rows of a tensor of shape (total, ...), or the shared rows once for each patch."""
        if len(tensor) != self.total:
            return (tensor,) * len(self.counts)
        return tensor.split(self.counts)

    def spread(self, values: Tensor) -> Tensor:
        """One value a patch, shape (patches, ...) -> one a row, shape (total, ...)."""
        counts = torch.tensor(self.counts, device=values.device)
        return values.repeat_interleave(counts, dim=0, output_size=self.total)

    def each(self, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
        """Every patch's module on that patch's rows of ``x``; the modules are alike but for their parameters.

        Args:
            modules: one for each patch, in eval mode; called with one tensor, they return one tensor.
            x: shape (total, ...), or the shared rows.

        Returns:
            shape (total, ...).
        """
        even = len(set(self.counts)) == 1
        if not (even and _is_worth_grouping(modules)):
            pieces = zip(modules, self.split(x), strict=True)
            return torch.cat([module(piece) for module, piece in pieces])
        is_shared = len(x) != self.total
        given = x if is_shared else x.unflatten(0, (len(modules), self.counts[0]))
        return grouped(modules, given, is_shared).flatten(0, 1)


def _is_worth_grouping(modules: Sequence[nn.Module]) -> bool:
    """On an accelerator one large kernel beats many; on a processor only the calls are worth saving."""
    if len(modules) < _FEW:
        return False
    parameters = list(modules[0].parameters())
    on_processor = all(parameter.device.type == "cpu" for parameter in parameters)
    return not on_processor or sum(parameter.numel() for parameter in parameters) <= _SMALL


def grouped(modules: Sequence[nn.Module], x: Tensor, shared: bool) -> Tensor:
    """Modules of one structure as one computation: convolutions become grouped ones, products batched ones.

    Args:
        modules: in eval mode, alike but for the values of their parameters and buffers.
        x: shape (modules, N, ...), or (N, ...) where ``shared``.

    Returns:
        shape (modules, N, ...).
    """
    states = [dict(module.state_dict(keep_vars=True)) for module in modules]
    tensors = {name: stacked([state[name] for state in states]) for name in states[0]}
    # A copy that shares its tensors: the call exchanges them, which another thread must not see.
    own = {id(tensor): tensor for tensor in states[0].values()}
    skeleton = deepcopy(modules[0], own)

    def one(state: dict[str, Tensor], given: Tensor) -> Tensor:
        return functional_call(skeleton, state, (given,))

    run: Callable[..., Tensor] = vmap(one, in_dims=(0, None if shared else 0))
    return run(tensors, x)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in one, of shape (count, ...): without a copy where they lie evenly in one storage.

    The resident patches of a `Shelf` do. No gradient flows back through it, so it is not done where one is
    asked for.
    """
    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return torch.stack(list(tensors))
    step = _even_step(tensors)
    if step is None:
        return torch.stack([tensor.detach() for tensor in tensors])
    return first.detach().as_strided((len(tensors), *first.shape), (step, *first.stride()))


def _even_step(tensors: Sequence[Tensor]) -> int | None:
    """How many elements apart the tensors lie, if that is the same for all and they share their storage."""
    first = tensors[0]
    storage = first.untyped_storage().data_ptr()
    alike = all(
        tensor.untyped_storage().data_ptr() == storage
        and (tensor.shape, tensor.stride(), tensor.dtype) == (first.shape, first.stride(), first.dtype)
        for tensor in tensors
    )
    offsets = [int(tensor.storage_offset()) for tensor in tensors]
    steps = {after - before for before, after in pairwise(offsets)}
    if not alike or len(steps) != 1:
        return None
    step = steps.pop()
    return step if step > 0 else None
