import errno
import hashlib
import math
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_files import INFO, OTHER, TENSORS
from torch import Tensor

from deltapatch.errors import PatchFileError
from deltapatch.file import (
    file_digest,
    read_patch_file,
    read_patch_header,
    sweep_temporary_files,
    write_patch_file,
)
from deltapatch.info import info_to_json


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "coats.safetensors"
    write_patch_file(path, TENSORS, INFO)
    return path


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.endswith("deltapatch-tmp")]


def test_the_mode_of_a_new_file_is_that_of_the_umask(tmp_path: Path):
    previous = os.umask(0o027)
    try:
        write_patch_file(tmp_path / "p", TENSORS, INFO)
    finally:
        os.umask(previous)

    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({"a": torch.ones(1, dtype=torch.complex64)}, id="complex"),
        pytest.param({"a": torch.ones(2, 2).to_sparse()}, id="sparse"),
        pytest.param({"a": torch.ones(2, device="meta")}, id="meta"),
    ],
)
def test_a_tensor_that_has_no_plain_values_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor]):
    with pytest.raises(PatchFileError, match=r"tensor 'a' \(torch.* cannot be stored; give a dense tensor"):
        write_patch_file(tmp_path / "p", tensors, INFO)


@pytest.mark.parametrize(
    ("tensors", "changes"),
    [
        pytest.param({"__metadata__": torch.ones(1)}, {}, id="reserved-name"),
        pytest.param({"a\n": torch.ones(1)}, {}, id="unprintable-name"),
        pytest.param({"n" * 513: torch.ones(1)}, {}, id="long-name"),
        pytest.param({"a": torch.ones([1] * 9)}, {}, id="nine-dimensions"),
        pytest.param({str(index): torch.ones(0) for index in range(20_001)}, {}, id="many-tensors"),
        pytest.param(
            {}, {"classes": tuple(f"{index:050}" for index in range(100_000))}, id="long-description"
        ),
        pytest.param({}, {"figures": {"accuracy": math.nan}}, id="unchecked-figure"),
        pytest.param({}, {"task": "poetry"}, id="unchecked-task"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, tensors: dict[str, Tensor], changes: dict[str, Any]
):
    with pytest.raises(PatchFileError):
        write_patch_file(tmp_path / "p", tensors, INFO.model_copy(update=changes))

    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(PatchFileError, match="is a directory; give the path"):
        write_patch_file(tmp_path, TENSORS, INFO)
    with pytest.raises(PatchFileError, match="is not a regular file; give the path"):
        write_patch_file(tmp_path / "pipe", TENSORS, INFO)
    for read in (read_patch_file, read_patch_header, file_digest):
        with pytest.raises(PatchFileError, match="cannot be read: Is a directory"):
            read(tmp_path)
        with pytest.raises(PatchFileError, match="is not a regular file; give the path"):
            read(tmp_path / "pipe")


def test_a_file_or_folder_that_is_missing_is_said_to_be(tmp_path: Path, patch: Path):
    missing = tmp_path / "no" / "p"

    with pytest.raises(PatchFileError, match="cannot be read: it does not exist; check the path"):
        read_patch_file(tmp_path / "p")
    with pytest.raises(PatchFileError, match=f"cannot be read: the folder {missing.parent} does not exist"):
        read_patch_file(missing)
    with pytest.raises(
        PatchFileError, match=f"cannot be written: the folder {missing.parent} does not exist"
    ):
        write_patch_file(missing, TENSORS, INFO)
    with pytest.raises(PatchFileError, match=f"cannot be written: the folder {patch} does not exist"):
        write_patch_file(patch / "p", TENSORS, INFO)


# Crashes, full disks, several writers

SAVER = """
import sys
from pathlib import Path
import torch
from deltapatch.file import write_patch_file
from deltapatch.info import info_from_json
path, writer = Path(sys.argv[1]), int(sys.argv[2])
info = info_from_json(sys.stdin.buffer.readline(), "stdin")
for count in range(1_000_000):
    value = float(writer * 1000 + count % 1000)
    tensors = {"a": torch.full((2**18,), value), "b": torch.full((2**18,), value)}
    write_patch_file(path, tensors, info.model_copy(update={"note": str(value)}))
    print(count, flush=True)
"""


@pytest.fixture
def savers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that save patches under one name as fast as they can, until they are killed."""
    command = [sys.executable, "-c", SAVER, str(tmp_path / "p")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(writer)], stdin=-1, stdout=-1, env=environment) for writer in range(3)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write(info_to_json(INFO) + b"\n")
        process.stdin.flush()
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def assert_whole(path: Path) -> None:
    info, tensors = read_patch_file(path)
    for tensor in tensors.values():
        assert tensor.unique().tolist() == [float(info.note)]


def test_fault_31_34_and_37_killed_and_competing_savers_leave_a_whole_file(
    tmp_path: Path, savers: list[subprocess.Popen[bytes]]
):
    chance = random.Random(0)
    for process in savers:
        assert process.stdout
        assert process.stdout.readline()
    for process in savers:
        for _ in range(chance.randrange(1, 12)):
            assert_whole(tmp_path / "p")
        assert process.poll() is None
        process.kill()
        process.wait()
        assert_whole(tmp_path / "p")

    orphans = leftovers(tmp_path)
    assert len(orphans) <= len(savers)
    assert sorted(path.name for path in sweep_temporary_files(tmp_path, older_than_seconds=0)) == sorted(
        orphans
    )
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_fault_32_a_full_disk_leaves_the_old_file(patch: Path):
    before = patch.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(PatchFileError, match="cannot be written: there is no room for it"):
            write_patch_file(patch, {"a": torch.ones(2**18)}, INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert patch.read_bytes() == before
    assert leftovers(patch.parent) == []


@pytest.mark.parametrize(
    ("function", "fault", "reason"),
    [
        pytest.param("os.fsync", OSError(errno.ENOSPC, "No space left"), "no room", id="fault-32-at-fsync"),
        pytest.param("os.fsync", OSError(errno.EDQUOT, "Quota"), "no room", id="fault-32-quota"),
        pytest.param("os.fsync", OSError(errno.EIO, "I/O error"), "I/O error; check", id="failing-disk"),
        pytest.param(
            "builtins.open", OSError(errno.EROFS, "Read-only"), "permit it", id="fault-33-file-system"
        ),
        pytest.param("builtins.open", OSError(errno.EACCES, "Denied"), "permit it", id="fault-33-directory"),
        pytest.param(
            "os.replace", OSError(errno.EPERM, "Not permitted"), "permit it", id="fault-33-at-rename"
        ),
    ],
)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    patch: Path, monkeypatch: pytest.MonkeyPatch, function: str, fault: OSError, reason: str
):
    before = patch.read_bytes()

    def fail(*arguments: object, **options: object) -> None:
        raise fault

    with monkeypatch.context() as broken:
        broken.setattr(function, fail)
        with pytest.raises(PatchFileError, match=f"^{patch} cannot be written: .*{reason}"):
            write_patch_file(patch, OTHER, INFO)

    assert patch.read_bytes() == before
    assert [path.name for path in patch.parent.iterdir()] == [patch.name]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    patch: Path, monkeypatch: pytest.MonkeyPatch
):
    before = patch.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_patch_file(patch, OTHER, INFO)

    assert patch.read_bytes() == before
    assert [path.name for path in patch.parent.iterdir()] == [patch.name]


def test_a_save_is_on_disk_before_it_takes_the_name_and_the_name_is_on_disk_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        steps.append("directory" if inode == tmp_path.stat().st_ino else "file")
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr("os.fsync", logged_fsync)
    monkeypatch.setattr("os.replace", logged_replace)
    write_patch_file(tmp_path / "p", TENSORS, INFO)

    assert steps == ["file", "rename", "directory"]


def test_fault_34_a_reader_beside_two_writers_sees_one_whole_patch_or_the_other(tmp_path: Path):
    path = tmp_path / "p"

    def save_often(value: float) -> None:
        for _ in range(40):
            tensors = {"a": torch.full((5000,), value), "b": torch.full((5000,), value)}
            write_patch_file(path, tensors, INFO.model_copy(update={"note": str(value)}))

    save_often(0.0)
    writers = [threading.Thread(target=save_often, args=(float(value),)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert_whole(path)
    assert_whole(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def _orphan(directory: Path, name: str, age: float) -> Path:
    path = directory / f".{name}.{hashlib.sha256(name.encode()).hexdigest()[:16]}.deltapatch-tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_fault_37_orphans_are_swept_and_nothing_else_is(patch: Path):
    directory = patch.parent
    old = [_orphan(directory, name, 7200) for name in ("b.safetensors", "a.safetensors")]
    _orphan(directory, "young", 60)
    for name in (".other.tmp", "a.0123456789abcdef.deltapatch-tmp", ".a.0123.deltapatch-tmp"):
        (directory / name).write_bytes(b"")
        os.utime(directory / name, (0, 0))
    folder, link = (directory / f".{name}.0123456789abcdef.deltapatch-tmp" for name in ("folder", "link"))
    folder.mkdir()
    link.symlink_to(patch)
    os.utime(link, (0, 0), follow_symlinks=False)
    before = set(directory.iterdir())

    assert sweep_temporary_files(directory) == sorted(old)
    assert set(directory.iterdir()) == before - set(old)
    assert read_patch_file(patch)[0] == INFO


def test_fault_37_a_folder_that_is_missing_cannot_be_swept(tmp_path: Path):
    with pytest.raises(PatchFileError, match="no cannot be swept: it does not exist"):
        sweep_temporary_files(tmp_path / "no")
