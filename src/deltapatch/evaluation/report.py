"""One fit as one HTML page that opens anywhere: no script, nothing loaded from outside, light and dark."""

import base64
import io
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from numpy.typing import NDArray
from PIL import Image

from deltapatch.errors import DeltapatchError
from deltapatch.evaluation import drawings, wording
from deltapatch.evaluation.metrics import ClassResult, Evaluation, paired_difference
from deltapatch.fitting.history import Epoch

MAX_EXAMPLES = 24
THUMBNAIL_SIDE = 96
MAX_MATRIX_CLASSES = 20
MAX_CONFUSED_PAIRS = 15
MAX_SKIP_CLASSES = 20


@dataclass(frozen=True, eq=False)
class SkipWeights:
    """The learned weights of the skips of one stage with n sub-blocks.

    In each array, entry ``[i - 1, j]`` belongs to the skip from state j into sub-block i, with j < i.

    Attributes:
        stage: the path of the stage in the base.
        sub_blocks: n.
        mean: the mean weight over the images, ``(n, n)``; NaN where there is no skip.
        spread: its standard deviation over the images, ``(n, n)``.
        existing: where the base has that skip already, ``(n, n)``.
        per_class: the mean weight over the images of each class, ``(K, n, n)``; NaN without images.
    """

    stage: str
    sub_blocks: int
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    existing: NDArray[np.bool_]
    per_class: NDArray[np.float64]

    def __post_init__(self) -> None:
        square = (self.sub_blocks, self.sub_blocks)
        shapes = (self.mean.shape, self.spread.shape, self.existing.shape, self.per_class.shape[1:])
        if any(shape != square for shape in shapes):
            raise DeltapatchError(
                f"The skip weights of {self.stage} have the shapes {shapes}; "
                f"give {square} for {self.sub_blocks} sub-blocks."
            )


@dataclass(frozen=True)
class Example:
    """An image that was answered wrong, with the probability of the wrong answer."""

    label: str
    prediction: str
    confidence: float
    name: str
    thumbnail: Image.Image


@dataclass(frozen=True, eq=False)
class Report:
    """What the page shows.

    Attributes:
        title: of the page.
        base: the name of the base.
        fingerprint: of the base.
        method: the patch's method and its configuration in one line.
        classes: the names of the K classes.
        data: facts of the data in the order shown.
        patch: what the patch answered on the images of the split.
        head_only: what a head alone answered on the same images.
        base_unchanged: a sentence that says how it was made sure that the base is as it was.
        history: one entry for each epoch.
        examples: the wrong answers to show, at most 24 of them.
        skips: learned skip weights; empty for a method without.
        parameters: numbers that were learned.
        file_bytes: the size of the patch file.
        seconds: how long the fit took.
        versions: of the software.
        warnings: sentences to show at the top.
        split: the images that were evaluated: "test", or "validation" where there are none for testing.
    """

    title: str
    base: str
    fingerprint: str
    method: str
    classes: tuple[str, ...]
    data: Mapping[str, str | int | float]
    patch: Evaluation
    head_only: Evaluation | None
    base_unchanged: str
    history: tuple[Epoch, ...]
    examples: tuple[Example, ...]
    skips: tuple[SkipWeights, ...]
    parameters: int
    file_bytes: int
    seconds: float
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    split: str = "test"

    def __post_init__(self) -> None:
        widths = {len(self.patch.classes), *(len(weights.per_class) for weights in self.skips)}
        if widths != {len(self.classes)}:
            raise DeltapatchError(
                f"The report names {len(self.classes)} classes but shows results for {sorted(widths)}; "
                "make all of them from the same list of classes."
            )


@dataclass(frozen=True)
class Drawing:
    """A picture with the words that stand in for it."""

    svg: str
    alt: str


@dataclass(frozen=True)
class SkipDrawings:
    """The drawings of one stage; ``arcs`` is None for a stage too long to draw as arcs."""

    weights: SkipWeights
    arcs: Drawing | None
    heat_map: Drawing
    per_class: Mapping[str, Drawing]


def write_report(report: Report, path: Path) -> None:
    """Writes the page; an interrupted write leaves the old file or the new one, never half of it."""
    # Names of files that are not valid Unicode must not stop the page from being written.
    page = render_report(report).encode("utf-8", errors="replace")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_bytes(page)
        os.replace(unfinished, path)
    except OSError as error:
        raise DeltapatchError(
            f"{path}: the report cannot be written ({error.strerror}); choose a file in a folder that exists."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def render_report(report: Report) -> str:
    """The whole page as one string."""
    patch, head_only = report.patch, report.head_only
    compared = paired_difference(patch, head_only) if head_only else None
    many_classes = len(report.classes) > MAX_MATRIX_CLASSES
    return _template().render(
        report=report,
        summary=wording.summary(patch, report.split),
        comparison=wording.comparison(head_only, compared) if head_only and compared else None,
        verdict=compared.verdict if compared else None,
        figures=wording.figure_rows([patch, head_only] if head_only else [patch]),
        curves=_draw_history(report.history),
        many_classes=many_classes,
        matrix=_draw_matrix(patch) if many_classes else None,
        strong=drawings.STRONG,
        pairs=patch.most_confused_pairs(MAX_CONFUSED_PAIRS),
        results=sorted(patch.per_class, key=_weakest_first),
        examples=report.examples[:MAX_EXAMPLES],
        skips=[_draw_skips(weights, report.classes) for weights in report.skips],
    )


def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=wording.percent,
        with_interval=wording.with_interval,
        file_size=wording.file_size,
        duration=wording.duration,
        data_uri=_data_uri,
    )
    return environment.from_string(files("deltapatch.evaluation").joinpath("report.html").read_text("utf-8"))


def _data_uri(thumbnail: Image.Image) -> str:
    """A JPEG of at most 96 pixels a side, without anything of the original but its pixels."""
    small = thumbnail.convert("RGBA")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    picture = Image.new("RGB", small.size, "white")
    picture.paste(small, mask=small.getchannel("A"))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _weakest_first(result: ClassResult) -> float:
    return result.recall.value if result.recall else float("inf")


def _draw_history(history: tuple[Epoch, ...]) -> list[Drawing]:
    """The learning curves of loss and accuracy; none without epochs."""
    if not history:
        return []
    training_loss = [epoch.training_loss for epoch in history]
    validation_loss = [epoch.validation_loss for epoch in history]
    training_accuracy = [epoch.training_accuracy for epoch in history]
    validation_accuracy = [epoch.validation_accuracy for epoch in history]
    first = history[0].number
    return [
        _draw_curve("loss", first, training_loss, validation_loss),
        _draw_curve("accuracy", first, training_accuracy, validation_accuracy),
    ]


def _draw_curve(unit: str, first: int, training: list[float], validation: list[float | None]) -> Drawing:
    curves = {"training": training}
    if any(value is not None for value in validation):
        curves["validation"] = [float("nan") if value is None else value for value in validation]
    ends = " and ".join(
        f"{name} {unit} from {line[0]:.3g} to {line[-1]:.3g}" for name, line in curves.items()
    )
    alt = f"Learning curve over {len(training)} epochs: {ends}."
    return Drawing(drawings.draw_curves(curves, first, unit), alt)


def _draw_matrix(patch: Evaluation) -> Drawing:
    alt = f"Confusion matrix of {len(patch.classes)} classes; its largest confusions are in the table."
    return Drawing(drawings.draw_matrix(patch.confusion), alt)


def _draw_skips(weights: SkipWeights, classes: tuple[str, ...]) -> SkipDrawings:
    mean, spread = weights.mean, weights.spread
    alt = f"Skip weights of {weights.stage}, the largest first: {_largest_weights(mean, spread)}."
    arcs = None
    if weights.sub_blocks <= drawings.MAX_ARC_STATES:
        arcs = Drawing(drawings.draw_arcs(mean, spread, weights.existing), f"Arcs. {alt}")
    heat_map = Drawing(drawings.draw_heat_map(mean, spread), f"Heat map. {alt}")
    per_class = {classes[i]: _draw_class(classes[i], own) for i, own in _most_different(weights)}
    return SkipDrawings(weights, arcs, heat_map, per_class)


def _draw_class(name: str, mean: NDArray[np.float64]) -> Drawing:
    return Drawing(drawings.draw_heat_map(mean), f"Heat map of {name}: {_largest_weights(mean)}.")


def _largest_weights(mean: NDArray[np.float64], spread: NDArray[np.float64] | None = None) -> str:
    """The ten largest weights in words, which are all of them for up to four sub-blocks."""
    places = np.argwhere(np.isfinite(mean))
    order = np.argsort(-mean[tuple(places.T)], kind="stable")[:10]
    return ", ".join(
        f"state {j} into sub-block {i + 1} {mean[i, j]:.2f}"
        + (f" ± {spread[i, j]:.2f}" if spread is not None else "")
        for i, j in places[order].tolist()
    )


def _most_different(weights: SkipWeights) -> list[tuple[int, NDArray[np.float64]]]:
    """At most 20 classes with images: those whose weights differ most from the mean, in their usual order."""
    present = np.isfinite(weights.mean)
    distances = np.abs(weights.per_class[:, present] - weights.mean[present]).mean(axis=1)
    known = np.flatnonzero(np.isfinite(distances))
    chosen = known[np.argsort(-distances[known], kind="stable")[:MAX_SKIP_CLASSES]]
    return [(i, weights.per_class[i]) for i in sorted(chosen.tolist())]
