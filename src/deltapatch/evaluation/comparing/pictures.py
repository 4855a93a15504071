"""What accuracy costs: the methods as points over their parameters or their time."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..drawings import INK, new_figure, to_svg


@dataclass(frozen=True)
class Point:
    """A method in a picture.

    Attributes:
        name: written beside it.
        cost: above 0.
        accuracy: 0..1.
        low: lower end of its 95 % interval; NaN where there is none.
        high: its upper end.
    """

    name: str
    cost: float
    accuracy: float
    low: float
    high: float


def draw_costs(points: Sequence[Point], unit: str) -> str:
    """Draws accuracy in percent over cost, on a logarithmic scale, with 95 % intervals, as SVG text."""
    figure, axes = new_figure(5.4, 3.4)
    for point in points:
        height = 100 * point.accuracy
        axes.plot([point.cost], [height], "o", color=INK, markersize=5)
        if point.low == point.low:
            axes.vlines(point.cost, 100 * point.low, 100 * point.high, color=INK, alpha=0.4)
        # A name comes from the user: it is one line, and a dollar sign in it begins no formula.
        axes.annotate(
            " ".join(point.name.split()),
            (point.cost, height),
            xytext=(5, 3),
            textcoords="offset points",
            color=INK,
            size=8,
            parse_math=False,
        )
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel(unit)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    return to_svg(figure)
