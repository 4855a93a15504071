"""The user's own results survive kills, other processes and damaged lines."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from deltapatch.errors import DeltapatchError, DeltapatchWarning
from deltapatch.selection import SelectionError
from deltapatch.selection.history.file import COLUMNS, append, own_history_path, read_records
from deltapatch.selection.history.prior import History
from deltapatch.selection.history.record import Record

ONE = Record(
    pool="own",
    model="net",
    target="birds, small",
    accuracy=0.75,
    fingerprint="sha256:1",
    digest="sha256:2",
    measured_on="test",
    method='delta (modules=1, start="plain")',
    seeds="0 1 2",
    job="j1",
    date="2026-01-31",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history.csv"


def test_results_are_read_as_they_were_written(path: Path) -> None:
    assert append([ONE, replace(ONE, job="j2", target="ünknown")], path) == 2
    assert append([replace(ONE, job="j3", accuracy=1 / 3)], path) == 1
    found = read_records(path)
    assert found == (ONE, replace(ONE, job="j2", target="ünknown"), replace(ONE, job="j3", accuracy=1 / 3))
    assert path.read_text("utf-8").splitlines()[0] == ",".join(COLUMNS)
    assert History.read(path).records == found


def test_the_same_fits_are_noted_once(path: Path) -> None:
    assert append([ONE, ONE], path) == 1
    before = path.read_bytes()
    assert append([replace(ONE, date="2026-02-01")], path) == 0
    assert path.read_bytes() == before
    unnamed = replace(ONE, job="")
    assert append([unnamed, unnamed], path) == 2


def test_a_line_break_in_a_name_takes_no_second_line(path: Path) -> None:
    append([replace(ONE, target="two\nlines\r here")], path)
    assert len(path.read_bytes().splitlines()) == 2
    assert read_records(path)[0].target == "two lines here"


def test_a_damaged_line_is_skipped_with_a_warning_and_stays(path: Path) -> None:
    append([ONE], path)
    whole = path.read_bytes()
    damaged = b'own,net,"unfinished\n\xff\xfe,,,,,,,,,,\nown,net,birds,fast,,,,,,,\n\n'
    path.write_bytes(whole + damaged + b"own,net,cars,0.5,,,,,,j9,")  # the last line without its end
    with pytest.warns(DeltapatchWarning) as warned:
        found = read_records(path)
    assert [record.target for record in found] == ["birds, small", "cars"]
    lines = [str(warning.message) for warning in warned]
    assert len(lines) == 3
    assert all(f"line {number}, is no result" in line for number, line in enumerate(lines, start=3))
    with pytest.warns(DeltapatchWarning):
        assert append([replace(ONE, job="j10")], path) == 1
    assert path.read_bytes().startswith(whole + damaged + b"own,net,cars,0.5,,,,,,j9,\n")
    with pytest.warns(DeltapatchWarning):
        assert len(read_records(path)) == 3


def test_a_short_table_of_the_user_s_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes("\ufefftarget, model,accuracy,remark\r\nbirds,net,81.5,good\r\n".encode())
    assert read_records(path) == (Record("own", "net", "birds", 81.5),)
    path.write_text("model,target,accuracy,pool\nnet,birds,1,\nnet,cars,2,lab\n")
    assert [record.pool for record in read_records(path)] == ["own", "lab"]


def test_a_table_with_other_columns_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("model,target,accuracy\nnet,birds,1\n")
    with pytest.raises(SelectionError, match="cannot be added to: its first line is not pool,model,"):
        append([ONE], path)
    path.write_text("model;target;accuracy\n")
    with pytest.raises(SelectionError, match="does not name the columns model, target, accuracy"):
        append([ONE], path)
    assert path.read_text() == "model;target;accuracy\n"


@pytest.mark.parametrize("content", [b"", b"\n", b'"model\n', b"\xff\n", b"PK\x03\x04"])
def test_a_file_that_is_no_history_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(SelectionError, match="is no history of results"):
        read_records(path)


def test_a_write_that_fails_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append([ONE], path)
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeltapatchError, match="cannot be written: No space left on device"):
        append([replace(ONE, job="j2")], path)
    assert path.read_bytes() == before
    assert sorted(entry.suffix for entry in path.parent.iterdir() if entry != path) in ([], [".lock"])


def test_what_a_kill_in_the_middle_of_writing_leaves_is_no_result_and_is_swept(path: Path) -> None:
    append([ONE], path)
    unfinished = path.with_name(f".{path.name}.{'0' * 16}.deltapatch-tmp")
    unfinished.write_bytes(path.read_bytes() + b"own,ne")
    os.utime(unfinished, (0, 0))
    assert append([replace(ONE, job="j2")], path) == 1
    assert [record.job for record in read_records(path)] == ["j1", "j2"]
    assert not unfinished.exists()


def test_adding_from_several_places_at_the_same_time_loses_no_line(path: Path) -> None:
    jobs = [f"{place} {number}" for place in ("one", "two", "three", "four") for number in range(10)]
    with ThreadPoolExecutor(4) as places:
        added = list(places.map(lambda job: append([replace(ONE, job=job)], path), jobs))
    assert added == [1] * len(jobs)
    assert sorted(record.job for record in read_records(path)) == sorted(jobs)


def test_a_link_to_the_file_stays_one(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.csv"
    path.parent.mkdir()
    link.symlink_to(path)
    append([ONE], link)
    assert link.is_symlink()
    assert read_records(path) == (ONE,)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SelectionError, match=r"history\.csv cannot be written: "):
        append([ONE], tmp_path / "file" / "history.csv")
    with pytest.raises(SelectionError, match=r"absent\.csv cannot be read: No such file"):
        read_records(tmp_path / "absent.csv")


def test_the_file_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAPATCH_HISTORY", str(tmp_path / "own.csv"))
    assert own_history_path() == tmp_path / "own.csv"
    assert History.read().records == ()
    append([ONE])
    assert History.read().records == (ONE,)
    monkeypatch.delenv("DELTAPATCH_HISTORY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert own_history_path() == tmp_path / "data" / "deltapatch" / "history.csv"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert own_history_path() == tmp_path / "home" / ".local" / "share" / "deltapatch" / "history.csv"
