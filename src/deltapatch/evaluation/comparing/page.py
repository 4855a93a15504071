"""A comparison as one HTML page that opens anywhere: no script, nothing loaded from outside."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jinja2 import Environment, StrictUndefined

from ..protocols import AccuracyMatrix, draw_accuracy_matrix
from ..report import Drawing
from ..wording import percent
from .phrases import INTERVALS, LINE_NAMES, STANDING_NAMES, heading, line_in_words, standing_in_words
from .pictures import Point, draw_costs
from .result import Comparison
from .table import Line, Section

_PARAMETERS, _TIME = "learned parameters, head included", "seconds of a fit"


@dataclass(frozen=True)
class _Pictures:
    """Drawings under a heading of their own."""

    name: str
    drawings: tuple[Drawing, ...]


@dataclass(frozen=True)
class _PageSection:
    name: str
    standings: tuple[tuple[str, ...], ...]
    lines: tuple[tuple[str, ...], ...]
    pictures: tuple[_Pictures, ...]


def render_page(found: Comparison) -> str:
    """The whole page as one string."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = files("deltapatch.evaluation").joinpath("comparison.html").read_text("utf-8")
    return environment.from_string(page).render(
        found=found,
        sections=[_section(section) for section in found.sections],
        standing_names=STANDING_NAMES,
        line_names=LINE_NAMES,
        intervals=INTERVALS,
    )


def _section(section: Section) -> _PageSection:
    return _PageSection(
        heading(section),
        tuple(standing_in_words(one) for one in section.standings),
        tuple(line_in_words(line) for line in section.lines),
        (*_cost_pictures(section), *_matrix_pictures(section)),
    )


def _cost_pictures(section: Section) -> list[_Pictures]:
    """Accuracy over parameters and over time: of the mean over tasks, and of each task."""
    groups: dict[str, list[Line]] = {}
    for line in section.lines:
        groups.setdefault(line.task, []).append(line)
    pictures: list[_Pictures] = []
    if len(groups) > 1 and section.standings:
        nan = float("nan")
        whole = [(one.contender, one.parameters, one.seconds, one.accuracy) for one in section.standings]
        by_parameters = [Point(name, max(cost, 1), height, nan, nan) for name, cost, _, height in whole]
        by_time = [Point(name, cost, height, nan, nan) for name, _, cost, height in whole]
        pictures.append(_pair("Mean over the tasks", by_parameters, by_time))
    for task, lines in groups.items():
        sizes = [_point(line, max(line.parameters + line.head_parameters, 1)) for line in lines]
        pictures.append(_pair(task, sizes, [_point(line, line.seconds) for line in lines]))
    return pictures


def _point(line: Line, cost: float) -> Point:
    return Point(line.contender, cost, line.accuracy.mean, line.interval.low, line.interval.high)


def _pair(name: str, by_parameters: Sequence[Point], by_time: Sequence[Point]) -> _Pictures:
    def draw(points: Sequence[Point], unit: str) -> Drawing:
        words = "; ".join(f"{one.name} {percent(one.accuracy)} at {one.cost:,.4g}" for one in points)
        return Drawing(draw_costs(points, unit), f"{name}: accuracy over {unit}: {words}.")

    return _Pictures(name, (draw(by_parameters, _PARAMETERS), draw(by_time, _TIME)))


def _matrix_pictures(section: Section) -> list[_Pictures]:
    """For protocols of several tasks, each method's accuracies after each step, the mean over the seeds."""
    pictures: list[_Pictures] = []
    for one in section.standings:
        matrix = _mean_matrix(one.lines[0])
        if matrix is not None:
            final = ", ".join(f"{name} {percent(value)}" for name, value in matrix.final().items())
            alt = f"Accuracy of {one.contender} on each task after each step; at the end: {final}."
            name = f"{one.contender}: accuracy after each step"
            pictures.append(_Pictures(name, (Drawing(draw_accuracy_matrix(matrix), alt),)))
    return pictures


def _mean_matrix(line: Line) -> AccuracyMatrix | None:
    matrices = [row.matrix for row in line.rows if row.matrix is not None]
    if not matrices:
        return None
    values = np.mean([np.array(matrix.values, np.float64) for matrix in matrices], axis=0)
    return AccuracyMatrix(matrices[0].columns, matrices[0].rows, values)
