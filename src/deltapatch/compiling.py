"""Folds compiled once for all patches of a shape: their tensors are inputs of the graph, not parts of it."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .joint import Rows
from .patch import Patch
from .trees import exchange_tensors, tensors_in

Answers = Callable[[list[Tensor], Sequence[Patch], Rows], list[Any]]
"""Activations, patches and whose the rows are -> each patch's output; as a fold computes it."""


class CompiledAnswers:
    """Runs folds through `torch.compile`, one graph for each kind of patch, number of patches and batch
    shape.

    Attributes:
        backend: of `torch.compile`.
        compilations: how many graphs there are so far.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._graphs: dict[Hashable, tuple[Callable[..., Any], Any]] = {}

    @property
    def compilations(self) -> int:
        return len(self._graphs)

    def answers(
        self, kind: Hashable, answers: Answers, given: list[Tensor], patches: Sequence[Patch], rows: Rows
    ) -> list[Any]:
        """What ``answers(given, patches, rows)`` returns, but for rounding.

        Args:
            kind: what the patches have in common; part of what a graph is kept under.
            answers: the computation; traced once, with tensors of these shapes.
            given: activations.
            patches: in eval mode.
            rows: whose the rows are.
        """
        states = [dict(patch.state_dict()) for patch in patches]
        inputs = [*given, *(tensor for state in states for tensor in state.values())]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        key = (kind, rows, shapes)
        if key not in self._graphs:
            self._graphs[key] = self._compiled(answers, len(given), patches, rows, inputs)
        graph, structure = self._graphs[key]
        return exchange_tensors(structure, graph(*inputs))

    def _compiled(
        self, answers: Answers, activations: int, patches: Sequence[Patch], rows: Rows, inputs: list[Tensor]
    ) -> tuple[Callable[..., Any], Any]:
        """The compiled computation, from flat inputs to flat outputs, and the structure of its outputs."""
        outlines = [Patch.outline(patch.info, Path("memory")) for patch in patches]
        structures: list[Any] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            supply = iter(tensors)
            given = [next(supply) for _ in range(activations)]
            for outline in outlines:
                for name in list(outline.state_dict()):
                    _put(outline, name, next(supply))
            output = answers(given, outlines, rows)
            structures.append(output)
            return tensors_in(output)

        graph = make_fx(flat)(*inputs)
        return torch.compile(graph, backend=self.backend, dynamic=False), structures[0]


def _put(patch: Patch, name: str, tensor: Tensor) -> None:
    """Has a module compute with a tensor, not a parameter, so that tracing sees where it came from."""
    path, _, own = name.rpartition(".")
    module = patch.get_submodule(path)
    delattr(module, own)
    setattr(module, own, tensor)
