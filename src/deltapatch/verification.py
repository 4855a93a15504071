"""Proof, by running the model, that what an anatomy says is true of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Stage, SubBlock
from .errors import AnatomyError
from .joining import Junction, run_sub_block, state_in
from .touching import Touch, touched
from .trees import tensors_in


class StageRefused(Exception):
    """A stage whose parts do not make up the stage again."""


@torch.no_grad()
def verify_anatomy(root: nn.Module, anatomy: Anatomy, example: Tensor) -> Anatomy:
    """The anatomy with those stages that hold: recomputed from their parts they equal the base bit for bit.

    Two things are run for all stages at once, and for each one alone if that fails:

    1. every join recomputed as its residual branch + its shortcut: the model's outputs are unchanged;
    2. every join moved a little: every sub-block's output changes, so the joins are really on the way.

    Raises:
        AnatomyError: the model does not give the same answer twice, so nothing can be proved about it.
    """
    expected = tensors_in(root(example))
    if not _equal(tensors_in(root(example)), expected):
        raise AnatomyError(
            f"{type(root).__name__} gave two different answers to one input in eval mode; a base must"
            f" be deterministic"
        )
    if not anatomy.stages or _holds(root, anatomy.stages, example, expected):
        return anatomy
    return replace(anatomy, stages=tuple(s for s in anatomy.stages if _holds(root, (s,), example, expected)))


def _holds(root: nn.Module, stages: tuple[Stage, ...], example: Tensor, expected: list[Tensor]) -> bool:
    """Whether recomputing the joins changes nothing, and moving them changes every sub-block's output."""
    try:
        outputs, recomputed = _run(root, stages, example, lambda junction: junction.total)
        _, moved = _run(root, stages, example, lambda junction: junction.residual * 0.5 + 0.25)
    except (AnatomyError, StageRefused):
        return False
    return _equal(outputs, expected) and not any(map(torch.equal, recomputed, moved))


def _run(
    root: nn.Module, stages: tuple[Stage, ...], example: Tensor, rule: Callable[[Junction], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The model's outputs and the sub-blocks' outputs with every join computed by ``rule``."""
    states: list[Tensor] = []
    touches: dict[nn.Module, Touch] = {}
    for stage in stages:
        for position, sub_block in enumerate(stage.sub_blocks):
            touch = _checked_touch(stage, sub_block, position, len(example), rule, states)
            touches[root.get_submodule(sub_block.path)] = touch
    with touched(touches):
        return tensors_in(root(example)), states


def _checked_touch(
    stage: Stage,
    sub_block: SubBlock,
    position: int,
    batch: int,
    rule: Callable[[Junction], Tensor],
    states: list[Tensor],
) -> Touch:
    """Runs a sub-block by its parts, notes its output, refuses the stage where a shape is not what was
    found.
    """
    axis = 1 if stage.layout == "NCHW" else -1

    def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = state_in(sub_block, args, kwargs)
        channels = stage.in_channels if position == 0 else stage.channels
        if state.shape[axis] != channels or len(state) != batch:
            raise StageRefused(f"{sub_block.path} was given {tuple(state.shape)}, not {channels} channels")

        def checked(junction: Junction) -> Tensor:
            joined = rule(junction)
            if joined.shape[axis] != stage.channels or len(joined) != batch:
                raise StageRefused(f"the join of {sub_block.path} has shape {tuple(joined.shape)}")
            return joined

        output = run_sub_block(sub_block, forward, args, kwargs, checked)
        states.append(tensors_in(output)[sub_block.output_position].clone())
        return output

    return touch


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))
