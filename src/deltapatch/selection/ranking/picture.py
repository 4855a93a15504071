"""What a base costs and what it promises: score against time of a forward pass."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...evaluation.drawings import CELL, INK, new_figure
from .ranked import Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

_LONGEST_NAME = 40
_LINE_POINTS = 10.0
_LETTER_POINTS = 5.0


def draw_ranking(ranking: Ranking) -> bytes:
    """Draws the ordering score over milliseconds an image, on a logarithmic scale, as PNG.

    The bars are the spread of 90 % of the halves. The best base is a filled circle, those that tie with it
    are half filled, all others empty.

    Raises:
        ValueError: no base has a value of the ordering score.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in ranking.rows if not math.isnan(row.value(ranking.ordered_by))]
    if not rows:
        raise ValueError("no base has a value of the ordering score")
    figure, axes = new_figure(7.0, 4.4)
    points: list[tuple[float, float]] = []
    for row in rows:
        cost, value = 1e3 * row.seconds_per_image, row.value(ranking.ordered_by)
        low, high = row.cells[ranking.ordered_by].interval
        if not math.isnan(low):
            axes.vlines(cost, low, high, color=CELL, alpha=0.35)
        fill = "full" if row is ranking.best else "left" if row.name in ranking.ties else "none"
        axes.plot(
            [cost], [value], "o", color=CELL, markersize=8, fillstyle=fill, markerfacecoloralt="#ffffff"
        )
        points.append((cost, value))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("forward pass, ms an image")
    axes.set_ylabel(ranking.ordered_by)
    axes.spines[["top", "right"]].set_visible(False)
    _mark_meanings(axes, bool(ranking.ties))
    _name_points(axes, points, [row.name for row in rows])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _mark_meanings(axes: "Axes", has_ties: bool) -> None:
    meanings = [("best", "full"), *([("ties with it", "left")] if has_ties else []), ("behind", "none")]
    for meaning, fill in meanings:
        axes.plot(
            [], [], "o", color=CELL, markersize=7, fillstyle=fill, markerfacecoloralt="#ffffff", label=meaning
        )
    axes.legend(frameon=False, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _name_points(axes: "Axes", points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes each name beside its point: on the side where there is room, below names that are in its way."""
    figure = axes.figure
    figure.canvas.draw()  # the places of points are known once the axes are laid out
    in_points = 72 / figure.dpi
    left, right = (edge * in_points for edge in (axes.bbox.x0, axes.bbox.x1))
    places = [axes.transData.transform(point) * in_points for point in points]
    taken: list[tuple[float, float, float]] = []
    for index in sorted(range(len(points)), key=lambda one: -places[one][1]):
        x, y = (float(number) for number in places[index])
        name = _short(names[index])
        width = _LETTER_POINTS * len(name)
        is_right = x + 7 + width <= right or x - left < right - x
        start = x + 7 if is_right else x - 7 - width
        while any(
            start < other_start + other_width
            and other_start < start + width
            and abs(y - other) < _LINE_POINTS
            for other_start, other_width, other in taken
        ):
            y -= 1
        taken.append((start, width, y))
        _annotate(axes, name, points[index], (7 if is_right else -7, y - float(places[index][1])))


def _annotate(
    axes: "Axes", name: str, point: tuple[float, float], offset: tuple[float, float]
) -> "Annotation":
    # A name comes from the user: a dollar sign in it begins no formula.
    return axes.annotate(
        name,
        point,
        xytext=offset,
        textcoords="offset points",
        ha="left" if offset[0] > 0 else "right",
        va="center",
        color=INK,
        size=8,
        parse_math=False,
    )


def _short(name: str) -> str:
    """One line of a bearable length: the end of a name says more than its beginning."""
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST_NAME else f"…{line[1 - _LONGEST_NAME :]}"
