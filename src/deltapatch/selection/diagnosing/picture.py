"""A diagnosis as a picture: layers from the input on the left to the output on the right."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DeltapatchError
from ...evaluation.drawings import CELL
from . import Diagnosis
from .drift import FeatureDrift
from .weights import WeightChanges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
MOST_NAMES = 40

_INK, _QUIET, _SECOND = "#1c1c1c", "#8a8a8a", "#c2571a"
_COLOURS = {"convolution": CELL, "linear": "#2f8f6b", "normalisation": _SECOND, "other": _QUIET}


def check_picture(path: Path) -> None:
    """Raises DeltapatchError unless a picture can be written there."""
    if path.suffix.lower() not in FORMATS:
        raise DeltapatchError(f"{path}: pictures are written as {', '.join(FORMATS)}; give such a name")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DeltapatchError(
            f"{path}: the picture cannot be written there; give a file in a folder that exists"
        )


def draw_diagnosis(diagnosis: Diagnosis, title: str, path: Path) -> None:
    """Draws what there is of: relative distance by layer, T by layer, feature drift by stage.

    Raises:
        DeltapatchError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    weights, drift = diagnosis.weights, diagnosis.drift
    has_transferability = weights is not None and weights.transferability is not None
    panels = (weights is not None) + has_transferability + (drift is not None)
    bars = max(len(weights.layers) if weights else 0, 2 * len(drift.places) if drift else 0)
    figure = Figure(
        (min(max(6.4, 2.0 + 0.17 * bars), 16.0), 1.0 + 2.7 * panels), layout="constrained", dpi=150
    )
    figure.suptitle(" ".join(title.split()), size=11, color=_INK, parse_math=False)
    every = list(np.atleast_1d(figure.subplots(panels, 1)))
    if weights is not None:
        _draw_distances(every.pop(0), weights)
        if has_transferability:
            _draw_transferability(every.pop(0), weights)
    if drift is not None:
        _draw_drift(every.pop(0), drift)
    try:
        figure.savefig(path)
    except OSError as error:
        raise DeltapatchError(f"{path}: the picture cannot be written ({error.strerror})") from error


def _draw_distances(axes: "Axes", weights: WeightChanges) -> None:
    from matplotlib.patches import Patch as Key

    layers = weights.layers
    heights = [layer.relative if np.isfinite(layer.relative) else 0.0 for layer in layers]
    axes.bar(range(len(layers)), heights, color=[_COLOURS[layer.kind] for layer in layers])
    _style(axes, "distance from the base,\nrelative to its size", [layer.path for layer in layers])
    kinds = dict.fromkeys(layer.kind for layer in layers)
    keys = [Key(color=_COLOURS[kind], label=kind) for kind in kinds]
    axes.legend(handles=keys, frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4)


def _draw_transferability(axes: "Axes", weights: WeightChanges) -> None:
    from matplotlib.ticker import ScalarFormatter

    layers = [layer for layer in weights.layers if layer.transferability is not None]
    heights = [layer.transferability or 0.0 for layer in layers]
    colours = [_COLOURS[layer.kind] for layer in layers]
    # Up from 1 where pre-training helped, down from it where it did not.
    axes.bar(range(len(layers)), [height - 1 for height in heights], bottom=1, color=colours)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.axhline(1, color=_INK, linewidth=0.8)
    assert weights.transferability is not None
    axes.axhline(weights.transferability, color=_QUIET, linewidth=0.8, linestyle="--")
    axes.set_title(f"T = {weights.transferability:.2f} (dashed)", size=9, color=_INK, loc="right")
    _style(axes, "T = D(r, B) / D(A, B)", [layer.path for layer in layers])


def _draw_drift(axes: "Axes", drift: FeatureDrift) -> None:
    positions = np.arange(len(drift.places))
    heights = [place.relative for place in drift.places]
    bars = axes.bar(positions, heights, width=0.5, color=CELL)
    axes.set_ylim(0, max(1.1 * max(heights), 0.01))
    _style(axes, "relative distance", [place.name for place in drift.places])
    axes.yaxis.label.set_color(CELL)
    beside = axes.twinx()
    known = [
        (at, place.cka) for at, place in zip(positions, drift.places, strict=True) if place.cka is not None
    ]
    line = beside.plot([at for at, _ in known], [cka for _, cka in known], "o-", color=_SECOND, markersize=4)
    beside.set_ylim(0, 1.05)
    beside.set_ylabel("linear CKA", size=9, color=_SECOND)
    beside.tick_params(labelsize=8)
    beside.spines["top"].set_visible(False)
    axes.set_title(f"features of {drift.images} images", size=9, color=_INK, loc="left")
    axes.legend(
        [bars, *line],
        ["relative distance", "linear CKA"],
        frameon=False,
        fontsize=8,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
    )


def _style(axes: "Axes", label: str, names: list[str]) -> None:
    """Axis labels; of many layers only some are named."""
    step = -(-len(names) // MOST_NAMES)
    shown = range(0, len(names), step)
    axes.set_xticks(
        list(shown),
        labels=[names[index] or "the model itself" for index in shown],
        rotation=35 if len(names) <= 12 else 90,
        ha="right" if len(names) <= 12 else "center",
        rotation_mode="anchor" if len(names) <= 12 else "default",
        parse_math=False,
    )
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.tick_params(labelsize=8 if len(names) <= 12 else 6)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel(label, size=9, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
