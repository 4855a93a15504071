"""How values flow through one sub-block: where its join is and what its shortcut carries."""

from dataclasses import dataclass
from functools import cached_property

from .trace import ModuleCall, Trace

_LAYOUT = "view reshape permute transpose flatten unflatten squeeze unsqueeze movedim __getitem__"
_UNCHANGED = frozenset(f"dropout dropout2d identity contiguous clone to type float {_LAYOUT}".split())


@dataclass(frozen=True)
class _Fact:
    """What is known of one value inside a sub-block.

    Attributes:
        weighted: the most weighted operations on any way from the sub-block's input.
        added: whether two values that come from the input were added on the way.
        carries: whether it is the input plus something.
    """

    weighted: int
    added: bool
    carries: bool


@dataclass(frozen=True)
class BlockFlow:
    """The data flow of one call of a sub-block, from its input state to its output state."""

    trace: Trace
    call: ModuleCall
    input_position: int
    output_position: int

    @property
    def input(self) -> int:
        """The value of the state f_{i-1}."""
        return self.call.inputs[self.input_position]

    @property
    def output(self) -> int:
        """The value of the state f_i."""
        return self.call.outputs[self.output_position]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.trace.shapes[self.input]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.trace.shapes[self.output]

    def depends(self, value: int) -> bool:
        """Whether a value of the sub-block comes from its input state."""
        return value in self._facts

    @property
    def overwrites_input(self) -> bool:
        """Whether an in-place operation of the sub-block writes into its input."""
        return self.call.start <= self.trace.overwritten.get(self.input, -1) < self.call.end

    @cached_property
    def _facts(self) -> dict[int, _Fact]:
        """One pass over the sub-block's operations, in the order in which they ran."""
        facts = {self.input: _Fact(0, False, True)}
        for operation in self.trace.operations[self.call.start : self.call.end]:
            known = [(value, facts[value]) for value in operation.inputs if value in facts]
            if not known:
                continue
            adds = operation.is_addition or operation.name in ("addcmul", "addcmul_")
            carries = any(fact.carries for _, fact in (known if operation.is_addition else known[:1]))
            fact = _Fact(
                weighted=max(fact.weighted for _, fact in known) + operation.is_weighted,
                added=any(fact.added for _, fact in known) or (adds and len(known) > 1),
                carries=carries and (adds or operation.name in _UNCHANGED),
            )
            facts.update(dict.fromkeys(operation.outputs, fact))
        return facts

    @cached_property
    def _final_addition(self) -> int | None:
        """Index of the addition whose result is the output, or becomes it through activations only."""
        for value in self.trace.source(self.output, through=[self.input]):
            index = self.trace.producer.get(value, -1)
            if not self.call.start <= index < self.call.end:
                return None
            operation = self.trace.operations[index]
            shapes = {self.trace.shapes[v] for v in (*operation.inputs, *operation.outputs)}
            known = sum(v in self._facts for v in operation.inputs)
            if operation.is_addition and operation.is_plain and known == 2 and len(shapes) == 1:
                return index
        return None

    @cached_property
    def shortcut(self) -> int | None:
        """Which operand of the final addition is the shortcut; None where neither clearly is.

        The shortcut is free of further additions and has fewer weighted operations than the residual branch.
        """
        if self._final_addition is None:
            return None
        facts = [self._facts[v] for v in self.trace.operations[self._final_addition].inputs]
        if facts[0].weighted == facts[1].weighted:
            return None
        operand = int(facts[1].weighted < facts[0].weighted)
        return None if facts[operand].added else operand

    @property
    def addition(self) -> int | None:
        """How many additions run in the sub-block before its join; None where the join is the output."""
        if self.shortcut is None or self._final_addition is None:
            return None
        before = self.trace.operations[self.call.start : self._final_addition]
        return sum(operation.is_addition for operation in before)

    @property
    def has_shortcut(self) -> bool:
        """Whether the base has a skip into this sub-block: at its join, or as its output keeps its input."""
        if self.shortcut is not None:
            return True
        fact = self._facts.get(self.output)
        return fact is not None and fact.carries and self.input_shape == self.output_shape

    @property
    def projects(self) -> bool:
        """Whether the shortcut turns the stage's input into a state of the output's shape."""
        return self.shortcut is not None and self.input_shape != self.output_shape

    @property
    def is_residual_unit(self) -> bool:
        """Whether the join is an addition that the module itself runs, not one of its children."""
        if self._final_addition is None or not self.has_shortcut:
            return False
        owner = self.trace.operations[self._final_addition].owner
        return owner >= 0 and self.trace.calls[owner] is self.call
