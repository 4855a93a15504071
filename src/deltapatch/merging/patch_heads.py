"""The heads of merged patches: one layer that holds all of them, and what becomes of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..base import Base
from ..info import HeadReference
from ..patch import Patch
from .sources import MergeError

Heads = Literal["own", "joint", "average"]
"""What becomes of heads: a patch for each task with its own; one patch with one over the classes of all; or
one with the mean of the heads, for patches of the same classes."""


def with_heads(
    base: Base, body: Patch, inputs: Mapping[str, Patch], heads: Heads
) -> tuple[Patch, dict[str, slice]]:
    """The body with one head that holds those of all inputs, and which of its outputs are whose."""
    found = {name: patch.head for name, patch in inputs.items() if patch.head is not None}
    headless = [name for name in inputs if name not in found]
    if not body.parts and heads == "own":
        raise MergeError(
            "patches of the head method have nothing but their heads, and heads of different tasks are not"
            " merged; heads='joint' makes one over all classes, heads='average' the mean for the same classes"
        )
    if headless and heads != "own":
        raise MergeError(f"patch '{headless[0]}' has no head, so there is no {heads} head; leave that out")
    if not found:
        return body, {}
    if heads == "average":
        return _average_head(base, body, inputs)
    columns: dict[str, slice] = {}
    end = 0
    for name, head in found.items():
        columns[name] = slice(end, end + head.out_features)
        end += head.out_features
    stacked = _linear([head.weight for head in found.values()], [head.bias for head in found.values()])
    names = _class_names({name: inputs[name].classes for name in found})
    return headed(body, names, stacked.to(base.device)), columns


def _average_head(base: Base, body: Patch, inputs: Mapping[str, Patch]) -> tuple[Patch, dict[str, slice]]:
    (first_name, first), *others = inputs.items()
    for name, patch in others:
        if patch.classes != first.classes:
            raise MergeError(
                f"patches '{first_name}' and '{name}' have different classes, so their heads have no mean;"
                " give heads='own' or 'joint'"
            )
    every = [patch.head for patch in inputs.values() if patch.head is not None]
    weight = torch.stack([head.weight.detach().double() for head in every]).mean(0)
    bias = torch.stack([head.bias.detach().double() for head in every]).mean(0)
    head = _linear([weight.float()], [bias.float()]).to(base.device)
    return headed(body, first.classes, head), dict.fromkeys(inputs, slice(0, len(first.classes)))


@torch.no_grad()
def _linear(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> nn.Linear:
    """One layer with the outputs of several, in their order."""
    weight, bias = torch.cat(list(weights)), torch.cat(list(biases))
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


def _class_names(classes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The classes of all patches; with the patch's name before each where some are called the same."""
    every = [name for names in classes.values() for name in names]
    if len(set(every)) < len(every):
        every = [f"{patch}/{name}" for patch, names in classes.items() for name in names]
    return tuple(every)


def headed(body: Patch, classes: Sequence[str], head: nn.Linear) -> Patch:
    """A patch with the body's parts, shared and not copied, and this head."""
    reference = HeadReference(in_features=head.in_features)
    changed = body.info.model_copy(update={"classes": tuple(classes), "head": reference})
    patch = Patch.outline(changed, Path(body.info.base.name))
    patch.parts, patch.head = body.parts, head
    return patch.eval()


def results_of(
    student: Patch, inputs: Mapping[str, Patch], columns: Mapping[str, slice], heads: Heads
) -> dict[str, Patch]:
    if heads != "own":
        return {"merged": student}
    results: dict[str, Patch] = {}
    for name, patch in inputs.items():
        if student.head is None or name not in columns:
            results[name] = student.without_head()
            continue
        place = columns[name]
        own = _linear([student.head.weight[place]], [student.head.bias[place]])
        results[name] = headed(student, patch.classes, own)
    return results
