"""The report's pictures, as SVG text that stands inside a page and takes its colours from the page's style.

Matplotlib knows no CSS variables, so everything is drawn in stand-in colours that `to_svg` exchanges for
``var(--ink)`` and the like. Values are shown by the opacity of one colour: that works on light and on dark.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Arc

MAX_ARC_STATES = 12
MAX_PRINTED_ARCS = 4
MAX_MARKED_EPOCHS = 60

CELL = "#1b56ab"
STRONG = 0.75
"""Cells are filled with `CELL`; from the opacity `STRONG` on, white text reads best on them."""

INK, _QUIET, _WEIGHT, _EXISTING = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {
    INK: "var(--ink)",
    _QUIET: "var(--quiet)",
    _WEIGHT: "var(--weight)",
    _EXISTING: "var(--existing)",
}


def draw_curves(curves: Mapping[str, Sequence[float]], first: int, unit: str) -> str:
    """Draws one line for each curve, from epoch ``first`` on; values that are not finite leave gaps."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(4.6, 2.9)
    styles = ("-", "--", ":", "-.")
    colours = (_WEIGHT, _EXISTING, INK, _QUIET)
    marker = "o" if len(next(iter(curves.values()))) <= MAX_MARKED_EPOCHS else ""
    for (name, values), style, colour in zip(curves.items(), styles, colours, strict=False):
        heights = np.asarray(values, np.float64)
        heights[~np.isfinite(heights)] = np.nan
        epochs = np.arange(first, first + len(heights))
        axes.plot(epochs, heights, style, color=colour, label=name, marker=marker, markersize=2.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return to_svg(figure)


def draw_matrix(counts: NDArray[np.int64]) -> str:
    """Draws a confusion matrix of many classes as a picture of the part of each row, ``(K, K)``."""
    figure, axes = new_figure(4.6, 4.6)
    shade(axes, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    axes.set_xlabel("answered class number")
    axes.set_ylabel("true class number")
    return to_svg(figure)


def draw_heat_map(mean: NDArray[np.float64], spread: NDArray[np.float64] | None = None) -> str:
    """Draws weights by sub-block (row) and state (column), ``(n, n)``, with the spread below each mean.

    Without a spread the map is small, and has no numbers where they would not be readable.
    """
    n = len(mean)
    cell = 0.52 if n <= MAX_ARC_STATES else 0.36
    side = 1.0 + cell * n if spread is not None else 2.1
    figure, axes = new_figure(side, side)
    opacity = shade(axes, mean)
    axes.set_xticks(range(n))
    axes.set_yticks(range(n), labels=[str(i) for i in range(1, n + 1)])
    if spread is None and n > MAX_ARC_STATES:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_xlabel("from state")
    axes.set_ylabel("into sub-block")
    for i, j in np.argwhere(np.isfinite(mean)).tolist():
        colour = "#ffffff" if opacity[i, j] >= STRONG else INK
        if spread is not None:
            axes.text(j, i - 0.14, f"{mean[i, j]:.2f}", color=colour, size=9, ha="center", va="center")
            axes.text(j, i + 0.24, f"± {spread[i, j]:.2f}", color=colour, size=6.5, ha="center", va="center")
        elif n <= MAX_PRINTED_ARCS:
            axes.text(j, i, f"{mean[i, j]:.2f}", color=colour, size=9, ha="center", va="center")
    return to_svg(figure)


def draw_arcs(mean: NDArray[np.float64], spread: NDArray[np.float64], existing: NDArray[np.bool_]) -> str:
    """Draws the states 0 to n in a row and an arc from state j to state i for the skip into sub-block i.

    Args:
        mean: weight of the skip from state j into sub-block i at ``[i - 1, j]``, ``(n, n)``; NaN for none.
        spread: its standard deviation, which widens the arc by a lighter band.
        existing: where the base has that skip already.
    """
    n = len(mean)
    figure, axes = new_figure(1.0 + 0.85 * n if n > 4 else 4.6, 1.3 + 0.28 * n)
    for i, j in np.argwhere(np.isfinite(mean)).tolist():
        colour, line = (_EXISTING, (0, (2, 1))) if existing[i, j] else (_WEIGHT, "solid")
        strength = min(abs(mean[i, j]), 1.0)
        axes.add_patch(_arc(j, i + 1, strength + 2 * spread[i, j], color=colour, alpha=0.25))
        axes.add_patch(_arc(j, i + 1, strength, color=colour, alpha=0.35 + 0.65 * strength, linestyle=line))
        if n <= MAX_PRINTED_ARCS:
            top = (i + 1 - j) / 2 + 0.1
            axes.text((i + 1 + j) / 2, top, f"{mean[i, j]:.2f}", color=INK, size=9, ha="center", va="bottom")
    for state in range(n + 1):
        axes.text(state, -0.16, str(state), color=INK, ha="center", va="top", size=10)
    axes.plot(range(n + 1), [0] * (n + 1), "o", color=INK, markersize=6, zorder=3)
    axes.set_xlim(-0.3, n + 0.3)
    axes.set_ylim(-0.55, 0.5 * n + 0.35)
    axes.set_axis_off()
    return to_svg(figure)


def _arc(start: int, end: int, thickness: float, **style: Any) -> "Arc":
    from matplotlib.patches import Arc

    span = end - start
    width = 0.5 + 5 * thickness
    return Arc(((start + end) / 2, 0), span, span, theta1=0, theta2=180, linewidth=width, **style)


def shade(axes: "Axes", values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fills a grid with one colour, the more opaque the larger the value; returns the opacities."""
    from matplotlib.colors import to_rgb

    size = np.nan_to_num(np.abs(values))
    opacity = size / max(1.0, size.max())
    pixels = np.empty((*values.shape, 4))
    pixels[..., :3] = to_rgb(CELL)
    pixels[..., 3] = opacity
    axes.imshow(pixels, interpolation="none")
    return opacity


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """An empty figure of so many inches, outside pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[:].set_color(_QUIET)
    axes.tick_params(color=_QUIET, labelcolor=INK, labelsize=8)
    axes.xaxis.label.set(color=INK, size=9)
    axes.yaxis.label.set(color=INK, size=9)
    return figure, axes


def to_svg(figure: "Figure") -> str:
    """The figure as one ``<svg>`` element that neither touches the page around it nor loads anything."""
    import matplotlib

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text, and equal drawings become equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deltapatch"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    digest = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>d{digest}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
