"""Which parts of which tensors are worked on at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .sources import TensorSpec


@dataclass(frozen=True)
class Part:
    """Elements start..stop of a tensor in row-major order."""

    name: str
    start: int
    stop: int


def parts_of(
    specs: Mapping[str, TensorSpec], size: int, whole: frozenset[str] = frozenset()
) -> Iterator[Part]:
    """Every tensor cut into parts of at most ``size`` elements, but those named in one piece."""
    for name, spec in specs.items():
        step = max(spec.elements, 1) if name in whole else size
        for start in range(0, spec.elements, step):
            yield Part(name, start, min(start + step, spec.elements))
