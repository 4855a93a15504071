"""The files of a ranking: table as Parquet and Markdown, and a picture of score against cost."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeltapatchError
from ...evaluation.comparing.ledger import replace_file
from ...evaluation.wording import markdown_cell
from .picture import draw_ranking
from .ranked import Cell, RankedBase, Ranking
from .table import columns, layer_columns, layer_lines, lines, problems, summary

if TYPE_CHECKING:
    import pyarrow

FILES = ("ranking.parquet", "ranking.md", "ranking.png")


def prepare_folder(folder: Path) -> None:
    """Makes the folder; called before any work, which would be lost otherwise.

    Raises:
        DeltapatchError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeltapatchError(
            f"{folder}: nothing can be written there ({error.strerror}); choose another folder"
        ) from error


def write_ranking(ranking: Ranking, folder: Path) -> tuple[str, ...]:
    """Writes `FILES`, each whole; no picture where there is no base to draw. Returns the names.

    Raises:
        DeltapatchError: a file cannot be written.
    """
    import pyarrow.parquet

    prepare_folder(folder)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(as_arrow(ranking), buffer)
    replace_file(folder / "ranking.parquet", buffer.getvalue())
    replace_file(folder / "ranking.md", as_markdown(ranking).encode("utf-8", errors="replace"))
    if ranking.best is None:
        return FILES[:2]
    replace_file(folder / "ranking.png", draw_ranking(ranking))
    return FILES


def as_arrow(ranking: Ranking) -> "pyarrow.Table":
    """One row for each base and score, and for each stage and score where stages were scored.

    Columns:
        task: name of the images.
        base: name of the candidate.
        place: from 1; null where the base has no value of the ordering score.
        stage: empty for the base's own features.
        score: name of the score; null for a base that could not be looked at.
        orders: whether this score orders the ranking.
        value: null where there is none.
        low, high: how far 90 % of the halves lie from their mean, around the value.
        halves: the value on each half, in the order of the draws, which are the same for all bases; null
            entries where there is none.
        tie: whether the base ties with the best, by the ordering score.
        stability: share of the halves on which the score picks the same base.
        problem: why there is no value.
        warnings: what speaks against the value.
        dropped_classes: labels that were left out, since they have too few images.
        samples, width: N and d.
        score_seconds: of this score on the whole probe.
        nearest_mean_accuracy: of the held-out halves, 0..1.
        history: what is expected of the base from its accuracies on other images, in standard deviations.
        parameters: of the base.
        seconds_per_image: of a forward pass.
        forward_seconds, load_seconds: of the pass over the probe, and of loading.
        fingerprint: of the base's weights.
        images, classes, seed: of the probe.
    """
    import pyarrow

    number, whole, text = pyarrow.float64(), pyarrow.int64(), pyarrow.string()
    schema = pyarrow.schema(
        {
            "task": text,
            "base": text,
            "place": whole,
            "stage": text,
            "score": text,
            "orders": pyarrow.bool_(),
            **dict.fromkeys(("value", "low", "high"), number),
            "halves": pyarrow.list_(number),
            "tie": pyarrow.bool_(),
            "stability": number,
            "problem": text,
            "warnings": pyarrow.list_(text),
            "dropped_classes": pyarrow.list_(whole),
            **dict.fromkeys(("samples", "width"), whole),
            **dict.fromkeys(("score_seconds", "nearest_mean_accuracy", "history"), number),
            "parameters": whole,
            **dict.fromkeys(("seconds_per_image", "forward_seconds", "load_seconds"), number),
            "fingerprint": text,
            **dict.fromkeys(("images", "classes", "seed"), whole),
        }
    )
    rows: list[dict[str, Any]] = []
    for place, row in enumerate(ranking.rows, 1):
        shared = _of_base(ranking, place, row)
        if row.problem:
            rows.append(shared | {"problem": row.problem})
            continue
        rows += [shared | cell for cell in _of_cells(ranking, "", row.width, row.cells)]
        for layer in row.layers:
            rows += [shared | cell for cell in _of_cells(ranking, layer.stage, layer.width, layer.cells)]
    return pyarrow.Table.from_pylist(rows, schema=schema)


def _of_base(ranking: Ranking, place: int, row: RankedBase) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "task": ranking.task,
        "base": row.name,
        "images": ranking.images,
        "classes": ranking.classes,
        "seed": ranking.seed,
    }
    if row.problem:
        return shared
    return shared | {
        "place": None if math.isnan(row.value(ranking.ordered_by)) else place,
        "tie": row.name in ranking.ties,
        "samples": row.samples,
        "nearest_mean_accuracy": _or_null(row.nearest_mean),
        "history": _or_null(row.history),
        "parameters": row.parameters,
        "seconds_per_image": _or_null(row.seconds_per_image),
        "forward_seconds": _or_null(row.forward_seconds),
        "load_seconds": _or_null(row.load_seconds),
        "fingerprint": row.fingerprint,
    }


def _of_cells(ranking: Ranking, stage: str, width: int, cells: Mapping[str, Cell]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, cell in cells.items():
        low, high = cell.interval
        diagnostics = None if cell.score is None else cell.score.diagnostics
        found.append(
            {
                "stage": stage,
                "score": name,
                "orders": not stage and name == ranking.ordered_by,
                "value": _or_null(cell.value),
                "low": _or_null(low),
                "high": _or_null(high),
                "halves": [_or_null(value) for value in cell.halves.tolist()],
                "stability": None if stage else _or_null(ranking.stability(name)),
                "problem": cell.problem or None,
                "warnings": [] if diagnostics is None else list(diagnostics.warnings),
                "dropped_classes": [] if diagnostics is None else list(diagnostics.dropped),
                "width": width,
                "score_seconds": None if diagnostics is None else diagnostics.seconds,
            }
        )
    return found


def as_markdown(ranking: Ranking) -> str:
    """The tables for a person."""
    parts = [f"# Bases for {markdown_cell(ranking.task)}\n", f"{markdown_cell(summary(ranking))}\n"]
    if ranking.interrupted:
        parts.append("**Interrupted: not every base was looked at.**\n")
    parts.append(_table(columns(ranking), lines(ranking)))
    if any(row.layers for row in ranking.rows):
        parts += ["## Stages\n", _table(layer_columns(ranking), layer_lines(ranking))]
    for title, sentences in (("Left out", problems(ranking)), ("Warnings", ranking.warnings)):
        if sentences:
            parts.append(f"## {title}\n")
            parts.append("".join(f"- {markdown_cell(sentence)}\n" for sentence in sentences))
    return "\n".join(parts)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    found = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(markdown_cell(cell) for cell in line)} |\n" for line in found)


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value
