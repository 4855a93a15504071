"""Damage, kills and full disks cost a trunk cache the rows that they hit, and no others."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import IMAGES, VIEWS, Open, assert_rows, fill, open_cache

from deltapatch.errors import DeltapatchError

ALL = np.arange(IMAGES)


# --- damage -----------------------------------------------------------------------------------------------


def _edit_identity(path: Path) -> None:
    content = json.loads(path.read_text())
    content["identity"]["augment"] = "none"
    path.write_text(json.dumps(content))


def _edit_layout(path: Path) -> None:
    content = json.loads(path.read_text())
    content["layout"]["shapes"][0] = [4, 4, 3]
    path.write_text(json.dumps(content))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param("rows.bin", _cut, id="rows truncated"),
        pytest.param("rows.bin", Path.unlink, id="rows gone"),
        pytest.param("marks.bin", _cut, id="marks truncated"),
        pytest.param("marks.bin", Path.unlink, id="marks gone"),
        pytest.param("manifest.json", _edit_identity, id="identity edited"),
        pytest.param("manifest.json", _edit_layout, id="layout edited"),
        pytest.param("manifest.json", _cut, id="manifest whole"),
        pytest.param("manifest.json", lambda path: os.truncate(path, 20), id="manifest truncated"),
        pytest.param("manifest.json", lambda path: path.write_bytes(b"\xff\0"), id="manifest no text"),
        pytest.param("manifest.json", lambda path: path.write_text("[" * 100_000), id="manifest nested"),
        pytest.param("manifest.json", lambda path: path.write_text("[]"), id="manifest a list"),
        pytest.param("manifest.json", lambda path: path.write_text('{"format": 2}'), id="other format"),
        pytest.param("manifest.json", Path.unlink, id="manifest gone"),
    ],
)
def test_a_damaged_cache_is_begun_anew_and_leaves_nothing(
    reopen: Open, tmp_path: Path, name: str, damage: Callable[[Path], None], request: pytest.FixtureRequest
) -> None:
    cache = reopen()
    fill(cache, ALL)
    cache.close()
    damage(cache.path / name)
    again = reopen()
    # The last byte of the manifest is the end of its line: without it nothing is lost.
    kept = IMAGES if "manifest whole" in request.node.name else 0
    assert IMAGES - len(again.missing(ALL, 0)) == kept
    fill(again, ALL)
    assert_rows(reopen(), ALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", cache.path.name]


def test_a_file_of_somebody_else_in_a_damaged_cache_is_not_deleted(reopen: Open) -> None:
    cache = reopen()
    (cache.path / "notes.txt").write_text("mine")
    _cut(cache.path / "rows.bin")
    with pytest.raises(DeltapatchError, match=r"notes\.txt lies in the folder of a damaged trunk cache"):
        reopen()
    assert (cache.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("position", [0, 100, -1])
def test_one_flipped_bit_is_found_in_exactly_its_row(reopen: Open, position: int) -> None:
    cache = reopen()
    fill(cache, ALL)
    fill(cache, ALL[:6], view=1)
    stride = cache.layout.stride
    with (cache.path / "rows.bin").open("r+b") as file:
        place = (5 * VIEWS + 1) * stride + position % stride
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))
    assert cache.verify(ALL, np.zeros(IMAGES, int)) == 0
    assert cache.verify(np.repeat(ALL, 2), np.tile([0, 1], IMAGES)) == 1
    assert cache.missing(ALL[:6], 1).tolist() == [5]
    assert cache.missing(ALL, 0).tolist() == []
    fill(cache, [5], view=1)
    assert cache.verify(np.repeat(ALL, 2), np.tile([0, 1], IMAGES)) == 0


def test_every_row_is_verified_whatever_fits_into_memory_at_once(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = reopen()
    fill(cache, ALL)
    content = bytearray((cache.path / "rows.bin").read_bytes())
    for row in (0, 4, 11):
        content[row * VIEWS * cache.layout.stride] ^= 1
    (cache.path / "rows.bin").write_bytes(content)
    monkeypatch.setattr("deltapatch.fitting.cache._VERIFIED_AT_ONCE", 3 * cache.layout.stride)
    assert cache.verify(ALL, np.zeros(IMAGES, int)) == 3
    assert cache.missing(ALL, 0).tolist() == [0, 4, 11]


# --- kills and full disks ---------------------------------------------------------------------------------

# Fills rows 0 to 3, then is killed in the middle of filling 4 to 7: before, within or after their data.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from caches import fill, open_cache
from deltapatch.fitting.cache import TrunkCache

cache = open_cache(Path(sys.argv[2]))
fill(cache, [0, 1, 2, 3])
write, kill = os.pwrite, lambda: os.kill(os.getpid(), signal.SIGKILL)

def half(descriptor, content, position):
    write(descriptor, content[: len(content) // 2], position)
    kill()

if sys.argv[3] == "within data":
    os.pwrite = half
if sys.argv[3] == "between data and marks":
    TrunkCache._mark = lambda *arguments: kill()
with cache.filling():
    fill(cache, [4, 5, 6, 7])
    kill()
"""


@pytest.mark.parametrize(
    ("moment", "filled"), [("within data", 4), ("between data and marks", 4), ("after marks", 8)]
)
def test_a_kill_loses_what_was_not_marked_and_nothing_else(
    reopen: Open, tmp_path: Path, moment: str, filled: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), moment]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    cache = reopen()
    assert cache.missing(ALL, 0).tolist() == ALL[filled:].tolist()
    assert cache.verify(ALL, np.zeros(IMAGES, int)) == 0
    assert_rows(cache, ALL[:filled])
    with cache.filling():
        fill(cache, cache.missing(ALL, 0))
    assert_rows(cache, ALL)


def test_data_is_on_the_disk_before_its_mark_is_written(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = reopen()
    steps: list[str] = []
    names = {(cache.path / name).stat().st_ino: name for name in ("rows.bin", "marks.bin")}
    pwrite, fsync = os.pwrite, os.fsync

    def logged_pwrite(descriptor: int, content: Any, position: int) -> int:
        steps.append(f"write {names[os.fstat(descriptor).st_ino]}")
        return pwrite(descriptor, content, position)

    def logged_fsync(descriptor: int) -> None:
        steps.append(f"flush {names[os.fstat(descriptor).st_ino]}")
        fsync(descriptor)

    monkeypatch.setattr(os, "pwrite", logged_pwrite)
    monkeypatch.setattr(os, "fsync", logged_fsync)
    fill(cache, [3])
    assert steps == ["write rows.bin", "flush rows.bin", "write marks.bin"]


def test_a_row_that_is_being_written_over_is_missing_until_it_is_whole(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = reopen()
    fill(cache, ALL)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fill(cache, [2, 7])
    assert cache.missing(ALL, 0).tolist() == [2, 7]
    fill(cache, [2, 7])
    assert_rows(cache, ALL)


def test_a_system_that_writes_a_little_at_a_time_writes_all(
    reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, pwrite = reopen(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, position: pwrite(file, content[:100], position))
    fill(cache, ALL)
    assert_rows(cache, ALL)
    assert cache.verify(ALL, np.zeros(IMAGES, int)) == 0


@pytest.mark.parametrize("function", ["pwrite", "fsync"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_its_figures_and_keeps_what_is_filled(
    reopen: Open, monkeypatch: pytest.MonkeyPatch, function: str, fault: int
) -> None:
    cache = reopen()
    fill(cache, ALL[:5])
    usage = type("Usage", (), {"free": 12_345})

    def fail(*arguments: object) -> int:
        raise OSError(fault, os.strerror(fault))

    cache.mark_bad(ALL[:2], 1)
    needed = (IMAGES * VIEWS - 5 - 2) * cache.layout.stride
    with monkeypatch.context() as full:
        full.setattr(os, function, fail)
        full.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(DeltapatchError, match=f"12,345 bytes are free, and .* needs {needed:,};"):
            fill(cache, ALL[5:])
    assert cache.missing(ALL, 0).tolist() == ALL[5:].tolist()
    assert_rows(cache, ALL[:5])
    fill(cache, ALL[5:])
    assert_rows(cache, ALL)


def test_a_failing_disk_is_told_with_its_reason(reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cache = reopen()
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DeltapatchError, match=f"{cache.path}: .* cannot be written: Input/output error"):
        cache.mark_bad(ALL, 0)


def test_a_root_that_cannot_be_made_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeltapatchError, match=r"file.*cannot be opened: .*; set DELTAPATCH_CACHE"):
        open_cache(tmp_path / "file")
