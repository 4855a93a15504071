"""The rooms of the package stand in an order, and imports go down it only."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltapatch

PACKAGE = Path(deltapatch.__file__).parent
ROOMS = [
    "kernel",
    "methods",
    "data",
    "fitting",
    "evaluation",
    "selection",
    "merging",
    "tasks",
    "serving",
    "scale",
    "demo",
    "cli",
]
# The folders whose files are alternatives to each other: each of them is readable, and removable, alone.
APART = [("methods",), ("selection", "scores"), ("merging", "merges")]
# What is public is named at the front door, and "demo" is a name that bases are loaded by.
FRONT_DOORS = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
LAZY_DEMO = PACKAGE / "loading.py"

FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path: Path) -> tuple[str, ...]:
    """A file as a module's name inside the package: ``methods/delta.py`` is ("methods", "delta")."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _room(module: tuple[str, ...]) -> str:
    return module[0] if module and module[0] in ROOMS else "kernel"


def _folder_apart(module: tuple[str, ...]) -> tuple[str, ...] | None:
    """Which of the folders of alternatives a module is in, if any."""
    return next((folder for folder in APART if module[: len(folder)] == folder), None)


def _imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of ours that a file imports, anywhere in it."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
            yield from (name[1:] for name in names if name[0] == "deltapatch")
        elif isinstance(node, ast.ImportFrom):
            stem = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                stem = (*package[: len(package) - node.level + 1], *stem)
            elif stem[0] == "deltapatch":
                stem = stem[1:]
            else:
                continue
            yield from (_existing((*stem, alias.name)) for alias in node.names)


def _existing(module: tuple[str, ...]) -> tuple[str, ...]:
    """The module itself, or the one that it is a name in."""
    path = PACKAGE.joinpath(*module)
    return module if path.is_dir() or path.with_suffix(".py").is_file() else module[:-1]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path not in FRONT_DOORS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_file_imports_from_its_own_room_and_earlier_ones_only(path: Path) -> None:
    here = _module(path)
    for imported in _imports(path):
        if path == LAZY_DEMO and imported[:1] == ("demo",):
            continue
        assert ROOMS.index(_room(imported)) <= ROOMS.index(_room(here)), f"imports {'.'.join(imported)}"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if _folder_apart(_module(path)) and path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_methods_scores_and_merges_do_not_import_each_other(path: Path) -> None:
    here = _module(path)
    folder = _folder_apart(here)
    assert folder is not None
    others = [name for name in _imports(path) if _folder_apart(name) == folder and name not in (here, folder)]
    public = [name for name in others if not name[-1].startswith("_")]
    assert public == []


def test_no_file_has_more_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES
    }
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = [
        "torchvision",
        "accelerate",
        "matplotlib",
        "sklearn",
        "pydantic",
        "transformers",
        "torch",
        "timm",
    ]
    program = f"import sys, json, deltapatch; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert json.loads(printed) == []


def test_everything_public_can_be_imported_by_name() -> None:
    for name in deltapatch.__all__:
        assert getattr(deltapatch, name).__module__ if name != "methods" else deltapatch.methods
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        deltapatch.nothing  # noqa: B018
