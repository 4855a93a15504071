"""A sub-block run with its join in other hands."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deltapatch.anatomy import Join, SubBlock
from deltapatch.errors import AnatomyError
from deltapatch.joining import Junction, run_sub_block, state_in

X = torch.tensor([[1.0, -2.0]])
BRANCH = torch.tensor([[10.0, 20.0]])


def _run(
    forward: Callable[..., object],
    join: Join,
    rule: Callable[[Junction], Tensor],
    *args: object,
    overwrites: bool = False,
) -> object:
    sub_block = SubBlock("stage.0", 0, 0, join, overwrites)
    return run_sub_block(sub_block, forward, args or (X.clone(),), {}, rule)


FIRST_ADDITION = Join(addition=0, shortcut=1, has_shortcut=True)
AT_OUTPUT = Join(addition=None, shortcut=None, has_shortcut=True)
WITHOUT_SHORTCUT = Join(addition=None, shortcut=None, has_shortcut=False)


def test_the_rule_is_given_both_operands_and_their_sum() -> None:
    seen: list[Junction] = []

    def rule(junction: Junction) -> Tensor:
        seen.append(junction)
        return junction.total

    output = _run(lambda x: BRANCH + x, FIRST_ADDITION, rule)
    assert torch.equal(seen[0].residual, BRANCH)
    assert torch.equal(seen[0].shortcut, X)
    assert torch.equal(output, BRANCH + X)


def test_what_follows_the_join_runs_on_the_rules_result() -> None:
    output = _run(lambda x: functional.relu(BRANCH + x), FIRST_ADDITION, lambda junction: -junction.residual)
    assert torch.equal(output, torch.zeros(1, 2))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: BRANCH.clone().add_(x),
        lambda x: torch.add(BRANCH, x),
        lambda x: BRANCH.add(x),
    ],
)
def test_every_way_to_write_an_addition_is_taken_over(forward: Callable[..., Tensor]) -> None:
    output = _run(forward, FIRST_ADDITION, lambda junction: junction.residual - junction.shortcut)
    assert torch.equal(output, BRANCH - X)


def test_an_addition_in_place_that_goes_on_with_its_left_side_is_taken_over() -> None:
    def forward(x: Tensor) -> Tensor:
        y = BRANCH.clone()
        y.add_(x)
        return y * 2

    output = _run(forward, FIRST_ADDITION, lambda junction: junction.residual + 1)
    assert torch.equal(output, 2 * (BRANCH + 1))


def test_only_the_addition_that_was_named_is_taken_over() -> None:
    second = Join(addition=1, shortcut=0, has_shortcut=True)
    output = _run(lambda x: x + ((BRANCH + 1) * 1), second, lambda junction: junction.residual)
    assert torch.equal(output, BRANCH + 1)


def test_the_sum_is_computed_in_the_order_in_which_it_was_written() -> None:
    """Rounding of a + b and b + a is the same, but which operand decides dtype and layout is not."""
    first = Join(addition=0, shortcut=0, has_shortcut=True)
    totals: list[Tensor] = []

    def rule(junction: Junction) -> Tensor:
        totals.append(junction.total)
        return junction.total

    _run(lambda x: x + BRANCH, first, rule)
    assert torch.equal(totals[0], X + BRANCH)


def test_a_join_at_the_output_counts_what_was_added_to_the_input_as_the_branch() -> None:
    output = _run(lambda x: x * 3, AT_OUTPUT, lambda junction: junction.residual)
    assert torch.equal(output, 2 * X)


def test_a_join_without_a_shortcut_is_all_branch() -> None:
    def rule(junction: Junction) -> Tensor:
        assert junction.shortcut is None
        return junction.residual

    assert torch.equal(_run(lambda x: x * 3, WITHOUT_SHORTCUT, rule), 3 * X)


def test_the_shortcut_is_kept_where_the_sub_block_overwrites_its_input() -> None:
    output = _run(lambda x: x.add_(BRANCH), AT_OUTPUT, lambda junction: junction.residual, overwrites=True)
    assert torch.equal(output, BRANCH)


def test_the_rest_of_a_structured_output_passes_through() -> None:
    output = _run(lambda x: (x * 3, "mask"), AT_OUTPUT, lambda junction: junction.total + 1)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], 3 * X + 1)
    assert output[1] == "mask"


def test_a_sub_block_that_did_not_run_its_addition_is_reported_by_path() -> None:
    with pytest.raises(AnatomyError, match=r"stage\.0 ran 0 additions where 1 were expected"):
        _run(lambda x: x * 2, FIRST_ADDITION, lambda junction: junction.total)


def test_an_addition_after_the_sub_block_is_not_taken_over() -> None:
    with pytest.raises(AnatomyError):
        _run(lambda x: x * 2, FIRST_ADDITION, lambda junction: junction.residual)
    assert torch.equal(X + BRANCH, torch.tensor([[11.0, 18.0]]))


def test_the_state_is_found_among_positional_and_named_arguments() -> None:
    sub_block = SubBlock("stage.0", 1, 0, AT_OUTPUT)
    assert state_in(sub_block, (BRANCH,), {"x": X}) is X
    assert state_in(sub_block, ([BRANCH, X],), {}) is X


def test_gradients_flow_through_a_taken_over_join() -> None:
    x = X.clone().requires_grad_()
    scale = nn.Parameter(torch.tensor(3.0))
    output = _run(
        lambda x: BRANCH + x,
        FIRST_ADDITION,
        lambda junction: junction.residual + scale * junction.shortcut,
        x,
    )
    assert isinstance(output, Tensor)
    output.sum().backward()
    assert torch.equal(x.grad, torch.full((1, 2), 3.0))
    assert scale.grad is not None
    assert scale.grad.item() == X.sum().item()
