"""The data flow of one sub-block: which addition is the join, and which operand is the shortcut."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import NormUnit, Unit

from deltapatch.flow import BlockFlow
from deltapatch.trace import record

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual unit written in any way: ``join`` is given the branch's output, the input and the unit."""

    def __init__(self, join: Callable[[Tensor, Tensor, "Block"], Tensor]) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.extra = nn.Conv2d(4, 4, 1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branch(x), x, self)


def _flow(block: nn.Module) -> BlockFlow:
    trace, _ = record(block.eval(), IMAGES)
    return BlockFlow(trace, trace.calls[0], input_position=0, output_position=0)


def _plus_equals(y: Tensor, x: Tensor, block: Block) -> Tensor:
    y += x
    return y


@pytest.mark.parametrize(
    ("join", "shortcut"),
    [
        (lambda y, x, block: y + x, 1),
        (lambda y, x, block: x + y, 0),
        (lambda y, x, block: torch.add(y, x), 1),
        (lambda y, x, block: y.add(x), 1),
        (lambda y, x, block: y.add_(x), 1),
        (_plus_equals, 1),
        (lambda y, x, block: functional.relu(y + x), 1),
        (lambda y, x, block: functional.relu_(y + x), 1),
        (lambda y, x, block: y + block.extra(x), 1),
        (lambda y, x, block: functional.dropout(y, training=False) + x, 1),
    ],
)
def test_the_shortcut_is_the_operand_with_fewer_weights_on_its_way(
    join: Callable[..., Tensor], shortcut: int
) -> None:
    flow = _flow(Block(join))
    assert (flow.addition, flow.shortcut) == (0, shortcut)
    assert flow.has_shortcut
    assert flow.is_residual_unit
    assert not flow.projects


@pytest.mark.parametrize(
    ("join", "has_shortcut"),
    [
        (lambda y, x, block: y, False),
        (lambda y, x, block: torch.cat([y, x], 1)[:, :4], False),
        (lambda y, x, block: y * x, False),
        (lambda y, x, block: torch.relu(y) + 1, False),
        (lambda y, x, block: block.extra(y + x), False),
        (lambda y, x, block: torch.add(y, x, alpha=2), True),
        (lambda y, x, block: x + torch.tanh(y) + y, True),
    ],
)
def test_anything_but_one_plain_final_addition_joins_at_the_output(
    join: Callable[..., Tensor], has_shortcut: bool
) -> None:
    flow = _flow(Block(join))
    assert (flow.addition, flow.shortcut) == (None, None)
    assert flow.has_shortcut == has_shortcut


def test_earlier_additions_of_the_branch_are_counted() -> None:
    flow = _flow(Block(lambda y, x, block: x + block.extra(y + 1 + y)))
    assert (flow.addition, flow.shortcut) == (2, 0)


def test_two_branches_of_equal_weight_have_no_shortcut() -> None:
    flow = _flow(Block(lambda y, x, block: y + block.branch(x)))
    assert (flow.addition, flow.shortcut, flow.has_shortcut) == (None, None, False)


def test_a_shortcut_that_changes_the_shape_projects() -> None:
    flow = _flow(NormUnit(4, 8, stride=2))
    assert flow.projects
    assert (flow.input_shape, flow.output_shape) == ((2, 4, 6, 6), (2, 8, 3, 3))
    assert not _flow(NormUnit(4, 4)).projects


def test_a_container_of_residual_units_is_none_itself() -> None:
    assert not _flow(nn.Sequential(Unit(4))).is_residual_unit


@pytest.mark.parametrize(
    ("join", "overwrites"),
    [
        (lambda y, x, block: x.add_(y), True),
        (lambda y, x, block: functional.relu_(x) + y, True),
        (lambda y, x, block: y.add_(x), False),
    ],
)
def test_a_unit_that_writes_into_its_input_is_noticed(join: Callable[..., Tensor], overwrites: bool) -> None:
    assert _flow(Block(join)).overwrites_input == overwrites


def test_a_value_that_does_not_come_from_the_input_does_not_depend_on_it() -> None:
    flow = _flow(Block(lambda y, x, block: y + block.extra.weight.sum() * x))
    weight_sum = next(op.outputs[0] for op in flow.trace.operations if op.name == "sum")
    assert not flow.depends(weight_sum)
    assert flow.depends(flow.output)
