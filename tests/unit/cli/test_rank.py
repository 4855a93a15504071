"""``deltapatch rank``: a table of bases, or one line that says why not."""

from pathlib import Path
from typing import Any

import pytest
from digits import write_tree

from deltapatch.selection.history.file import append
from deltapatch.selection.history.record import Record
from deltapatch.selection.ranking import rank_bases

SHORT = ("--device", "cpu", "--no-progress", "--draws", 2)


@pytest.fixture
def bases(base_file: Path) -> str:
    return f"demo,{base_file.parent / 'bases.toml'}"


@pytest.fixture(autouse=True)
def toml(base_file: Path) -> Path:
    """A file with a base that has a stage, and one that has none and cannot be loaded."""
    path = base_file.parent / "bases.toml"
    other = "size = 32\nmean = 0.2\nstd = 0.23\ncrop_pct = 1.0\n"
    path.write_text(
        f'[[base]]\nsource = "{base_file.name}:other"\nname = "other"\n{other}\n'
        f'[[base]]\nsource = "{base_file.name}:module"\nsize = 32\nname = "broken"\n'
    )
    return path


def test_the_table_is_printed_and_every_file_is_written(
    run: Any, tree: Path, bases: str, tmp_path: Path
) -> None:
    out = tmp_path / "ranked"
    ran = run("rank", tree, "--bases", bases, *SHORT, "--out", out)
    assert ran.code == 0
    assert "left out: broken: " in ran.err
    assert "it must return an nn.Module" in ran.err
    assert "24 images of 3 classes, ordered by linear_probe: " in ran.out
    assert "same pick on halves" in ran.out
    assert " = " in ran.out  # one number in a bias sets the two bases apart
    assert sorted(path.name for path in out.iterdir()) == ["ranking.md", "ranking.parquet", "ranking.png"]


def test_the_help_shows_the_example(run: Any) -> None:
    from deltapatch.cli.rank import EXAMPLE

    assert f"Example: {EXAMPLE}" in run("rank", "-h").words()


def test_the_options_reach_the_ranking(run: Any, tree: Path) -> None:
    options = ("--scores", "parc,h_score", "--layers", "--probe", 12, "--draws", 0)
    ran = run("rank", tree, "--bases", "demo", "--device", "cpu", "--no-progress", *options)
    assert ran.code == 0
    assert "12 images of 3 classes, ordered by parc: demo is first." in ran.out
    assert "│ demo │ layer4 │" in ran.out
    assert "leep" not in ran.out
    assert "same pick" not in ran.out


def test_every_score_can_be_asked_for(run: Any, tree: Path) -> None:
    ran = run("rank", tree, "--bases", "demo", *SHORT, "--scores", "all")
    assert ran.code == 0
    assert "sfda" in ran.out
    assert "left out" not in ran.err


def test_progress_goes_to_standard_error_and_the_table_is_printed_once(run: Any, tree: Path) -> None:
    ran = run("rank", tree, "--bases", "demo", "--device", "cpu", "--draws", 2)
    assert ran.code == 0
    assert ran.out.count("nearest mean") == 1


def test_known_results_stand_beside_the_scores(
    run: Any, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAPATCH_HISTORY", str(tmp_path / "history.csv"))
    name = "demo (printed characters)"
    append([Record("own", name, "birds", 0.5), Record("own", "other", "birds", 0.7)])
    from deltapatch.loading import load_base

    append([Record("own", name, "cars", value, load_base("demo").fingerprint) for value in (0.5,)])
    append([Record("own", "other", "cars", 0.7, "sha256:0")])
    assert "history" in run("rank", tree, "--bases", "demo", *SHORT).out
    assert "history" not in run("rank", tree, "--bases", "demo", *SHORT, "--no-history").out


def test_ctrl_c_prints_what_is_done(run: Any, tree: Path, bases: str, monkeypatch: Any) -> None:
    probe_base = rank_bases.probe_base
    seen: list[str] = []

    def interrupted(base: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(base.name)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return probe_base(base, *arguments, **options)

    monkeypatch.setattr(rank_bases, "probe_base", interrupted)
    ran = run("rank", tree, "--bases", bases, *SHORT)
    assert ran.code == 130
    assert "demo is first" in ran.out
    assert "interrupted; the bases above are those that were done" in ran.err


def test_no_base_that_can_be_ranked_is_an_error(run: Any, tree: Path) -> None:
    ran = run("rank", tree, "--bases", "torchvision/nothing", *SHORT)
    assert ran.code == 2
    assert "left out: torchvision/nothing: torchvision has no model 'nothing'" in ran.err
    assert ran.err.endswith("error: no base could be ranked; the reasons are above\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scores", "logme9"], "there is no score 'logme9'; choose from"),
        (["--bases", "demo,demo"], "2 bases are called 'demo'"),
        (["--bases", "none.toml"], "none.toml: cannot be read"),
        (["--bases", ","], "there is no base to rank"),
        (["--probe", "2"], "a probe of 2 images cannot hold"),
        (["--draws", "-1"], "draws -1"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    run: Any, tree: Path, arguments: list[str], message: str
) -> None:
    options = ["rank", tree, "--device", "cpu", "--no-progress", "--bases", "demo", *arguments]
    assert message in run(*options).error


def test_images_that_cannot_be_scored_are_one_line(run: Any, tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", (0, 1), 1)
    error = run("rank", tmp_path / "tree", "--bases", "demo", *SHORT).error
    assert "a score needs two such classes" in error


def test_a_folder_that_cannot_be_written_is_one_line(run: Any, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    error = run("rank", tree, "--bases", "demo", *SHORT, "--out", file).error
    assert error.startswith(f"{file}: nothing can be written there")
