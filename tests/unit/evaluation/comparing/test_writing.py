"""The files of a comparison: they say what was found, and names from data cannot become anything else."""

import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from deltapatch.evaluation.comparing.budget import Budget
from deltapatch.evaluation.comparing.ledger import Matrix
from deltapatch.evaluation.comparing.page import render_page
from deltapatch.evaluation.comparing.phrases import LINE_NAMES, STANDING_NAMES
from deltapatch.evaluation.comparing.planning import ComparisonConfig, Planned
from deltapatch.evaluation.comparing.result import Comparison
from deltapatch.evaluation.comparing.writing import as_arrow, as_markdown, chosen_settings
from deltapatch.methods.head import Head

from .conftest import FIT, MakeJob, MakeRow

HOSTILE = "<script>alert(1)</script>|\n$x$"

MakeComparison = Callable[..., Comparison]


@pytest.fixture
def make_comparison(make_job: MakeJob, make_row: MakeRow) -> MakeComparison:
    """Two methods with two seeds on one task; keyword arguments go into every result."""

    def make(task: str = "digits", names: tuple[str, str] = ("a", "b"), **fields: Any) -> Comparison:
        done = [
            (
                Planned(make_job(), name, Head(), (task,), False),
                make_row(accuracy, accuracy, seed, task=task, **fields),
            )
            for name, accuracies in zip(names, ((0.8, 0.9), (0.7, 0.71)), strict=True)
            for seed, accuracy in enumerate(accuracies)
        ]
        return Comparison(
            *("base of " + task, "sha256:0", ComparisonConfig(), FIT, Budget(), {}, tuple(done)),
            left_out=(f"c on {task}: it could not be",),
        )

    return make


class Page(HTMLParser):
    """The elements of a page, with what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "action", "data")
        self.references += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_table_comes_back_from_parquet_as_it_was(make_comparison: MakeComparison) -> None:
    found = make_comparison(base_accuracy=0.6, supporting_accuracy=0.5)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(as_arrow(found), buffer)
    table = pyarrow.parquet.read_table(buffer)
    assert table.schema == as_arrow(found).schema
    first, second = table.to_pylist()
    assert (first["method"], second["method"]) == ("a", "b")
    line = found.sections[0].lines[0]
    assert first["accuracy"] == line.accuracy.mean == pytest.approx(0.85)
    assert first["accuracy_deviation"] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert (first["accuracy_low"], first["accuracy_high"]) == (line.interval.low, line.interval.high)
    assert (first["seeds"], first["parameters"], first["head_parameters"]) == (2, 10, 20)
    assert (first["base_accuracy"], first["supporting_accuracy"]) == (0.6, 0.5)
    assert first["harmonic_mean"] == line.harmonic


def test_what_was_not_measured_is_null_in_parquet(make_comparison: MakeComparison) -> None:
    (row, _) = as_arrow(make_comparison()).to_pylist()
    assert (row["base_accuracy"], row["supporting_accuracy"], row["harmonic_mean"]) == (None, None, None)


def test_a_comparison_without_results_has_the_same_columns(make_comparison: MakeComparison) -> None:
    empty = as_arrow(make_comparison(refused="no place", scores=()))
    assert (len(empty), empty.schema) == (0, as_arrow(make_comparison()).schema)


def test_the_page_loads_nothing_and_runs_nothing(make_comparison: MakeComparison) -> None:
    page = Page(render_page(make_comparison()))
    assert "svg" in page.tags
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert "c on digits: it could not be" in page.text


def test_names_from_data_cannot_become_markup_on_the_page(make_comparison: MakeComparison) -> None:
    text = render_page(make_comparison(HOSTILE, names=(HOSTILE, "b")))
    page = Page(text)
    assert "script" not in page.tags
    assert "alert(1)" in page.text
    assert set(page.tags) == set(Page(render_page(make_comparison())).tags)
    assert "$x$" in page.text


def test_names_from_data_cannot_break_the_markdown_table(make_comparison: MakeComparison) -> None:
    text = as_markdown(make_comparison(HOSTILE, names=(HOSTILE, "b")))
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {line.replace("\\|", "").count("|") for line in rows}
    assert widths == {len(STANDING_NAMES) + 1, len(LINE_NAMES) + 1}


def test_a_tie_and_what_was_left_out_stand_in_the_markdown(make_comparison: MakeComparison) -> None:
    text = as_markdown(make_comparison())
    assert "tie (−14.5 points" in text
    assert "## Left out\n\n- c on digits: it could not be" in text


def test_the_accuracies_after_each_step_are_drawn_as_the_mean_over_seeds(
    make_comparison: MakeComparison,
) -> None:
    matrix = Matrix(columns=("own", "digits"), rows=("base", "digits"), values=((0.6, None), (0.5, 0.9)))
    text = render_page(make_comparison(matrix=matrix, base_accuracy=0.6, supporting_accuracy=0.5))
    assert (
        "Accuracy of a on each task after each step; at the end: own 50.0\u00a0%, digits 90.0\u00a0%." in text
    )
    assert "after each step" not in render_page(make_comparison())


def test_several_tasks_have_a_picture_of_their_mean(make_comparison: MakeComparison) -> None:
    one, other = make_comparison(), make_comparison("cars")
    both = replace(one, done=one.done + other.done)
    assert "<h3>Mean over the tasks</h3>" in render_page(both)
    assert "<h3>Mean over the tasks</h3>" not in render_page(one)


def test_the_settings_name_every_variant_s_validation_accuracy(make_comparison: MakeComparison) -> None:
    (chosen, _) = chosen_settings(make_comparison())["chosen"]
    assert chosen["validation_accuracy"] == {"head": pytest.approx(0.85)}
    assert chosen["chosen_by"] == "validation"
