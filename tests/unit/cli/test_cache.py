"""``deltapatch cache``: what fits have kept on disk is listed, and deleted on demand."""

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltapatch.fitting.cache import CacheIdentity, RowLayout, TrunkCache, list_caches


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command finds; two caches lie in it, the second unused for 40 days."""
    monkeypatch.setenv("DELTAPATCH_CACHE", str(tmp_path / "trunk"))
    _make(tmp_path / "trunk", "layer4")
    old = _make(tmp_path / "trunk", "")
    os.utime(old / "manifest.json", (time.time() - 40 * 86400,) * 2)
    return tmp_path / "trunk"


def _make(root: Path, divergence: str) -> Path:
    shapes = (((2000,),), (torch.float32,)) if divergence else ((), ())
    identity = CacheIdentity(
        "sha256:" + "ab" * 32, divergence, "{}", "none", 1, "cd" * 32, 10, "float32", "fp32", "2.6.0"
    )
    cache = TrunkCache.open(root, identity, RowLayout(*shapes, 5, "fp32"))
    activations = [torch.ones(3, 2000)] if divergence else []
    cache.write(np.arange(3), 0, activations, torch.ones(3, 5))
    cache.close()
    return cache.path


def _rows(out: str) -> list[list[str]]:
    lines = [re.findall(r"[^│\s]+(?: [^│\s]+)*", line) for line in out.splitlines() if line.startswith("│")]
    return [line for line in lines if line]


def test_caches_are_listed_with_a_total_the_last_used_first(run: Any, root: Path) -> None:
    ran = run("cache", "list")
    assert (ran.code, ran.err) == (0, "")
    kept, old = list_caches(root)
    used = [f"{entry.last_used.astimezone():%Y-%m-%d %H:%M}" for entry in (kept, old)]
    sizes = [f"{entry.bytes / 1000:.1f} kB" for entry in (kept, old)]
    out = ran.out.replace("\u00a0", " ")
    assert _rows(out) == [
        [kept.digest[:12], "abababababab", "layer4", "fp32", "1", "3 of 10", sizes[0], used[0]],
        [old.digest[:12], "abababababab", "none, features only", "fp32", "1", "3 of 10", sizes[1], used[1]],
    ]
    assert out.splitlines()[-1] == f"2 trunk caches, {(kept.bytes + old.bytes) / 1000:.1f} kB in {root}"


def test_where_there_is_none_the_total_is_zero(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAPATCH_CACHE", str(tmp_path / "none"))
    assert run("cache", "list").words() == f"0 trunk caches, 0 bytes in {tmp_path / 'none'}"
    assert run("cache", "clear").words() == f"deleted 0 trunk caches, 0 bytes from {tmp_path / 'none'}"
    assert not (tmp_path / "none").exists()


def test_clearing_deletes_all_and_says_what_that_was(run: Any, root: Path) -> None:
    size = sum(entry.bytes for entry in list_caches(root))
    ran = run("cache", "clear")
    assert ran.words() == f"deleted 2 trunk caches, {size / 1000:.1f} kB from {root}"
    assert list_caches(root) == []


def test_old_caches_are_listed_and_cleared_alone(run: Any, root: Path) -> None:
    kept, old = list_caches(root)
    assert [row[0] for row in _rows(run("cache", "list", "--older-than", 30).out)] == [old.digest[:12]]
    assert run("cache", "clear", "--older-than", 30).words().startswith("deleted 1 trunk cache, ")
    assert [entry.digest for entry in list_caches(root)] == [kept.digest]


def test_a_cache_is_cleared_by_what_the_list_shows_of_its_digest(run: Any, root: Path) -> None:
    kept, old = list_caches(root)
    assert run("cache", "clear", kept.digest[:12]).code == 0
    assert [entry.digest for entry in list_caches(root)] == [old.digest]


def test_a_cache_that_stays_is_named(run: Any, root: Path) -> None:
    kept, _ = list_caches(root)
    (root / kept.digest / "notes.txt").write_text("mine")
    ran = run("cache", "clear")
    assert ran.words().startswith("deleted 1 trunk cache, ")
    assert f"{kept.digest[:12]} stays: a fit is filling it, or a file that is not ours lies in it" in ran.out


@pytest.mark.parametrize("action", ["list", "clear"])
def test_a_digest_that_no_cache_has_is_one_line(run: Any, root: Path, action: str) -> None:
    error = run("cache", action, "xyz").error
    assert (
        error
        == f"no trunk cache in {root} has a digest that begins with 'xyz'; deltapatch cache list shows them"
    )
    assert len(list_caches(root)) == 2


def test_a_mistyped_action_or_age_is_one_line(run: Any, root: Path) -> None:
    assert "Invalid value for 'action'" in run("cache", "empty").error.replace("ACTION", "action")
    assert "Invalid value for '--older-than'" in run("cache", "clear", "--older-than", "-1").error
    assert len(list_caches(root)) == 2
