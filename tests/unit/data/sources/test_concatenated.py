"""Several stores as one: every row is a row of one of them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from digits import digits, write_tree

from deltapatch.data.decode import decode_image
from deltapatch.data.sources.concatenated import ConcatenatedStore
from deltapatch.data.sources.folder import FileStore
from deltapatch.data.sources.npz import ArrayStore


@pytest.fixture
def stores(tmp_path: Path) -> tuple[FileStore, ArrayStore, ArrayStore]:
    """Three files, no row, two rows."""
    files = sorted((write_tree(tmp_path, (0,), 3) / "zero").iterdir())
    images = digits()["test_images"]
    return FileStore(files), ArrayStore(images[:0], "none"), ArrayStore(images[:2], "array")


def test_rows_follow_each_other_whatever_kind_of_store_they_are_in(stores) -> None:
    files, _, array = stores
    store = ConcatenatedStore(stores)
    assert len(store) == 5
    assert [store.name(row) for row in range(5)] == [*map(files.name, range(3)), "array[0]", "array[1]"]
    assert [store.read(row) for row in range(3)] == [files.read(row) for row in range(3)]
    assert np.array_equal(store.read(4), array.read(1))
    assert decode_image(store.read(0), name="first").mode == "RGB"


def test_an_empty_store_at_either_end_has_no_row(stores) -> None:
    _, empty, array = stores
    store = ConcatenatedStore((empty, array, empty))
    assert [store.name(row) for row in range(len(store))] == ["array[0]", "array[1]"]
    assert len(ConcatenatedStore(())) == 0


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_that_is_not_there_is_an_error(stores, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of a store of 5 images"):
        ConcatenatedStore(stores).read(row)


def test_the_version_changes_with_any_image_and_with_the_order(stores) -> None:
    files, _, array = stores
    first = ConcatenatedStore((files, array)).version()
    assert len(first) == 64
    assert ConcatenatedStore((files, array)).version() == first
    assert ConcatenatedStore((array, files)).version() != first
    changed = ArrayStore(array.images.copy(), "array")
    changed.images[1, 0, 0] ^= 1
    assert ConcatenatedStore((files, changed)).version() != first
    files.paths[2].write_bytes(b"other")
    assert ConcatenatedStore((files, array)).version() != first


def test_the_store_reaches_worker_processes(stores) -> None:
    store = ConcatenatedStore(stores)
    copied = pickle.loads(pickle.dumps(store))
    assert [copied.name(row) for row in range(5)] == [store.name(row) for row in range(5)]
