"""The base's classifier: the layer whose input are the features that a task's own head reads."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from .errors import AnatomyError
from .trace import ModuleCall, Trace
from .trees import tensors_in

_NORMALISATIONS = frozenset({"batch_norm", "group_norm", "layer_norm", "rms_norm"})


@dataclass(frozen=True)
class HeadSite:
    """The base's classifier: the last layer with weights.

    Attributes:
        path: the module whose input are the features; None where the base has no classifier and its output
        is.
        features: how many features an image has once they are pooled.
        layout: how the features come: NC is one vector an image, the others are pooled over their positions.
    """

    path: str | None
    features: int
    layout: Literal["NC", "NCHW", "NLC"]


def find_head(trace: Trace, output: Any, after: int) -> HeadSite:
    """The leaf module that ran the last weighted operation after the stages; else the output itself.

    Args:
        trace: the record of one forward pass.
        output: what the model returned.
        after: how many operations had run when the last stage was through.

    Raises:
        AnatomyError: the output is nothing that a head can read.
    """
    outputs = tensors_in(output)
    if not outputs:
        raise AnatomyError("the model returned no tensor, so there is nothing to put a head on")
    # timm's models say so themselves where they end in features and not in logits.
    has_classifier = getattr(trace.calls[0].module, "num_classes", None) != 0
    if has_classifier and len(outputs) == 1 and outputs[0].ndim == 2:
        call = _classifier_call(trace, trace.outputs[0], outputs[0].shape[1], after)
        if call is not None:
            weight = next(p for p in call.module.parameters() if p.ndim >= 2)
            dimensions = len(trace.shapes[call.inputs[0]])
            layout = "NC" if dimensions == 2 else "NCHW" if weight.ndim == 4 else "NLC"
            return HeadSite(call.path, weight.shape[1], layout)
    last = outputs[-1]
    layout: Any = {2: "NC", 3: "NLC", 4: "NCHW"}.get(last.ndim)
    if layout is None:
        raise AnatomyError(
            f"the model's output has shape {tuple(last.shape)}; a head needs 2, 3 or 4 dimensions"
        )
    return HeadSite(None, last.shape[1] if layout == "NCHW" else last.shape[-1], layout)


def _classifier_call(trace: Trace, logits: int, classes: int, after: int) -> ModuleCall | None:
    """Walks back from the logits over unweighted operations to the first leaf with one output a class."""
    pending, seen, found = [logits], set[int](), list[int]()
    while pending:
        value = pending.pop()
        if value in seen or value not in trace.producer:
            continue
        seen.add(value)
        operation = trace.operations[trace.producer[value]]
        if operation.is_weighted:
            found.append(operation.owner)
        elif operation.name not in _NORMALISATIONS:
            pending.extend(operation.inputs)
    for owner in sorted(index for index in found if index >= 0):
        call = trace.calls[owner]
        weight = next((p for p in call.module.parameters() if p.ndim >= 2), None)
        is_leaf = isinstance(call.module, (nn.Linear, nn.Conv2d)) and bool(call.inputs) and bool(call.path)
        if is_leaf and call.start >= after and weight is not None and weight.shape[0] == classes:
            return call
    return None
