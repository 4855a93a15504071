"""Where a model can be patched: its stages, their sub-blocks, the joins, and the classifier.

Read from the data flow of one small forward pass, never from a table of model names, and verified by running
the model through what was found. All results are plain values: they are stored in patch files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .classifier import HeadSite, find_head
from .errors import AnatomyError
from .flow import BlockFlow
from .layers import Layer, called_modules, find_layers
from .trace import ModuleCall, Trace, record

Layout = Literal["NCHW", "NHWC", "NLC"]


@dataclass(frozen=True)
class Join:
    """Where a sub-block adds its residual branch and its shortcut.

    Attributes:
        addition: which addition that runs in the sub-block it is, counted from 0; None where the join is the
            sub-block's output (several additions, or no shortcut at all).
        shortcut: how the shortcut enters: operand 0 or 1 of the addition; None where it does not enter as
        an operand.
        has_shortcut: whether the base already has a skip into this sub-block.
    """

    addition: int | None
    shortcut: int | None
    has_shortcut: bool


@dataclass(frozen=True)
class SubBlock:
    """One residual unit of a stage.

    Attributes:
        path: the module's name in the base.
        input_position: which of the tensors that it is given is the state f_{i-1}.
        output_position: which of the tensors that it returns is the state f_i.
        join: where the residual branch meets the shortcut.
        overwrites_input: whether it changes its input in place, so that a state must be copied to be kept.
    """

    path: str
    input_position: int
    output_position: int
    join: Join
    overwrites_input: bool = False


@dataclass(frozen=True)
class Stage:
    """A run of sub-blocks whose outputs have one shape.

    Attributes:
        path: the common parent of the sub-blocks, and which of its children they are where it has others.
        sub_blocks: the sub-blocks in the order in which they run.
        in_channels: channels of the stage's input x.
        channels: channels of the states f_0 ... f_n.
        layout: where the channels stand: NCHW and NHWC are maps, NLC are tokens.
        projects: whether x is projected to f_0 by the first sub-block's own shortcut; otherwise f_0 = x.
    """

    path: str
    sub_blocks: tuple[SubBlock, ...]
    in_channels: int
    channels: int
    layout: Layout
    projects: bool

    @property
    def skips(self) -> int:
        """How many skips the stage has with all of them introduced: n (n + 1) / 2."""
        return len(self.sub_blocks) * (len(self.sub_blocks) + 1) // 2


@dataclass(frozen=True)
class Anatomy:
    """The places of a base that a patch can touch.

    Attributes:
        stages: in the order in which they run.
        head: the classifier.
        layers: every module with tensors of its own, the classifier's too, in the order in which they run.
        order: the names of all modules in the order in which they were first called.
    """

    stages: tuple[Stage, ...]
    head: HeadSite
    layers: tuple[Layer, ...] = ()
    order: tuple[str, ...] = ()

    def first(self, paths: Iterable[str]) -> str | None:
        """Which of some modules runs first; None if there are none."""
        position = {path: index for index, path in enumerate(self.order)}
        return min(paths, key=lambda path: position.get(path, len(position)), default=None)

    def layers_from(self, modules: int | Literal["all"]) -> tuple[Layer, ...]:
        """The layers that run from the first of the last ``modules`` stages on; "all" are those of the base.

        The classifier is left out, since a patch has a head in its place.

        Raises:
            AnatomyError: the base has fewer stages than asked for.
        """
        layers = [layer for layer in self.layers if not self._is_of_classifier(layer.path)]
        if modules == "all":
            return tuple(layers)
        start = self.order.index(self.last_stages(modules)[0].sub_blocks[0].path)
        return tuple(layer for layer in layers if self.order.index(layer.path) >= start)

    def _is_of_classifier(self, path: str) -> bool:
        return self.head.path is not None and (path + ".").startswith(self.head.path + ".")

    def last_stages(self, count: int | Literal["all"]) -> tuple[Stage, ...]:
        """The last ``count`` stages.

        Raises:
            AnatomyError: the base has none, or fewer than asked for.
        """
        if not self.stages:
            raise AnatomyError(
                "no stage was found in this base: none of its modules is a residual unit or one of a"
                " run of modules"
                " that hand a tensor of one shape on; the head method works on any base"
            )
        if count == "all":
            return self.stages
        if not 1 <= count <= len(self.stages):
            names = ", ".join(stage.path for stage in self.stages)
            raise AnatomyError(
                f"modules={count} asks for {count} stages, but this base has {len(self.stages)} ({names})"
            )
        return self.stages[-count:]


def read_anatomy(root: nn.Module, example: Tensor) -> Anatomy:
    """Finds stages and classifier of ``root`` from the data flow of ``root(example)``.

    Args:
        root: a model in eval mode.
        example: a batch of at least two images; the first dimension of states must equal its first dimension.

    Raises:
        AnatomyError: the model cannot be run on the example.
    """
    try:
        trace, output = record(root, example)
    except AnatomyError:
        raise
    except Exception as error:
        raise AnatomyError(
            f"{type(root).__name__} failed on an input of shape {tuple(example.shape)}: {error}"
        ) from error
    batch = len(example)
    stages = _find_stages(trace, batch, leaves=False) or _find_stages(trace, batch, leaves=True)
    return Anatomy(
        stages=stages,
        head=find_head(trace, output, _end_of(trace, stages)),
        layers=find_layers(trace, called_modules(root, example)),
        order=tuple(dict.fromkeys(call.path for call in trace.calls)),
    )


@dataclass(frozen=True)
class _Link:
    """A module call in a run, and the tensors by which it hangs on its neighbours."""

    call: ModuleCall
    input_position: int
    output_position: int


def _find_stages(trace: Trace, batch: int, leaves: bool) -> tuple[Stage, ...]:
    """Runs of residual units first, then other runs, then single residual units; outermost first in each.

    What lies inside a sub-block that was taken, or around one, is not taken as well.
    """
    groups = trace.children()
    parents = sorted(groups, key=lambda path: path.count(".") + bool(path))
    found: list[tuple[str, list[BlockFlow]]] = []
    for parent in parents:
        for run in _runs(trace, [trace.calls[index] for index in groups[parent]], batch, leaves):
            flows = _flows_with_states(trace, run)
            if flows and not _is_container_run(trace, flows, batch):
                found.append((parent, flows))
    kinds = (
        [item for item in found if len(item[1]) > 1 and any(flow.has_shortcut for flow in item[1])],
        [item for item in found if len(item[1]) > 1 and not any(flow.has_shortcut for flow in item[1])],
        [item for item in found if len(item[1]) == 1 and item[1][0].is_residual_unit],
    )
    taken: set[str] = set()
    stages: list[tuple[int, Stage]] = []
    for parent, flows in (item for kind in kinds for item in kind):
        paths = [flow.call.path for flow in flows]
        if not any(_overlap(path, other) for path in paths for other in taken):
            taken.update(paths)
            stages.append((flows[0].call.start, _stage(trace, parent, flows)))
    stages.sort(key=lambda item: item[0])
    return tuple(stage for _, stage in stages)


def _overlap(path: str, other: str) -> bool:
    """Whether one of two modules holds the other."""
    return (path + ".").startswith(other + ".") or (other + ".").startswith(path + ".")


def _runs(trace: Trace, calls: list[ModuleCall], batch: int, leaves: bool) -> Iterator[list[_Link]]:
    """Maximal runs of siblings where each one's output state is the next one's input, all of one shape."""
    run: list[_Link] = []
    for call in calls:
        if not _can_be_sub_block(call, leaves):
            continue
        joined = _joined(trace, run, call, batch)
        if joined is None:
            yield from _ended(trace, run, batch)
            run = [_Link(call, -1, -1)] if call.inputs else []
        else:
            run = joined
    yield from _ended(trace, run, batch)


def _ended(trace: Trace, run: list[_Link], batch: int) -> Iterator[list[_Link]]:
    """A run whose open ends are closed: its last output and first input stand where its neighbours' do."""
    if len(run) == 1:
        call = run[0].call
        states = [position for position, value in enumerate(call.outputs) if _is_state(trace, value, batch)]
        if states:
            yield [_Link(call, 0, states[0])]
    elif run:
        first, last = run[0], run[-1]
        run[0] = _Link(
            first.call, min(run[1].input_position, len(first.call.inputs) - 1), first.output_position
        )
        run[-1] = _Link(last.call, last.input_position, run[-2].output_position)
        yield run


def _joined(trace: Trace, run: list[_Link], call: ModuleCall, batch: int) -> list[_Link] | None:
    """The run with ``call`` at its end, or None if no state of the run's last module reaches it unchanged."""
    if not run:
        return None
    last = run[-1]
    positions = range(len(last.call.outputs)) if len(run) == 1 else [run[-2].output_position]
    for output_position in positions:
        if output_position >= len(last.call.outputs) or output_position >= len(call.outputs):
            continue
        value = last.call.outputs[output_position]
        same_shape = trace.shapes[call.outputs[output_position]] == trace.shapes[value]
        if not same_shape or not _is_state(trace, value, batch):
            continue
        for input_position, given in enumerate(call.inputs):
            if trace.shapes[given] == trace.shapes[value] and value in trace.source(given, through=[value]):
                changed = _Link(last.call, last.input_position, output_position)
                return [*run[:-1], changed, _Link(call, input_position, -1)]
    return None


def _can_be_sub_block(call: ModuleCall, leaves: bool) -> bool:
    has_children = next(call.module.children(), None) is not None
    has_weights = any(parameter.ndim >= 2 for parameter in call.module.parameters())
    return has_weights and has_children != leaves


def _is_state(trace: Trace, value: int, batch: int) -> bool:
    """Whether a value is a map or a sequence of tokens with one row an image."""
    return len(trace.shapes[value]) in (3, 4) and trace.shapes[value][0] == batch


def _is_container_run(trace: Trace, flows: list[BlockFlow], batch: int) -> bool:
    """Whether a run's modules are mere sequences with runs of their own inside, to be looked for there."""
    if not all(isinstance(flow.call.module, nn.Sequential) for flow in flows):
        return False
    groups = trace.children()
    inner = [trace.calls[index] for flow in flows for index in groups.get(flow.call.path, [])]
    return any(len(run) > 1 for run in _runs(trace, inner, batch, leaves=False))


def _flows_with_states(trace: Trace, run: list[_Link]) -> list[BlockFlow]:
    """The run's data flows, less a first one that only changes the shape: no state comes before it."""
    flows = [BlockFlow(trace, link.call, link.input_position, link.output_position) for link in run]
    given, made = flows[0].input_shape, flows[0].output_shape
    is_transition = len(given) != len(made) or (given != made and not flows[0].projects)
    return flows[1:] if is_transition else flows


def _stage(trace: Trace, parent: str, flows: list[BlockFlow]) -> Stage:
    layout = _layout(trace, flows[0])
    axis = 1 if layout == "NCHW" else -1
    return Stage(
        path=_stage_path(trace, parent, flows),
        sub_blocks=tuple(_sub_block(flow) for flow in flows),
        in_channels=flows[0].input_shape[axis],
        channels=flows[0].output_shape[axis],
        layout=layout,
        projects=flows[0].projects,
    )


def _stage_path(trace: Trace, parent: str, flows: list[BlockFlow]) -> str:
    siblings = trace.children()[parent]
    if parent and len(siblings) == len(flows):
        return parent
    first, last = (flow.call.path.rpartition(".")[2] for flow in (flows[0], flows[-1]))
    name = first if first == last else f"{first}-{last}"
    return f"{parent}.{name}" if parent else name


def _sub_block(flow: BlockFlow) -> SubBlock:
    return SubBlock(
        path=flow.call.path,
        input_position=flow.input_position,
        output_position=flow.output_position,
        join=Join(flow.addition, flow.shortcut, flow.has_shortcut),
        overwrites_input=flow.overwrites_input,
    )


def _layout(trace: Trace, flow: BlockFlow) -> Layout:
    """Tokens are NLC. A map's channels stand on the axis that fits the first weights or norm to read it."""
    if len(flow.output_shape) == 3:
        return "NLC"
    on_axis_1, on_axis_3 = flow.input_shape[1], flow.input_shape[3]
    for operation in trace.operations[flow.call.start : flow.call.end]:
        if not any(flow.depends(value) for value in operation.inputs):
            continue
        shape = trace.shapes[operation.inputs[0]]
        if operation.name in ("linear", "layer_norm", "rms_norm", "lstm"):
            if shape[-1] == on_axis_3 != on_axis_1 or on_axis_1 == on_axis_3:
                return "NHWC"
            if shape[-1] == on_axis_1:
                return "NCHW"
        elif operation.name in ("conv2d", "batch_norm", "group_norm") and shape[1] == on_axis_1:
            return "NCHW"
    return "NCHW"


def _end_of(trace: Trace, stages: tuple[Stage, ...]) -> int:
    """How many operations had run when the last stage was through."""
    paths = {sub_block.path for stage in stages for sub_block in stage.sub_blocks}
    return max((call.end for call in trace.calls if call.path in paths), default=0)


@torch.no_grad()
def example_batch(
    input_size: tuple[int, int, int], device: torch.device | str = "cpu", images: int = 2
) -> Tensor:
    """Two different images of noise, the same every time, of shape (images, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, *input_size, generator=generator).to(device)
