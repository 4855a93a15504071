"""A trunk cache gives back what was put into it, or says that it is missing."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import IDENTITY, IMAGES, VIEWS, Open, assert_rows, fill, identity, layout_of, rows_of

from deltapatch.errors import DeltapatchError
from deltapatch.fitting.cache import CacheIdentity, TrunkCache, cache_root, clear_caches

ALL = np.arange(IMAGES)


# --- what is kept -----------------------------------------------------------------------------------------


def test_rows_come_back_bit_by_bit_in_any_order_also_in_another_process(reopen: Open) -> None:
    cache = reopen()
    fill(cache, [7, 0, 1, 2, 11])
    fill(cache, [3, 7], view=1)
    for opened in (cache, reopen()):
        assert_rows(opened, [2, 7, 0, 7, 11])
        assert_rows(opened, [7, 3], view=1)


def test_images_and_views_are_paired(reopen: Open) -> None:
    cache = reopen()
    for view in range(VIEWS):
        fill(cache, ALL, view)
    _, features = cache.read(np.array([4, 4, 0]), np.array([1, 0, 1]))
    assert torch.equal(
        features, torch.cat([rows_of([row], view)[1] for row, view in ((4, 1), (4, 0), (0, 1))])
    )


@pytest.mark.parametrize("stored_as", ["bf16", "int8"])
def test_shorter_types_come_back_as_their_layout_decodes_them(reopen: Open, stored_as: str) -> None:
    cache, layout = reopen(stored_as=stored_as), layout_of(stored_as)
    fill(cache, ALL)
    activations, features = cache.read(ALL, np.zeros(IMAGES, int))
    expected, _ = layout.decode(layout.encode(*rows_of(ALL, 0)))
    assert all(map(torch.equal, activations, expected))
    assert torch.equal(features, rows_of(ALL, 0)[1])
    if stored_as == "bf16":
        assert torch.equal(activations[0], rows_of(ALL, 0)[0][0].bfloat16())


def test_what_is_missing_is_named_view_by_view_and_in_the_order_asked(reopen: Open) -> None:
    cache = reopen()
    assert cache.missing(ALL, 0).tolist() == ALL.tolist()
    fill(cache, [1, 5])
    assert cache.missing(np.array([6, 5, 2, 1]), 0).tolist() == [6, 2]
    assert cache.missing(ALL, 1).tolist() == ALL.tolist()


def test_reading_what_is_missing_is_an_error_that_names_it(reopen: Open) -> None:
    cache = reopen()
    fill(cache, [1])
    with pytest.raises(DeltapatchError, match="has no row for image 1 in view 1"):
        cache.read(np.array([1, 1]), np.array([0, 1]))


def test_a_bad_image_is_bad_in_all_views_and_has_no_row_until_one_is_written(reopen: Open) -> None:
    cache = reopen()
    fill(cache, [3])
    cache.mark_bad(np.array([3, 8]), 1)
    assert np.flatnonzero(reopen().bad(ALL)).tolist() == [3, 8]
    assert cache.bad(np.array([8, 2])).tolist() == [True, False]
    assert cache.missing(np.array([3, 8]), 1).tolist() == [3, 8]
    assert_rows(cache, [3])
    fill(cache, [8], view=1)
    assert np.flatnonzero(cache.bad(ALL)).tolist() == [3]


def test_rows_that_are_missing_take_no_room_on_the_disk(reopen: Open) -> None:
    cache = reopen(count=10_000)
    sizes = {path.name: path.stat().st_size for path in cache.path.iterdir()}
    assert sizes["marks.bin"] == 10_000 * VIEWS * 8
    before = cache.bytes_on_disk
    assert sizes["marks.bin"] < before < sizes["marks.bin"] + 20_000 < sizes["rows.bin"]
    fill(cache, ALL)
    # Each of the rows lies in at most two pages of the file.
    assert before < cache.bytes_on_disk <= before + IMAGES * 2 * 4096


@pytest.mark.parametrize(("image_row", "view"), [(IMAGES, 0), (-1, 0), (0, VIEWS), (0, -1)])
def test_a_row_that_the_cache_does_not_have_is_refused(reopen: Open, image_row: int, view: int) -> None:
    cache = reopen()
    for action in (
        lambda: cache.missing(np.array([0, image_row]), view),
        lambda: cache.write(np.array([image_row]), view, *rows_of([0], 0)),
        lambda: cache.read(np.array([image_row]), np.array([view])),
    ):
        with pytest.raises(
            DeltapatchError, match=r"(image row|view) -?\d+ is not possible; this cache has 0 to"
        ):
            action()


def test_rows_and_images_have_to_be_as_many(reopen: Open) -> None:
    with pytest.raises(DeltapatchError, match="2 image rows and 1 rows of features"):
        reopen().write(np.array([1, 2]), 0, *rows_of([1], 0))


def test_what_was_read_outlives_the_cache(reopen: Open) -> None:
    cache = reopen()
    fill(cache, ALL)
    (activation, _), _ = cache.read(ALL, np.zeros(IMAGES, int))
    cache.close()
    assert torch.equal(activation, rows_of(ALL, 0)[0][0])


# --- which cache it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [field.name for field in fields(CacheIdentity)])
def test_another_value_in_any_field_is_another_cache(reopen: Open, name: str) -> None:
    first = reopen()
    fill(first, ALL)
    old = IDENTITY[name]
    second = reopen(**{name: "bf16" if name == "stored_as" else old + type(old)(1)})
    assert second.path != first.path
    assert len(second.missing(ALL, 0)) == IMAGES
    assert len(reopen().missing(ALL, 0)) == 0


@pytest.mark.parametrize("changes", [{"views": 0}, {"count": 0}, {"stored_as": "fp8"}])
def test_an_identity_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DeltapatchError, match=r"not possible|choose one of bf16, fp32, int8"):
        identity(**changes)


def test_identity_and_layout_have_to_agree_on_the_type(tmp_path: Path) -> None:
    with pytest.raises(DeltapatchError, match="the layout stores int8, but the cache's identity says fp32"):
        TrunkCache.open(tmp_path, identity(), layout_of("int8"))


def test_the_caches_are_kept_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DELTAPATCH_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("DELTAPATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "deltapatch" / "trunk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "deltapatch" / "trunk"


# --- several at once --------------------------------------------------------------------------------------


def test_eight_readers_see_whole_rows_while_the_rest_is_filled(reopen: Open) -> None:
    fill(reopen(), ALL[:6])
    start = threading.Barrier(9)

    def read(seed: int) -> int:
        cache, order = reopen(), np.random.default_rng(seed)
        start.wait()
        for _ in range(40):
            assert_rows(cache, order.permutation(6))
            there = np.setdiff1d(ALL, cache.missing(ALL, 0))
            assert_rows(cache, order.permutation(there))
        return seed

    with ThreadPoolExecutor(8) as readers:
        results = readers.map(read, range(8))
        writer = reopen()
        start.wait()
        for row in range(6, IMAGES):
            fill(writer, [row])
        assert list(results) == list(range(8))
    assert_rows(reopen(), ALL)


def test_the_second_fit_waits_until_the_first_has_filled_the_cache(reopen: Open) -> None:
    waiting, order = threading.Event(), list[str]()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert "another fit is filling this trunk cache" in record.getMessage()
            waiting.set()

    def second_fit() -> None:
        cache = reopen()
        with cache.filling():
            order.append(f"second finds {len(cache.missing(ALL, 0))} missing")

    logger, listener = logging.getLogger("deltapatch.fitting.cache"), Listener()
    logger.addHandler(listener)
    first, thread = reopen(), threading.Thread(target=second_fit)
    try:
        with first.filling():
            thread.start()
            assert waiting.wait(30)
            fill(first, ALL)
            order.append("first is done")
    finally:
        thread.join(30)
        logger.removeHandler(listener)
    assert order == ["first is done", "second finds 0 missing"]


def test_a_fit_that_fails_lets_go_of_the_lock(reopen: Open) -> None:
    cache = reopen()
    with pytest.raises(KeyboardInterrupt), cache.filling():
        raise KeyboardInterrupt
    with reopen().filling():
        fill(cache, ALL)


@pytest.mark.parametrize("begun_anew", [False, True])
def test_filling_a_cache_that_was_deleted_is_an_error_that_says_what_to_do(
    reopen: Open, tmp_path: Path, begun_anew: bool
) -> None:
    cache = reopen()
    assert [entry.digest for entry in clear_caches(tmp_path)] == [cache.path.name]
    if begun_anew:
        reopen()
    message = "the trunk cache was deleted after it was opened; fit again"
    with pytest.raises(DeltapatchError, match=message), cache.filling():
        fill(cache, ALL)
    assert reopen().missing(ALL, 0).tolist() == ALL.tolist()
