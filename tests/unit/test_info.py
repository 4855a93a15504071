import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deltapatch.errors import PatchFileError
from deltapatch.info import (
    FORMAT_VERSION,
    BaseReference,
    FittedOn,
    HeadReference,
    MethodReference,
    PatchInfo,
    explain,
    info_from_json,
    info_to_json,
    parse_json,
    shown,
)
from deltapatch.preprocessing import Preprocessing

SOURCE = "coats.safetensors"
FINGERPRINT = "sha256:" + "0123456789abcdef" * 4

INFO = PatchInfo(
    task="classification",
    method=MethodReference(
        name="series-adapter",
        config={
            "modules": 2,
            "start": "zero-gain",
            "rate": 0.5,
            "bias": True,
            "seed": None,
            "at": (1, "x", 2.0),
        },
        sites=({"stage": "layer4", "blocks": ({"name": "layer4.0", "stride": (2, 2)},), "width": 512},),
    ),
    base=BaseReference(name="resnet50", fingerprint=FINGERPRINT, source="timm/resnet50.a1_in1k"),
    classes=("coat", "Mantel", "外套", "<b>hat</b>"),
    preprocessing=Preprocessing(input_size=(3, 224, 224), mean=(0.1, 0.2, 0.3), crop_pct=0.95),
    head=HeadReference(in_features=2048),
    fitted_on=FittedOn(
        source="photos/",
        digest="sha256:00",
        train=80,
        val=10,
        test=10,
        bad_images=1,
        validation="10 % of the training images",
        seed=2**63,
        epochs=30,
        seconds=12.5,
    ),
    figures={"test_accuracy": 0.1 + 0.2},
    versions={"torch": "2.6.0"},
    created="2025-01-31T12:00:00+00:00",
    licence="Apache-2.0",
    author="Zoë",
    note="first try",
)


def document(**changes: Any) -> dict[str, Any]:
    return json.loads(info_to_json(INFO)) | changes


def read(content: object) -> PatchInfo:
    return info_from_json(json.dumps(content).encode(), SOURCE)


def test_a_description_survives_being_written_and_read_exactly():
    assert info_from_json(info_to_json(INFO), SOURCE) == INFO


def test_equal_descriptions_give_equal_bytes_whatever_the_order_of_their_keys():
    method = MethodReference(name="delta", config={"a": 1, "b": 2})
    reordered = MethodReference(name="delta", config={"b": 2, "a": 1})

    written = info_to_json(INFO.model_copy(update={"method": method}))

    assert written == info_to_json(INFO.model_copy(update={"method": reordered}))


def test_configuration_values_keep_their_types():
    config = info_from_json(info_to_json(INFO), SOURCE).method.config

    assert {key: type(value) for key, value in config.items()} == {
        "modules": int,
        "start": str,
        "rate": float,
        "bias": bool,
        "seed": type(None),
        "at": tuple,
    }


def test_the_order_of_the_classes_is_kept():
    classes = ("zebra", "ant", "moth")

    assert read(document(classes=list(classes))).classes == classes


def test_a_description_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        INFO.note = "other"


def test_what_may_be_left_out_has_a_default():
    minimal = document()
    for optional in ("head", "fitted_on", "licence", "author", "note"):
        del minimal[optional]

    info = read(minimal)

    assert (info.head, info.fitted_on, info.licence, info.author, info.note) == (None, None, "", "", "")


@pytest.mark.parametrize(
    "field", ["task", "method", "base", "classes", "preprocessing", "figures", "created"]
)
def test_a_missing_field_is_named(field: str):
    incomplete = document()
    del incomplete[field]

    with pytest.raises(PatchFileError, match=f"^{SOURCE}: the field '{field}' is missing; "):
        read(incomplete)


def test_fault_12_a_newer_format_is_refused_before_anything_else_is_looked_at():
    expected = (
        f"{SOURCE} was written by a newer deltapatch (format 2; this one reads up to {FORMAT_VERSION});"
        " upgrade deltapatch"
    )
    with pytest.raises(PatchFileError) as caught:
        read({"format_version": 2, "shape_of_things_to_come": []})

    assert str(caught.value) == expected


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None, "2"])
def test_a_format_version_that_never_existed_is_refused(version: object):
    with pytest.raises(PatchFileError, match="format_version"):
        read(document(format_version=version))


def _with(path: str, value: object) -> dict[str, Any]:
    changed = document()
    *parents, last = path.split(".")
    target = changed
    for parent in parents:
        target = target[parent]
    target[last] = value
    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("surprise", 1),
        ("base.surprise", 1),
        ("preprocessing.surprise", 1),
    ],
)
def test_an_unknown_field_is_refused_by_name(field: str, value: object):
    with pytest.raises(PatchFileError, match=f"the field '{field}' is not one that this version"):
        read(_with(field, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", "regression"),
        ("method.name", "Delta"),
        ("method.name", "../delta"),
        ("method.name", "delta\n"),
        ("method.name", "d" * 65),
        ("method.config", {str(key): 1 for key in range(65)}),
        ("method.config.start", "s" * 513),
        ("method.config.start", "zero\x1b[2J"),
        ("method.config.start", {"nested": 1}),
        ("method.config.start", [[1]]),
        ("method.config.start", [0] * 257),
        ("method.config.start", 2**63),
        ("method.sites", [{}] * 10_001),
        ("method.sites", ["layer4"]),
        ("method.sites", {"stage": "layer4"}),
        ("method.sites", [{"stage": ["s" * 513]}]),
        ("method.sites", [{"blocks": [{"name": "a\nb"}]}]),
        ("method.sites", [{"a\nb": 1}]),
        ("method.sites", [{"blocks": [{"stride": 2**63}]}]),
        ("base.name", ""),
        ("base.name", "n" * 513),
        ("base.fingerprint", "sha256:" + "g" * 64),
        ("base.fingerprint", FINGERPRINT + "\n"),
        ("base.fingerprint", FINGERPRINT.upper()),
        ("head.in_features", 0),
        ("head.in_features", "2048"),
        ("fitted_on.train", -1),
        ("fitted_on.train", 1.5),
        ("fitted_on.seconds", -0.5),
        ("figures", {str(key): 0.5 for key in range(257)}),
        ("figures.test_accuracy", "0.9"),
        ("figures.test_accuracy", None),
        ("versions", {str(key): "1" for key in range(65)}),
        ("created", "yesterday"),
        ("created", "2025-01-31T12:00:00"),
        ("created", "2025-01-31T12:00:00+01:00"),
        ("created", "2025-13-31T12:00:00+00:00"),
        ("licence", "l" * 513),
        ("author", 7),
        ("note", "n" * 4097),
    ],
)
def test_fault_14_a_value_out_of_bounds_is_refused_by_the_name_of_its_field(field: str, value: object):
    with pytest.raises(PatchFileError, match=f"^{SOURCE}: the field '{field}[^']*' is refused: "):
        read(_with(field, value))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_figure_that_is_not_finite_is_refused(value: str):
    text = info_to_json(INFO).replace(b"0.30000000000000004", value.encode())

    with pytest.raises(PatchFileError, match=r"not JSON|finite"):
        info_from_json(text, SOURCE)


CONTROL_CHARACTERS = [
    "\0",
    "\t",
    "\n",
    "\x1b",
    "\x7f",
    "\x85",
    "\x9b",
    "\u2028",
    "\u202e",
    "\u2066",
    "\ud800",
]


@pytest.mark.parametrize("character", CONTROL_CHARACTERS, ids=ascii)
@pytest.mark.parametrize(
    ("field", "around"),
    [
        ("base.name", "{}"),
        ("base.source", "a{}b"),
        ("note", "{}"),
        ("author", "{}"),
        ("licence", "{}"),
        ("classes", ["coat", "{}"]),
        ("figures", {"{}": 1.0}),
        ("versions", {"torch": "{}"}),
        ("versions", {"{}": "2"}),
        ("method.config", {"{}": 1}),
        ("method.config", {"start": ["{}"]}),
        ("fitted_on.source", "{}"),
    ],
)
def test_fault_14_a_control_character_is_refused_wherever_text_may_stand(
    character: str, field: str, around: object
):
    escaped = json.dumps(character)[1:-1]
    text = json.dumps(_with(field, around)).replace('"{}"', f'"{escaped}"').replace("a{}b", f"a{escaped}b")

    with pytest.raises(PatchFileError) as caught:
        info_from_json(text.encode(), SOURCE)

    assert character not in str(caught.value)


def test_markup_is_only_text():
    note = "<script>alert(1)</script> & ' \" {{ 7 }}"

    assert read(document(note=note)).note == note


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ([""], "classes.0"),
        (["c" * 257], "classes.0"),
        ("coat", "'classes' is refused"),
        (["coat", None], "classes.1"),
        (["coat", "hat", "coat"], "classes 0 and 2 have the same name 'coat'"),
        (["é", "e\u0301"], "classes 0 and 1 have the same name"),
        ([str(index) for index in range(100_001)], "at most 100000"),
    ],
)
def test_classes_that_a_head_could_not_be_read_with_are_refused(classes: object, reason: str):
    with pytest.raises(PatchFileError, match=reason):
        read(document(classes=classes))


def test_a_patch_without_a_head_has_no_classes():
    assert read(document(classes=[], head=None)).classes == ()


def test_a_hundred_thousand_classes_are_accepted():
    assert len(read(document(classes=[str(index) for index in range(100_000)])).classes) == 100_000


@pytest.mark.parametrize(
    ("field", "value"),
    [("interpolation", "magic"), ("crop_pct", 0), ("input_size", [3, 224]), ("mean", ["0.5"]), ("std", [0])],
)
def test_fault_11_preprocessing_that_cannot_be_carried_out_is_refused(field: str, value: object):
    with pytest.raises(PatchFileError, match=f"the field 'preprocessing.{field}"):
        read(_with(f"preprocessing.{field}", value))


def test_explain_names_the_first_refused_field_of_a_description_built_in_python():
    with pytest.raises(ValidationError) as caught:
        BaseReference(name="resnet50", fingerprint="md5:0", source="")

    assert explain(caught.value).startswith("the field 'fingerprint' is refused: string should match")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b'{"a": 1} {}', "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
        (b'{"a": {"\\u0062": 1, "b": 2}}', "has the key 'b' twice"),
        (b'{"a": [[[1]]]}', "is nested deeper than 3 levels"),
        (b"[" * 1_000_000, "has more than 10 values"),
        (b'{"a": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}', "has more than 10 values"),
    ],
)
def test_what_is_not_one_plain_json_object_is_refused(text: bytes, reason: str):
    with pytest.raises(PatchFileError, match=f"^the header {reason}"):
        parse_json(text, "the header", max_depth=3, max_values=10)


def test_nesting_and_values_are_counted_outside_of_strings_only():
    content = {"a": '[[[[{"\\', "b": "\\\\[[[[,,,,,,,,,,,,,", '[[["': [[1]]}

    assert parse_json(json.dumps(content).encode(), "the header", max_depth=3, max_values=5) == content


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3))
def test_json_is_accepted_exactly_up_to_its_own_depth(content: dict[str, object]):
    text, depth = json.dumps(content).encode(), _depth(content)

    assert parse_json(text, "the header", max_depth=depth, max_values=1000) == content
    with pytest.raises(PatchFileError, match="nested deeper"):
        parse_json(text, "the header", max_depth=depth - 1, max_values=1000)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 4_000_000,
        b'{"a":[' + b",".join([b"[]"] * 1_000_000) + b"]}",
        b'"' * 4_000_000,
        b'\\"' * 2_000_000,
        b'{"classes":[' + b",".join([b"1"] * 299_000) + b"]}",
        b"{" + b",".join(b'"%d":1' % key for key in range(299_000)) + b',"0":1}',
    ],
    ids=["deep", "many lists", "quotes", "escaped quotes", "bad classes", "late duplicate"],
)
def test_fault_14_a_huge_hostile_description_is_refused_quickly(text: bytes):
    start = time.process_time()
    with pytest.raises(PatchFileError):
        info_from_json(text, SOURCE)

    assert time.process_time() - start < 5


def test_shown_makes_any_text_short_and_plain():
    assert shown("coat") == "'coat'"
    assert shown("c\u043eat\x1b") == r"'c\u043eat\x1b'"
    assert len(shown("x" * 10_000)) < 100
