"""The record of a forward pass: which values each module and operation took and made."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import Net, Unit

from deltapatch.trace import Trace, record

IMAGES = torch.ones(2, 3, 4, 4)


class Recorded(nn.Module):
    """Runs any function as a module's forward, with one layer at hand."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _trace(function: object) -> Trace:
    return record(Recorded(function), IMAGES)[0]


def test_every_module_call_is_recorded_with_its_parent() -> None:
    trace, _ = record(Net([Unit(4)], 4), IMAGES)
    parents = {call.path: trace.calls[call.parent].path if call.parent >= 0 else None for call in trace.calls}
    assert parents == {
        "": None,
        "stem": "",
        "stage": "",
        "stage.0": "stage",
        "stage.0.branch": "stage.0",
        "stage.0.branch.0": "stage.0.branch",
        "fc": "",
    }


def test_a_modules_output_is_the_next_ones_input() -> None:
    trace, _ = record(Net([Unit(4), Unit(4)], 4), IMAGES)
    calls = {call.path: call for call in trace.calls}
    assert calls["stage.0"].outputs == calls["stage.1"].inputs
    assert calls[""].outputs == trace.outputs


def test_an_operation_belongs_to_the_innermost_module_that_runs_it() -> None:
    trace, _ = record(Net([Unit(4)], 4), IMAGES)
    owners = {operation.name: trace.calls[operation.owner].path for operation in trace.operations}
    assert owners["relu"] == "stage.0"
    assert owners["mean"] == ""
    assert owners["linear"] == "fc"


def test_a_modules_operations_are_those_between_its_start_and_end() -> None:
    trace, _ = record(Net([Unit(4)], 4), IMAGES)
    unit = next(call for call in trace.calls if call.path == "stage.0")
    assert [operation.name for operation in trace.operations[unit.start : unit.end]] == [
        "conv2d",
        "add",
        "relu",
    ]


def test_a_write_in_place_makes_a_new_value_and_marks_the_old_one() -> None:
    trace = _trace(lambda self, x: functional.relu_(self.layer(x)))
    convolution, relu = trace.operations
    assert relu.inputs == convolution.outputs
    assert relu.outputs != convolution.outputs
    assert trace.overwritten == {convolution.outputs[0]: 1}


def test_an_operation_that_hands_its_argument_back_makes_no_value() -> None:
    trace = _trace(lambda self, x: self.layer(functional.dropout(x, training=False).contiguous()))
    assert trace.operations[-1].inputs[0] == trace.calls[0].inputs[0]


@pytest.mark.parametrize(
    ("function", "is_addition", "is_plain"),
    [
        (lambda self, x: x + self.layer(x), True, True),
        (lambda self, x: torch.add(x, self.layer(x)), True, True),
        (lambda self, x: self.layer(x).add_(x), True, True),
        (lambda self, x: torch.add(x, self.layer(x), alpha=2), True, False),
        (lambda self, x: self.layer(x) + 1, True, False),
        (lambda self, x: self.layer(x) * x, False, True),
        (lambda self, x: self.layer(x) - x, False, True),
    ],
)
def test_additions_of_two_values_are_told_from_all_else(
    function: object, is_addition: bool, is_plain: bool
) -> None:
    last = _trace(function).operations[-1]
    assert (last.is_addition, last.is_plain) == (is_addition, is_plain)


def test_plus_equals_is_an_addition() -> None:
    def add(self: Recorded, x: Tensor) -> Tensor:
        y = self.layer(x)
        y += x
        return y

    last = _trace(add).operations[-1]
    assert (last.is_addition, last.is_plain) == (True, True)


def test_the_source_of_a_value_is_followed_through_activations_up_to_weights() -> None:
    trace = _trace(lambda self, x: torch.tanh(torch.relu(self.layer(x))))
    walked = list(trace.source(trace.outputs[0]))
    assert [trace.operations[trace.producer[value]].name for value in walked] == ["tanh", "relu", "conv2d"]


def test_the_source_of_a_sum_is_not_followed_further() -> None:
    trace = _trace(lambda self, x: torch.relu(self.layer(x) + self.layer(x)))
    walked = list(trace.source(trace.outputs[0]))
    assert [trace.operations[trace.producer[value]].name for value in walked] == ["relu", "add"]


def test_modules_that_run_twice_are_no_ones_children() -> None:
    trace = _trace(lambda self, x: self.layer(self.layer(x)))
    assert [call.path for call in trace.calls] == ["", "layer", "layer"]
    assert trace.children() == {}


def test_hooks_are_taken_off_when_the_model_fails() -> None:
    def fail(self: Recorded, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    model = Recorded(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        record(model, IMAGES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_output_is_that_of_a_plain_call_without_gradients() -> None:
    torch.manual_seed(0)
    model = Net([Unit(4)], 4)
    _, output = record(model, IMAGES)
    assert torch.equal(output, model(IMAGES))
    assert not output.requires_grad
