"""Tensors in nested structures: found in one order, and exchanged without changing anything else."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch

from deltapatch.trees import replace_tensor, tensors_in

A, B, C = (torch.tensor(float(value)) for value in (1, 2, 3))


class Pair(NamedTuple):
    left: object
    right: object


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (A, [A]),
        ((A, [B, {"x": C}]), [A, B, C]),
        ({"b": B, "a": A}, [B, A]),
        (((), {"mask": None, "size": 3}), []),
        (Pair(A, (B,)), [A, B]),
        ([A, "text", A], [A, A]),
    ],
)
def test_tensors_are_found_depth_first_and_all_else_is_passed_over(
    tree: object, expected: list[object]
) -> None:
    found = tensors_in(tree)
    assert len(found) == len(expected)
    assert all(tensor is wanted for tensor, wanted in zip(found, expected, strict=True))


def test_the_tensor_at_a_position_is_exchanged_and_the_rest_is_the_same_object() -> None:
    tree = (A, [B, {"x": C, "size": 3}])
    changed = replace_tensor(tree, 1, C)
    assert changed == (A, [C, {"x": C, "size": 3}])
    assert changed[0] is A
    assert tree == (A, [B, {"x": C, "size": 3}])


def test_a_position_beyond_the_last_changes_nothing() -> None:
    assert replace_tensor([A, B], 2, C) == [A, B]


@pytest.mark.parametrize(
    "tree", [OrderedDict(first=A, second=B), Pair(A, B), (A, B), [A, B], {"x": A, "y": B}]
)
def test_the_kind_of_container_is_kept(tree: object) -> None:
    changed = replace_tensor(tree, 1, C)
    assert type(changed) is type(tree)
    assert tensors_in(changed)[1] is C
