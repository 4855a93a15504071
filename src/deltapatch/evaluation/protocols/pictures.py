"""The accuracy matrix as a heat map."""

import numpy as np

from ..drawings import INK, STRONG, new_figure, shade, to_svg
from .scores import AccuracyMatrix

LONGEST_NAME = 24


def draw_accuracy_matrix(matrix: AccuracyMatrix) -> str:
    """Draws the accuracy, in percent, on each task (column) after each step (row), as one ``<svg>`` element.

    A task that was not measured has an empty cell. Colours come from the page, as for all drawings of a
    report.
    """
    rows, columns = matrix.values.shape
    figure, axes = new_figure(2.2 + 0.62 * columns, 1.3 + 0.42 * rows)
    opacity = shade(axes, matrix.values)
    axes.set_aspect("auto")
    # A name comes from the data: what stands between two dollars in it is no formula.
    axes.set_yticks(range(rows), labels=[_shortened(name) for name in matrix.rows], parse_math=False)
    axes.set_xticks(
        range(columns),
        labels=[_shortened(name) for name in matrix.columns],
        rotation=30,
        ha="right",
        rotation_mode="anchor",
        parse_math=False,
    )
    axes.set_xlabel("accuracy on (%)")
    axes.set_ylabel("after")
    for row, column in np.argwhere(np.isfinite(matrix.values)).tolist():
        colour = "#ffffff" if opacity[row, column] >= STRONG else INK
        text = f"{100 * matrix.values[row, column]:.1f}"
        axes.text(column, row, text, color=colour, size=9, ha="center", va="center")
    return to_svg(figure)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
