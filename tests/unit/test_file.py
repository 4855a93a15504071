import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import deltapatch.file
from deltapatch.errors import PatchFileError
from deltapatch.file import (
    FileLimits,
    TensorEntry,
    check_patch_name,
    file_digest,
    read_patch_file,
    read_patch_header,
    sweep_temporary_files,
    write_patch_file,
)
from deltapatch.info import BaseReference, MethodReference, PatchInfo, info_to_json
from deltapatch.preprocessing import Preprocessing

INFO = PatchInfo(
    task="classification",
    method=MethodReference(name="delta", config={"modules": 1}),
    base=BaseReference(name="resnet50", fingerprint="sha256:" + "0" * 64, source="timm/resnet50.a1_in1k"),
    classes=("zebra", "ant"),
    preprocessing=Preprocessing(input_size=(3, 224, 224), mean=(0.1, 0.2, 0.3), interpolation="bilinear"),
    figures={"test_accuracy": 0.75},
    versions={"torch": "2.6.0"},
    created="2025-01-31T12:00:00+00:00",
)
TENSORS = {"gain": torch.tensor([0.0, -0.0, 1.5]), "steps": torch.tensor(7), "head": torch.ones(2, 3)}
OTHER = {"gain": torch.tensor([9.0])}

Document = dict[str, Any]


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "coats.safetensors"
    write_patch_file(path, TENSORS, INFO)
    return path


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape)
        assert (
            tensor.reshape(-1).view(torch.uint8).tolist()
            == right[name].reshape(-1).view(torch.uint8).tolist()
        )


def metadata() -> dict[str, str]:
    return {"format": "pt", "deltapatch": info_to_json(INFO).decode()}


def pack(header: Document | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps({"__metadata__": metadata()} | header).encode()
    return len(text).to_bytes(8, "little") + text + data


def stored(dtype: str, shape: list[int], start: int, end: int) -> Document:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(PatchFileError) as caught:
        read_patch_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.endswith("deltapatch-tmp")]


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


def test_the_mode_of_a_new_file_is_that_of_the_umask(tmp_path: Path):
    previous = os.umask(0o027)
    try:
        write_patch_file(tmp_path / "p", TENSORS, INFO)
    finally:
        os.umask(previous)

    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o640


# Damaged and hostile files


def test_fault_1_a_zero_byte_file_is_reported_as_empty(tmp_path: Path):
    assert "is empty" in refusal(tmp_path / "p", b"")


def test_fault_2_a_file_truncated_anywhere_is_refused(patch: Path, tmp_path: Path):
    content = patch.read_bytes()

    # Every length up to the first keys of the header, some in its middle, every length among the tensors.
    size = len(content)
    for length in [*range(1, 100), *range(100, size - 100, 50), *range(size - 100, size)]:
        assert "truncated" in refusal(tmp_path / "p", content[:length])


def test_fault_3_trailing_bytes_are_refused(patch: Path, tmp_path: Path):
    assert "has trailing bytes" in refusal(tmp_path / "p", patch.read_bytes() + b"\0")


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 10**6])
def test_fault_4_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int):
    message = refusal(tmp_path / "p", length.to_bytes(8, "little") + b"{" * 1000)

    assert f"announce a header of {length} bytes, of which at most 1000 are possible" in message


def test_fault_5_two_hundred_thousand_empty_tensors_are_refused_at_once(tmp_path: Path):
    path = tmp_path / "p"
    path.write_bytes(pack({str(index): stored("F32", [0], 0, 0) for index in range(200_000)}))
    start = time.process_time()

    with pytest.raises(PatchFileError, match=r"header of 1[0-9]{7} bytes, of which at most 8388608"):
        read_patch_file(path)
    with pytest.raises(PatchFileError, match="more than 20000 tensors"):
        read_patch_file(path, FileLimits(max_header_bytes=2**30))
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ('{{"__metadata__": {metadata}, "a": {empty}, "a": {empty}}}', "'a'"),
        ('{{"__metadata__": {metadata}, "a": {empty}, "\\u0061": {empty}}}', "'a'"),
        ('{{"__metadata__": {metadata}, "__metadata__": {metadata}}}', "'__metadata__'"),
        ('{{"__metadata__": {metadata}, "a": {{"dtype": "F32", "shape": [0], "shape": [0]}}}}', "'shape'"),
    ],
)
def test_fault_6_a_key_that_stands_twice_is_refused(tmp_path: Path, header: str, key: str):
    text = header.format(metadata=json.dumps(metadata()), empty=json.dumps(stored("F32", [0], 0, 0)))

    assert f"has the key {key} twice" in refusal(tmp_path / "p", pack(text.encode()))


def test_fault_6_a_key_that_stands_twice_in_the_description_is_refused(tmp_path: Path):
    text = metadata()["deltapatch"].replace('{"author":""', '{"author":"","author":"x"', 1)
    content = pack({"__metadata__": {"format": "pt", "deltapatch": text}})

    assert "has the key 'author' twice" in refusal(tmp_path / "p", content)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": stored("F32", [3], 0, 8)},
        {"a": stored("F64", [2], 0, 8)},
        {"a": stored("F32", [2], 0, 4), "b": stored("F32", [1], 4, 8)},
        {"a": stored("F32", [1], 0, 4)},
        {"a": stored("F32", [1], 4, 8)},
        {"a": stored("F32", [2], 0, 8), "b": stored("F32", [1], 4, 8)},
        {"a": stored("F32", [1], 0, 4), "b": stored("F16", [1], 6, 8)},
        {"a": stored("F32", [2], 0, 8), "b": stored("F32", [2], 0, 8)},
        {"a": stored("F32", [2], 8, 0)},
        {"a": stored("F32", [-2], 0, 8)},
        {"a": stored("F32", [-1, -2], 0, 8)},
        {"a": stored("F32", [2], -8, 0)},
        {"a": stored("F32", [0, 2**62], 0, 0), "b": stored("F32", [2], 0, 8)},
        {"a": stored("F32", [1] * 9 + [2], 0, 8)},
        {"a": stored("F32", [2**63], 0, 8)},
        {"a": stored("C64", [1], 0, 8)},
        {"a": stored("float32", [2], 0, 8)},
        {"a": stored("F32", [2], 0, 8) | {"shape": [2.0]}},
        {"a": stored("F32", [2], 0, 8) | {"shape": ["2"]}},
        {"a": stored("F32", [1, 2], 0, 8) | {"shape": [True, 2]}},
        {"a": stored("F32", [2], 0, 8) | {"shape": 2}},
        {"a": stored("F32", [2], 0, 8) | {"shape": None}},
        {"a": stored("F32", [2], 0, 8) | {"dtype": 32}},
        {"a": stored("F32", [2], 0, 8) | {"data_offsets": [0]}},
        {"a": stored("F32", [2], 0, 8) | {"data_offsets": [0, 8, 8]}},
        {"a": stored("F32", [2], 0, 8) | {"surprise": 1}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": [0, 8]},
        {"": stored("F32", [2], 0, 8)},
        {"n" * 513: stored("F32", [2], 0, 8)},
        {"a\n": stored("F32", [2], 0, 8)},
        {"a\u202e": stored("F32", [2], 0, 8)},
        {"\ud800": stored("F32", [2], 0, 8)},
    ],
)
def test_fault_7_a_tensor_that_contradicts_its_bytes_is_refused(tmp_path: Path, tensors: Document):
    good = pack({"a": stored("F32", [2], 0, 8)}, bytes(8))
    (tmp_path / "good").write_bytes(good)
    read_patch_file(tmp_path / "good")

    refusal(tmp_path / "p", pack(tensors, bytes(8)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fault_8_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(
    tmp_path: Path, dtype: torch.dtype, value: float
):
    tensors = {"body": torch.ones(2), "head.weight": torch.tensor([[0.0, value]], dtype=dtype)}
    path = tmp_path / "p"

    with pytest.raises(PatchFileError, match=r"tensor 'head\.weight' holds NaN or infinite values"):
        write_patch_file(path, tensors, INFO)
    assert not path.exists()
    safetensors.torch.save_file(tensors, path, metadata())
    with pytest.raises(PatchFileError, match=r"tensor 'head\.weight' holds NaN or infinite values"):
        read_patch_file(path)


def test_fault_8_a_boolean_that_is_neither_true_nor_false_is_refused(tmp_path: Path):
    content = pack({"mask": stored("BOOL", [3], 0, 3)}, b"\0\1\2")

    assert "'mask' holds bytes that are neither true nor false" in refusal(tmp_path / "p", content)


def test_fault_9_and_11_the_base_the_preprocessing_and_the_order_of_the_classes_come_back_exactly(
    patch: Path,
):
    info = read_patch_header(patch).info

    assert (info.base, info.preprocessing, info.classes) == (INFO.base, INFO.preprocessing, ("zebra", "ant"))


def test_fault_12_a_newer_format_is_reported_before_what_else_may_be_new(tmp_path: Path):
    header = {
        "__metadata__": {"format": "pt", "deltapatch": '{"format_version": 2, "news": {}}'},
        "a": {"dtype": "F4", "packing": "new"},
    }
    message = refusal(tmp_path / "p", pack(header))

    assert message == (
        f"{tmp_path / 'p'} was written by a newer deltapatch (format 2; this one reads up to 1);"
        " upgrade deltapatch"
    )


def _checkpoint(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../evil.safetensors", b"")
    return buffer.getvalue()


class Trap:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return pytest.fail, ("the pickle was executed",)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(_checkpoint(True), id="fault-13-checkpoint"),
        pytest.param(_checkpoint(False), id="fault-13-old-checkpoint"),
        *[
            pytest.param(pickle.dumps(Trap(), protocol), id=f"fault-13-pickle-{protocol}")
            for protocol in (2, 3, 4, 5)
        ],
        pytest.param(pickle.dumps(None), id="fault-13-pickle-shorter-than-a-length"),
        pytest.param(_zip(), id="fault-16-zip-slip"),
    ],
)
def test_a_pickle_or_zip_archive_is_recognised_and_not_opened(tmp_path: Path, content: bytes):
    assert "deltapatch never unpickles" in refusal(tmp_path / "p", content)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_fault_13_a_header_whose_length_looks_like_a_pickle_is_still_read(tmp_path: Path):
    text = json.dumps({"__metadata__": metadata()}).encode().ljust(0x10280)
    (tmp_path / "p").write_bytes(pack(text))

    assert (tmp_path / "p").read_bytes().startswith(b"\x80\x02")
    assert read_patch_file(tmp_path / "p") == (INFO, {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"a,b\n" * 100, "no safetensors file", id="text"),
        pytest.param(pack(b'["a"]'), "no safetensors file", id="list"),
        pytest.param(pack(b""), "no safetensors file", id="no-header"),
        pytest.param(pack(b"{}"), "not a patch", id="no-metadata"),
        pytest.param(pack({"__metadata__": {"format": "pt"}}), "not a patch", id="other-safetensors"),
        pytest.param(pack({"__metadata__": [1]}), "not a patch", id="metadata-list"),
        pytest.param(
            pack({"__metadata__": metadata() | {"format": "np"}}), "'format' is refused", id="format"
        ),
        pytest.param(pack({"__metadata__": metadata() | {"deltapatch": {}}}), "'deltapatch' is", id="object"),
        pytest.param(pack({"__metadata__": metadata() | {"x": "y"}}), "'x' is not one that", id="unknown"),
        pytest.param(
            pack({"__metadata__": metadata() | {"deltapatch": "\ud800"}}), "not JSON", id="surrogate"
        ),
        pytest.param(pack(b'{"a": "\xff"}'), "is not JSON", id="not-utf-8"),
        pytest.param(pack(b'{"a": 1'), "is not JSON", id="unfinished"),
        pytest.param(pack(b'{"a": ' + b"[" * 100_000), "nested deeper than 32", id="nested"),
        pytest.param(pack(b'{"a": [' + b"1," * 1_000_000), "more than 320032 values", id="many-values"),
        pytest.param(
            pack({"__metadata__": metadata() | {"deltapatch": '{"a": ' + "[" * 33 + "]" * 33 + "}"}}),
            "nested deeper than 32",
            id="nested-description",
        ),
        pytest.param(
            pack({"__metadata__": metadata() | {"deltapatch": '"' + "a" * 2**22 + '"'}}),
            "a description of 4194306 bytes",
            id="huge-description",
        ),
        pytest.param(pack({"a\x1b[2J\n" * 99: 1}), r"'a\x1b[2J\na", id="control-characters"),
    ],
)
def test_fault_14_a_header_that_is_not_of_a_patch_is_refused(tmp_path: Path, content: bytes, reason: str):
    message = refusal(tmp_path / "p", content)

    assert reason in message
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (FileLimits(max_file_bytes=100), "where at most 100 are accepted"),
        (FileLimits(max_header_bytes=100), "of which at most 100 are possible"),
        (FileLimits(max_metadata_bytes=100), "where at most 100 are accepted"),
        (FileLimits(max_tensors=2), "more than 2 tensors"),
        (FileLimits(max_json_depth=2), "nested deeper than 2 levels"),
    ],
)
def test_every_limit_holds_for_the_header_and_for_the_whole_file(
    patch: Path, limits: FileLimits, reason: str
):
    for read in (read_patch_header, read_patch_file):
        with pytest.raises(PatchFileError, match=reason):
            read(patch, limits)


def test_a_file_exactly_at_the_limits_is_read(patch: Path):
    limits = FileLimits(max_tensors=len(TENSORS), max_file_bytes=patch.stat().st_size, max_json_depth=3)

    assert read_patch_file(patch, limits)[0] == INFO


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "p"


def read_or_refuse(path: Path, content: bytes) -> None:
    """Reads a content that must give a patch or a PatchFileError; any other exception fails the test."""
    path.write_bytes(content)
    with suppress(PatchFileError):
        info, tensors = read_patch_file(path)
        assert isinstance(info, PatchInfo)
        assert sum(tensor.nbytes for tensor in tensors.values()) < len(content)


FUZZ = settings(max_examples=200, deadline=None, derandomize=True)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(st.binary(max_size=300), st.booleans())
def test_fault_14_random_bytes_are_never_more_than_refused(scratch: Path, content: bytes, framed: bool):
    read_or_refuse(scratch, pack(b"{" + content + b"}") if framed else content)


@FUZZ
@given(
    st.lists(
        st.tuples(st.integers(0, 2**31), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4
    )
)
def test_fault_14_a_mutated_patch_is_read_or_refused(scratch: Path, mutations: list[tuple[int, bytes, int]]):
    content = pack({"a": stored("F32", [2], 0, 8), "b": stored("BOOL", [1], 8, 9)}, bytes(9))
    for position, inserted, removed in mutations:
        place = position % len(content)
        content = content[:place] + inserted + content[place + removed :]
    read_or_refuse(scratch, content)


@FUZZ
@given(st.data())
def test_fault_14_a_header_with_any_value_exchanged_is_read_or_refused(scratch: Path, data: st.DataObject):
    description = json.loads(info_to_json(INFO))
    header: Document = {"__metadata__": metadata(), "a": stored("F32", [2], 0, 8)}
    target = data.draw(st.sampled_from([description, description["method"], header, header["a"]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON_VALUES)
    if isinstance(header["__metadata__"], dict):
        header["__metadata__"] = header["__metadata__"] | {"deltapatch": json.dumps(description)}
    read_or_refuse(scratch, pack(header, bytes(8)))


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


# What is refused on writing


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
