"""Every score, and what stands beside them, is found by its name, and editors know the same names."""

import ast
from pathlib import Path

import pytest

from deltapatch import selection
from deltapatch.selection import scores
from deltapatch.selection.score import ranking_scores


@pytest.mark.parametrize("name", scores.NAMES)
def test_a_score_is_a_function_of_the_package(name: str) -> None:
    function = getattr(selection, name)
    assert function.__name__ == name
    assert function.__doc__


@pytest.mark.parametrize("name", sorted(selection._HOMES))
def test_other_names_are_found_too(name: str) -> None:
    found = getattr(selection, name)
    assert getattr(found, "__name__", name) == name


def test_editors_are_told_of_every_score() -> None:
    tree = ast.parse(Path(selection.__file__).read_text(encoding="utf-8"))
    named = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scores.")
        for alias in node.names
    }
    assert named == set(scores.NAMES)


def test_ranking_scores_are_scores() -> None:
    assert set(ranking_scores()) < set(scores.NAMES)
    assert {entry.reads for entry in ranking_scores().values()} == {"statistics", "features", "probabilities"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        selection.nothing  # noqa: B018
