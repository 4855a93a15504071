"""Caches that are no longer needed go, whole and alone: none in use, and nothing that is not ours."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caches import IMAGES, VIEWS, assert_rows, fill, identity, open_cache

from deltapatch.errors import DeltapatchError
from deltapatch.fitting.cache import CacheEntry, TrunkCache, clear_caches, list_caches, sweep
from deltapatch.fitting.cache_sweeping import select_caches

ALL = np.arange(IMAGES)
DAY = 86400.0


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[list[TrunkCache]]:
    """Three filled caches, the first unused for 10 days, the second for 20, the third for 40."""
    made = [open_cache(tmp_path, divergence=f"layer{number}") for number in (1, 2, 3)]
    for cache, days in zip(made, (10, 20, 40), strict=True):
        fill(cache, ALL)
        _age(cache.path, days)
    yield made
    for cache in made:
        cache.close()


def _age(folder: Path, days: float) -> None:
    os.utime(folder / "manifest.json", (time.time() - days * DAY,) * 2)


def _numbers(entries: list[CacheEntry]) -> list[str]:
    return [entry.divergence.removeprefix("layer") for entry in entries]


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_everything_that_is_known_of_a_cache_is_listed(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    cache = open_cache(tmp_path, stored_as="bf16")
    fill(cache, [0, 1, 2], view=1)
    cache.mark_bad(np.array([3]), 0)
    (entry,) = list_caches(tmp_path)
    expected = CacheEntry(
        digest=identity(stored_as="bf16").digest,
        base=identity().base,
        divergence="layer4",
        stored_as="bf16",
        views=VIEWS,
        filled=3,
        rows=IMAGES * VIEWS,
        bytes=cache.bytes_on_disk,
        created=entry.created,
        last_used=entry.last_used,
    )
    assert entry == expected
    assert abs((entry.created - before).total_seconds()) < 60
    assert abs((entry.last_used - before).total_seconds()) < 60
    cache.close()


def test_the_most_recently_used_comes_first_and_opening_is_a_use(
    caches: list[TrunkCache], tmp_path: Path
) -> None:
    assert _numbers(list_caches(tmp_path)) == ["1", "2", "3"]
    open_cache(tmp_path, divergence="layer3").close()
    assert _numbers(list_caches(tmp_path)) == ["3", "1", "2"]


def test_where_there_is_no_root_there_are_no_caches_and_none_is_made(tmp_path: Path) -> None:
    root = tmp_path / "none"
    assert (list_caches(root), clear_caches(root), sweep(root)) == ([], [], [])
    assert not root.exists()


@pytest.mark.parametrize(
    ("choice", "gone"),
    [
        ({}, "123"),
        ({"older_than_days": 15}, "23"),
        ({"older_than_days": 50}, ""),
        ({"older_than_days": 1e300}, ""),
    ],
)
def test_clearing_deletes_what_was_chosen(
    caches: list[TrunkCache], tmp_path: Path, choice: dict[str, Any], gone: str
) -> None:
    assert _numbers(select_caches(tmp_path, **choice)) == list(gone)
    assert _numbers(clear_caches(tmp_path, **choice)) == list(gone)
    assert _names(tmp_path) == {c.path.name for c, n in zip(caches, "123", strict=True) if n not in gone}


def test_a_cache_is_chosen_by_the_beginning_of_its_digest(caches: list[TrunkCache], tmp_path: Path) -> None:
    digest = caches[1].path.name
    assert clear_caches(tmp_path, digest_prefix=digest[1:20]) == []
    assert clear_caches(tmp_path, older_than_days=30, digest_prefix=digest[:20]) == []
    assert _numbers(clear_caches(tmp_path, digest_prefix=digest[:20])) == ["2"]


def test_a_sweep_deletes_what_is_old(caches: list[TrunkCache], tmp_path: Path) -> None:
    assert _numbers(sweep(tmp_path)) == ["3"]
    assert _numbers(sweep(tmp_path, keep_days=15)) == ["2"]
    assert _numbers(list_caches(tmp_path)) == ["1"]


@pytest.mark.parametrize(("room", "gone"), [(3, ""), (2, "3"), (1, "32"), (0, "321")])
def test_a_sweep_deletes_the_least_recently_used_until_the_rest_fits(
    caches: list[TrunkCache], tmp_path: Path, room: int, gone: str
) -> None:
    room_bytes = sum(cache.bytes_on_disk for cache in caches[:room])
    assert _numbers(sweep(tmp_path, keep_days=100, keep_bytes=room_bytes)) == list(gone)


def test_a_sweep_spares_the_cache_in_use_whatever_its_age_and_size(
    caches: list[TrunkCache], tmp_path: Path
) -> None:
    alias = tmp_path / ".." / tmp_path.name / caches[2].path.name
    assert _numbers(sweep(tmp_path, keep_days=0, keep_bytes=0, keep=alias)) == ["2", "1"]
    assert_rows(open_cache(tmp_path, divergence="layer3"), ALL)


def test_neither_sweeping_nor_clearing_touches_a_cache_that_is_being_filled(
    caches: list[TrunkCache], tmp_path: Path
) -> None:
    with caches[2].filling():
        assert _numbers(sweep(tmp_path, keep_days=0, keep_bytes=0)) == ["2", "1"]
        assert clear_caches(tmp_path) == []
        fill(caches[2], ALL, view=1)
    assert _numbers(clear_caches(tmp_path)) == ["3"]


def test_whoever_reads_a_cache_that_is_deleted_reads_on(caches: list[TrunkCache], tmp_path: Path) -> None:
    clear_caches(tmp_path)
    assert_rows(caches[0], ALL)
    again = open_cache(tmp_path, divergence="layer1")
    assert again.missing(ALL, 0).tolist() == ALL.tolist()
    again.close()


@pytest.mark.parametrize("action", [clear_caches, lambda root: sweep(root, keep_days=0, keep_bytes=0)])
def test_nothing_that_is_not_ours_is_deleted(caches: list[TrunkCache], tmp_path: Path, action: Any) -> None:
    strange = "0" * 64
    (caches[0].path / "notes.txt").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "readme.txt").write_text("mine")
    (tmp_path / strange).write_text("a file with a digest's name")
    (tmp_path / f".{strange}.0123456789abcdef.removed").mkdir()
    (tmp_path / f".{strange}.0123456789abcdef.removed" / "notes.txt").write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "rows.bin").write_text("mine")
    (tmp_path / ("1" * 64)).symlink_to(outside)
    (tmp_path / ("2" * 64) / "rows.bin").mkdir(parents=True)
    before = _names(tmp_path)
    assert sorted(_numbers(action(tmp_path))) == ["2", "3"]
    assert _names(tmp_path) == before - {caches[1].path.name, caches[2].path.name}
    assert (outside / "rows.bin").exists()
    assert_rows(open_cache(tmp_path, divergence="layer1"), ALL)


@pytest.mark.parametrize("action", [clear_caches, sweep])
@pytest.mark.parametrize("what", ["new", "removed"])
def test_what_a_kill_in_the_middle_of_deleting_or_making_left_is_deleted_too(
    caches: list[TrunkCache], tmp_path: Path, action: Any, what: str
) -> None:
    left = tmp_path / f".{caches[0].path.name}.0123456789abcdef.{what}"
    caches[0].path.rename(left)
    (left / "manifest.json").unlink()
    assert _numbers(list_caches(tmp_path)) == ["2", "3"]
    action(tmp_path)
    assert not left.exists()


def test_a_cache_that_can_no_longer_be_read_is_deleted_unless_it_is_being_filled(
    caches: list[TrunkCache], tmp_path: Path
) -> None:
    for cache in caches[:2]:
        (cache.path / "manifest.json").write_text("{")
    with caches[0].filling():
        assert sweep(tmp_path, keep_days=100) == []
        assert _names(tmp_path) == {caches[0].path.name, caches[2].path.name}
    sweep(tmp_path, keep_days=100)
    assert _names(tmp_path) == {caches[2].path.name}


def test_a_copy_under_another_name_is_no_cache(caches: list[TrunkCache], tmp_path: Path) -> None:
    copy = tmp_path / identity(divergence="layer4").digest
    shutil.copytree(caches[0].path, copy)
    assert _numbers(list_caches(tmp_path)) == ["1", "2", "3"]
    open_cache(tmp_path, divergence="layer4").close()
    assert sorted(_numbers(list_caches(tmp_path))) == ["1", "2", "3", "4"]
    assert [entry.filled for entry in list_caches(tmp_path)] == [0, IMAGES, IMAGES, IMAGES]


def test_a_deletion_that_is_cut_short_leaves_no_cache_behind(
    caches: list[TrunkCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut_short:
        cut_short.setattr(Path, "unlink", interrupt)
        with pytest.raises(KeyboardInterrupt):
            clear_caches(tmp_path, digest_prefix=caches[0].path.name)
    assert _numbers(list_caches(tmp_path)) == ["2", "3"]
    again = open_cache(tmp_path, divergence="layer1")
    assert again.missing(ALL, 0).tolist() == ALL.tolist()
    sweep(tmp_path, keep_days=100)
    assert _names(tmp_path) == {cache.path.name for cache in caches}
    again.close()


def test_what_the_system_does_not_let_go_ends_clearing_but_no_sweep(
    caches: list[TrunkCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == caches[2].path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert _numbers(sweep(tmp_path, keep_days=15)) == ["2"]
    with pytest.raises(DeltapatchError, match=f"{caches[2].path.name} cannot be deleted: Permission denied"):
        clear_caches(tmp_path)


def test_an_entry_is_older_than_the_days_since_its_last_use(caches: list[TrunkCache], tmp_path: Path) -> None:
    entry = replace(list_caches(tmp_path)[0], last_used=datetime.now(UTC))
    assert not entry.is_older(1)
    assert [e.is_older(15) for e in list_caches(tmp_path)] == [False, True, True]
