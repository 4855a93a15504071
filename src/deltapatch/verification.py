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
    2. every join moved a little: the model's outputs change, so the joins are really on the way.

    Raises:
        AnatomyError: the model does not give the same answer twice, so nothing can be proved about it.
    """
    expected = tensors_in(root(example))
    if not _equal(tensors_in(root(example)), expected):
        raise AnatomyError(
            f"{type(root).__name__} gave two different answers to one input in eval mode; a base must be deterministic"
        )
    if not anatomy.stages or all(_holds(root, anatomy.stages, example, expected)):
        return anatomy
    stages = tuple(stage for stage in anatomy.stages if all(_holds(root, (stage,), example, expected)))
    return replace(anatomy, stages=stages)


def _holds(
    root: nn.Module, stages: tuple[Stage, ...], example: Tensor, expected: list[Tensor]
) -> tuple[bool, bool]:
    """Whether recomputing the joins changes nothing, and moving them changes something."""
    try:
        recomputed = _run(root, stages, example, lambda junction: junction.total)
        moved = _run(root, stages, example, lambda junction: junction.residual * 0.5 + 0.25)
    except (AnatomyError, StageRefused):
        return False, False
    return _equal(recomputed, expected), not _equal(moved, expected)


def _run(root: nn.Module, stages: tuple[Stage, ...], example: Tensor, rule: Callable[[Junction], Tensor]) -> list[Tensor]:
    touches: dict[nn.Module, Touch] = {}
    for stage in stages:
        for position, sub_block in enumerate(stage.sub_blocks):
            touch = _checked_touch(stage, sub_block, position, len(example), rule)
            touches[root.get_submodule(sub_block.path)] = touch
    with touched(touches):
        return tensors_in(root(example))


def _checked_touch(
    stage: Stage, sub_block: SubBlock, position: int, batch: int, rule: Callable[[Junction], Tensor]
) -> Touch:
    """Runs a sub-block by its parts and refuses the stage where a shape is not what the anatomy says."""

    def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = state_in(sub_block, args, kwargs)
        channels = stage.in_channels if position == 0 else stage.channels
        axis = 1 if stage.layout == "NCHW" else -1
        if state.shape[axis] != channels or len(state) != batch:
            raise StageRefused(f"{sub_block.path} was given {tuple(state.shape)}, not {channels} channels")

        def checked(junction: Junction) -> Tensor:
            joined = rule(junction)
            if joined.shape[axis] != stage.channels or len(joined) != batch:
                raise StageRefused(f"the join of {sub_block.path} has shape {tuple(joined.shape)}")
            return joined

        return run_sub_block(sub_block, forward, args, kwargs, checked)

    return touch


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))
