"""Every merge, and what stands beside them, is found by its name, and editors know the same names."""

import ast
from pathlib import Path

import pytest

from deltapatch import merging
from deltapatch.merging import merges
from deltapatch.merging.rules import registered_merges


@pytest.mark.parametrize("name", merges.NAMES)
def test_a_merge_is_a_function_of_the_package(name: str) -> None:
    function = getattr(merging, name)
    assert function.__name__ == name
    assert function.__doc__


@pytest.mark.parametrize("name", sorted(merging._HOMES))
def test_other_names_are_found_too(name: str) -> None:
    found = getattr(merging, name)
    assert getattr(found, "__name__", name) == name


def test_editors_are_told_of_every_merge() -> None:
    tree = ast.parse(Path(merging.__file__).read_text(encoding="utf-8"))
    named = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("merges.")
        for alias in node.names
    }
    assert named == set(merges.NAMES)


def test_every_file_registers_its_merge_under_its_own_name() -> None:
    assert set(registered_merges()) == set(merges.NAMES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        merging.nothing  # noqa: B018
