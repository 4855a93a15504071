"""The files of a comparison: table as Parquet and Markdown, page, and the settings that were chosen."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DeltapatchError
from ...patch import library_versions
from ..wording import markdown_cell
from .ledger import replace_file
from .page import render_page
from .phrases import INTERVALS, LINE_NAMES, STANDING_NAMES, heading, line_in_words, standing_in_words
from .result import Comparison
from .table import Line, Section

if TYPE_CHECKING:
    import pyarrow


def check_parquet() -> None:
    """Raises DeltapatchError where pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise DeltapatchError(
            "the table is written as Parquet, which needs pyarrow; install it with: pip install"
            " 'deltapatch[parquet]'"
        )


def write_comparison(found: Comparison, folder: Path) -> None:
    """Writes ``results.parquet``, ``results.md``, ``report.html`` and ``settings.json``, each whole."""
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(as_arrow(found), buffer)
    replace_file(folder / "results.parquet", buffer.getvalue())
    replace_file(folder / "results.md", as_markdown(found).encode("utf-8", errors="replace"))
    replace_file(folder / "report.html", render_page(found).encode("utf-8", errors="replace"))
    settings = json.dumps(chosen_settings(found), indent=1, ensure_ascii=False)
    replace_file(folder / "settings.json", settings.encode("utf-8", errors="replace"))


def as_arrow(found: Comparison) -> "pyarrow.Table":
    """One row for each setting, task and method; accuracies from 0 to 1, NaN as null."""
    import pyarrow

    number, whole, text = pyarrow.float64(), pyarrow.int64(), pyarrow.string()
    schema = pyarrow.schema(
        {
            **dict.fromkeys(("protocol", "amount", "task", "method", "variant", "measured_on"), text),
            "seeds": whole,
            **dict.fromkeys(("accuracy", "accuracy_deviation", "accuracy_low", "accuracy_high"), number),
            "validation_accuracy": number,
            **dict.fromkeys(("parameters", "head_parameters", "file_bytes"), whole),
            **dict.fromkeys(("seconds", "base_accuracy", "supporting_accuracy", "harmonic_mean"), number),
        }
    )
    rows = [_plain(section, line) for section in found.sections for line in section.lines]
    return pyarrow.Table.from_pylist(rows, schema=schema)


def _plain(section: Section, line: Line) -> dict[str, Any]:
    deviation = line.accuracy.standard_deviation
    return {
        "protocol": section.protocol,
        "amount": section.amount,
        "task": line.task,
        "method": line.contender,
        "variant": line.variant,
        "measured_on": line.measured_on,
        "seeds": line.accuracy.n,
        "accuracy": line.accuracy.mean,
        "accuracy_deviation": None if math.isnan(deviation) else deviation,
        "accuracy_low": line.interval.low,
        "accuracy_high": line.interval.high,
        "validation_accuracy": line.validation_accuracy,
        "parameters": line.parameters,
        "head_parameters": line.head_parameters,
        "file_bytes": line.file_bytes,
        "seconds": line.seconds,
        "base_accuracy": line.base_accuracy,
        "supporting_accuracy": line.supporting_accuracy,
        "harmonic_mean": line.harmonic,
    }


def as_markdown(found: Comparison) -> str:
    """The tables for a person."""
    parts = [f"# Patch methods on {markdown_cell(found.base)}\n"]
    parts += [f"**{warning}**\n" for warning in found.warnings]
    parts.append(f"{INTERVALS}\n")
    for section in found.sections:
        parts += [f"## {heading(section)}\n", _standings(section), _lines(section)]
    if found.left_out:
        parts.append("## Left out\n")
        parts.append("".join(f"- {markdown_cell(line)}\n" for line in found.left_out))
    return "\n".join(parts)


def _standings(section: Section) -> str:
    return _table(STANDING_NAMES, [standing_in_words(one) for one in section.standings])


def _lines(section: Section) -> str:
    return _table(LINE_NAMES, [line_in_words(line) for line in section.lines])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(markdown_cell(cell) for cell in line)} |\n" for line in lines)


def chosen_settings(found: Comparison) -> dict[str, Any]:
    """What was compared and how, and which variant was chosen for each task, with what it was chosen by."""
    return {
        "base": {"name": found.base, "fingerprint": found.fingerprint},
        "data": {name: source.digest for name, source in found.data.items()},
        "comparison": asdict(found.config),
        "fit": {name: value for name, value in asdict(found.fit).items() if name != "seed"},
        "budget": asdict(found.budget),
        "chosen": [_chosen(section, line) for section in found.sections for line in section.lines],
        "left_out": list(found.left_out),
        "warnings": list(found.warnings),
        "versions": library_versions(),
    }


def _chosen(section: Section, line: Line) -> dict[str, Any]:
    return {
        "protocol": section.protocol,
        "amount": section.amount,
        "task": line.task,
        "method": line.rows[0].method,
        "options": line.rows[0].options,
        "chosen_by": "test-selected" if line.rows[0].selection == "test" else "validation",
        "validation_accuracy": dict(line.validation),
        "patches": {str(row.seed): [patch.name for patch in row.patches] for row in line.rows},
    }
