import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from patch_files import INFO, OTHER, TENSORS, assert_same, metadata, pack, stored
from torch import Tensor

import deltapatch.file
from deltapatch.errors import PatchFileError
from deltapatch.file import (
    TensorEntry,
    check_patch_name,
    file_digest,
    read_patch_file,
    read_patch_header,
    write_patch_file,
)


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "coats.safetensors"
    write_patch_file(path, TENSORS, INFO)
    return path


# What is written is read


def test_a_patch_survives_being_written_and_read_bit_by_bit(patch: Path):
    info, tensors = read_patch_file(patch)

    assert info == INFO
    assert_same(dict(sorted(tensors.items())), dict(sorted(TENSORS.items())))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 2, 3)], ids=str)
def test_every_dtype_and_shape_is_kept(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    tensors = {
        "a": torch.arange(math.prod(shape)).reshape(shape).to(dtype),
        "b": torch.tensor([1, 0]).to(dtype),
    }
    write_patch_file(tmp_path / "p", tensors, INFO)

    assert_same(read_patch_file(tmp_path / "p")[1], tensors)


def test_tensors_of_mixed_dtypes_start_at_multiples_of_their_item_size(tmp_path: Path):
    dtypes = (torch.uint8, torch.float64, torch.bfloat16, torch.float32, torch.bool)
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in dtypes}
    write_patch_file(tmp_path / "p", tensors, INFO)
    header = read_patch_header(tmp_path / "p")

    start = header.file_bytes - sum(entry.bytes for entry in header.tensors.values())
    for entry in header.tensors.values():
        assert start % entry.dtype.itemsize == 0
        start += entry.bytes


def test_a_patch_without_tensors_is_possible(tmp_path: Path):
    write_patch_file(tmp_path / "p", {}, INFO)

    assert read_patch_file(tmp_path / "p") == (INFO, {})


def test_the_safetensors_library_reads_the_file_too(patch: Path):
    with safetensors.safe_open(patch, framework="pt") as file:
        assert file.metadata() == metadata()
    ours = read_patch_file(patch)[1]

    assert_same(
        safetensors.torch.load_file(patch), {name: ours[name] for name in safetensors.torch.load_file(patch)}
    )


def test_a_file_of_the_safetensors_library_is_read_too(tmp_path: Path):
    path = tmp_path / "p"
    safetensors.torch.save_file(TENSORS, path, metadata())
    info, tensors = read_patch_file(path)

    assert info == INFO
    assert_same({name: tensors[name] for name in TENSORS}, TENSORS)


def test_equal_patches_are_equal_files_whatever_the_order_of_their_tensors(tmp_path: Path, patch: Path):
    write_patch_file(tmp_path / "reversed", dict(reversed(TENSORS.items())), INFO)

    assert (tmp_path / "reversed").read_bytes() == patch.read_bytes()


def test_a_digest_is_the_sha256_of_the_file(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")

    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "abc") == expected


def test_views_of_one_tensor_are_stored_in_full_and_come_back_apart(tmp_path: Path):
    grid = torch.arange(6.0).reshape(2, 3)
    tensors = {"grid": grid, "transposed": grid.T, "row": grid[1], "trained": grid.clone().requires_grad_()}
    write_patch_file(tmp_path / "p", tensors, INFO)
    loaded = read_patch_file(tmp_path / "p")[1]
    loaded["grid"].zero_()

    assert loaded["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["row"].tolist() == [3, 4, 5]
    assert not loaded["trained"].requires_grad


def test_tensors_are_read_to_the_cpu_whatever_the_default_device(patch: Path):
    with torch.device("meta"):
        tensors = read_patch_file(patch)[1]

    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}


def test_a_header_is_read_without_any_tensor(tmp_path: Path):
    path, size = tmp_path / "sparse", 4 * 2**30
    path.write_bytes(pack({"a": stored("F32", [size // 4], 0, size)}))
    file_bytes = path.stat().st_size + size
    os.truncate(path, file_bytes)

    header = read_patch_header(path)

    assert header.info == INFO
    assert header.file_bytes == file_bytes
    assert header.tensors == {"a": TensorEntry(torch.float32, (size // 4,), size)}


# Names and paths


@pytest.mark.parametrize(
    "name", ["a", "0", "coats", "coats-2025.v1_b", "a" * 64, "console", "com10", "null.x"]
)
def test_a_good_patch_name_is_returned(name: str):
    assert check_patch_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../coats",
        "a/../b",
        "a/b",
        "a\\b",
        "/etc/coats",
        "C:\\coats",
        "c:coats",
        ".hidden",
        "-rf",
        "_a",
        "a\0",
        "a\0.safetensors",
        "a\n",
        "a b",
        "a%2fb",
        "Coats",
        "coat\u0455",
        "ｃoats",
        "a\u202eb",
        "\u0663",
        "a" * 65,
        "a" * 10_000,
        "coats.",
        "coats..",
        "con",
        "nul",
        "aux.safetensors",
        "prn",
        "com1",
        "lpt9.v1.safetensors",
    ],
    ids=lambda name: f"fault-15-{ascii(name)[:20]}",
)
def test_a_patch_name_that_could_be_misread_is_refused(name: str):
    with pytest.raises(PatchFileError, match="choose another name") as caught:
        check_patch_name(name)

    assert str(caught.value).isascii() or "…" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_fault_15_a_path_with_nul_is_refused():
    for action in (read_patch_file, file_digest, lambda path: write_patch_file(path, TENSORS, INFO)):
        with pytest.raises(PatchFileError, match=r"'a\\x00b' contains a NUL character"):
            action(Path("a\0b"))


def test_fault_16_a_patch_is_read_through_a_symbolic_link(patch: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(patch)

    assert read_patch_file(tmp_path / "link")[0] == INFO
    assert file_digest(tmp_path / "link") == file_digest(patch)


@pytest.mark.parametrize("target", ["coats.safetensors", "nowhere"])
def test_fault_16_a_symbolic_link_is_neither_followed_nor_replaced_on_writing(
    patch: Path, tmp_path: Path, target: str
):
    before = patch.read_bytes()
    (tmp_path / "link").symlink_to(target)

    with pytest.raises(PatchFileError, match="is a symbolic link"):
        write_patch_file(tmp_path / "link", OTHER, INFO)

    assert os.readlink(tmp_path / "link") == target
    assert patch.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()


def test_fault_16_the_name_of_a_tensor_is_never_a_path(tmp_path: Path):
    (tmp_path / "in").mkdir()
    write_patch_file(tmp_path / "in" / "p", {"../../evil": torch.ones(1)}, INFO)

    assert list(read_patch_file(tmp_path / "in" / "p")[1]) == ["../../evil"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "p"]


# A file that changes under the reader


def test_fault_17_loaded_tensors_do_not_change_with_the_file(patch: Path):
    tensors = read_patch_file(patch)[1]
    with open(patch, "r+b") as file:
        file.write(b"\xff" * patch.stat().st_size)
    os.truncate(patch, 0)

    assert_same({name: tensors[name] for name in TENSORS}, TENSORS)


def _overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def change_after_first_tensor(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    read_tensor = deltapatch.file._read_tensor
    pending = iter([change])

    def read_then_change(*arguments: Any) -> Tensor:
        tensor = read_tensor(*arguments)
        next(pending, lambda: None)()
        return tensor

    monkeypatch.setattr(deltapatch.file, "_read_tensor", read_then_change)


@pytest.fixture
def long_patch(tmp_path: Path) -> Path:
    """A patch that no buffer holds whole, written long ago as far as its modification time says."""
    path = tmp_path / "long"
    write_patch_file(path, {"a": torch.ones(2**18), "b": torch.ones(2**18)}, INFO)
    os.utime(path, (1e9, 1e9))
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_overwrite, "was changed while it was being read; read it again"),
        (_lengthen, "was changed while it was being read; read it again"),
        (_shorten, "became shorter while 'b' was being read; read it again"),
    ],
)
def test_fault_17_a_file_changed_in_place_while_it_is_read_is_refused(
    long_patch: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], reason: str
):
    change_after_first_tensor(monkeypatch, lambda: change(long_patch))

    with pytest.raises(PatchFileError, match=reason):
        read_patch_file(long_patch)


def test_fault_17_a_file_replaced_while_it_is_read_gives_the_whole_old_patch(
    long_patch: Path, monkeypatch: pytest.MonkeyPatch
):
    change_after_first_tensor(monkeypatch, lambda: write_patch_file(long_patch, OTHER, INFO))

    old = read_patch_file(long_patch)[1]

    assert_same(old, {"a": torch.ones(2**18), "b": torch.ones(2**18)})
    assert_same(read_patch_file(long_patch)[1], OTHER)
