import io
import json
import math
import pickle
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_files import INFO, TENSORS, Document, metadata, pack, refusal, stored

from deltapatch.errors import PatchFileError
from deltapatch.file import FileLimits, read_patch_file, read_patch_header, write_patch_file
from deltapatch.info import PatchInfo, info_to_json


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    path = tmp_path / "coats.safetensors"
    write_patch_file(path, TENSORS, INFO)
    return path


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
