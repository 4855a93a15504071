"""Tensors inside the nested tuples, lists and dicts that modules take and return."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a nested structure, depth first, in a fixed order; anything else is passed over."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [tensor for item in tree.values() for tensor in tensors_in(item)]
    if isinstance(tree, (tuple, list)):
        return [tensor for item in tree for tensor in tensors_in(item)]
    return []


def exchange_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The same structure with its tensors exchanged for others, in the order of `tensors_in`."""
    supply = iter(tensors)

    def rebuilt(node: Any) -> Any:
        if isinstance(node, Tensor):
            return next(supply)
        if isinstance(node, Mapping):
            items = {key: rebuilt(item) for key, item in node.items()}
            return items if type(node) is dict else type(node)(items)  # pyright: ignore[reportCallIssue]
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*(rebuilt(item) for item in node))
        if isinstance(node, (tuple, list)):
            return type(node)(rebuilt(item) for item in node)
        return node

    return rebuilt(tree)


def replace_tensor(tree: Any, position: int, tensor: Tensor) -> Any:
    """The same structure with the tensor at ``position`` (counted as in `tensors_in`) exchanged."""
    tensors = tensors_in(tree)
    return exchange_tensors(tree, [*tensors[:position], tensor, *tensors[position + 1 :]])
