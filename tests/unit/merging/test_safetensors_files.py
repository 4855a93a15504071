"""Safetensors files that are written part by part, and left whole by whatever stops the writing."""

import errno
import os
import resource
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from random_models import equal, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.merging.safetensors_files import read_layout, read_metadata, writing

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]
OF_EVERY_DTYPE = {
    str(dtype).removeprefix("torch."): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for dtype in DTYPES
}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with writing(path, layout, metadata or {}) as target:
        for name, tensor in tensors.items():
            target.write(name, 0, tensor.flatten())


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith("deltapatch-tmp")]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_every_dtype_is_read_by_safetensors_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", OF_EVERY_DTYPE)

    read = load_file(tmp_path / "m.safetensors")
    assert read.keys() == OF_EVERY_DTYPE.keys()
    for name, tensor in OF_EVERY_DTYPE.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor))


def test_what_safetensors_wrote_is_found_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(OF_EVERY_DTYPE, path)
    content = path.read_bytes()

    for name, stored in read_layout(path).items():
        expected = bytes(bits(OF_EVERY_DTYPE[name]).tolist())
        assert (stored.shape, stored.dtype) == ((2, 3), OF_EVERY_DTYPE[name].dtype)
        assert content[stored.offset : stored.offset + len(expected)] == expected


def test_scalars_and_empty_tensors_keep_their_shapes(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "none": torch.ones(0),
        "rows": torch.ones(4, 0, 2),
        "one": torch.ones(1),
    }
    write(tmp_path / "m.safetensors", tensors)

    assert equal(load_file(tmp_path / "m.safetensors"), tensors)
    assert {name: stored.shape for name, stored in read_layout(tmp_path / "m.safetensors").items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", OF_EVERY_DTYPE | {"a": torch.ones(1, dtype=torch.uint8)})

    for stored in read_layout(tmp_path / "m.safetensors").values():
        assert stored.offset % stored.dtype.itemsize == 0


def test_metadata_is_read_by_safetensors_and_by_us(tmp_path: Path) -> None:
    metadata = {"format": "pt", "note": 'a "quote", a line\nand é'}
    write(tmp_path / "m.safetensors", {"w": torch.ones(2)}, metadata)

    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
    assert read_metadata(tmp_path / "m.safetensors") == metadata


def test_parts_come_in_any_order_and_are_cast(tmp_path: Path) -> None:
    with writing(tmp_path / "m.safetensors", {"w": ((2, 3), torch.float16)}, {}) as target:
        target.write("w", 4, torch.tensor([4.0, 5.0]))
        target.write("w", 0, torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))

    read = load_file(tmp_path / "m.safetensors")["w"]
    assert torch.equal(read, torch.arange(6, dtype=torch.float16).reshape(2, 3))


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    model = random_model(0)
    write(tmp_path / "a", model)
    write(tmp_path / "b", dict(reversed(model.items())))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# Interruptions


def test_a_kill_in_the_middle_leaves_the_old_file_and_what_the_next_one_removes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, {"w": torch.ones(1000)})
    before = path.read_bytes()

    child = os.fork()
    if child == 0:
        try:
            with writing(path, {"w": ((1000,), torch.float32)}, {}) as target:
                target.write("w", 0, torch.zeros(500))
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    assert path.read_bytes() == before
    (orphan,) = leftovers(tmp_path)
    two_hours_ago = orphan.stat().st_mtime - 7200
    os.utime(orphan, (two_hours_ago, two_hours_ago))
    write(path, {"w": torch.zeros(1000)})
    assert [found.name for found in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_in_the_middle_leaves_the_old_file_only(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "m.safetensors"
    write(path, {"w": torch.ones(10)})
    before = path.read_bytes()

    def fail() -> None:
        with writing(path, {"w": ((10,), torch.float32)}, {}) as target:
            target.write("w", 0, torch.zeros(5))
            raise error("of something else than the file")

    with pytest.raises(error, match="of something else"):
        fail()
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_only(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write(path, {"w": torch.ones(10)})
    before = path.read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(DeltapatchError, match=r"m\.safetensors cannot be written: File too large"):
            write(path, {"w": torch.ones(2**18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_in_the_middle_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*what: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill() -> None:
        with writing(tmp_path / "m.safetensors", {"w": ((10,), torch.float32)}, {}) as target:
            monkeypatch.setattr(os, "pwrite", is_full)
            target.write("w", 0, torch.zeros(10))

    with pytest.raises(DeltapatchError, match=r"m\.safetensors cannot be written: No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_writes_that_the_system_cuts_short_are_carried_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, place: whole(file, content[:7], place))
    write(tmp_path / "m.safetensors", random_model(0))

    assert equal(load_file(tmp_path / "m.safetensors"), random_model(0))


def test_a_new_file_is_readable_as_the_system_says(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write(tmp_path / "m.safetensors", {"w": torch.ones(1)})
    finally:
        os.umask(previous)

    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


# What is refused


def test_a_path_that_cannot_become_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltapatchError, match="is no file that could be replaced"):
        write(tmp_path, {"w": torch.ones(1)})
    with pytest.raises(DeltapatchError, match=r"none/m\.safetensors cannot be written: No such file"):
        write(tmp_path / "none" / "m.safetensors", {"w": torch.ones(1)})


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"w": torch.ones(1, dtype=torch.complex64)}, "tensor 'w' has dtype torch.complex64"),
        ({"__metadata__": torch.ones(1)}, "a tensor must not be called '__metadata__'"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    with pytest.raises(DeltapatchError, match=reason):
        write(tmp_path / "m.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1, dtype=torch.complex64)}, tmp_path / "m.safetensors")

    with pytest.raises(
        DeltapatchError, match=r"m\.safetensors: tensor 'w' has dtype C64, which is not known"
    ):
        read_layout(tmp_path / "m.safetensors")
