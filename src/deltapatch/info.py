"""What a patch says about itself: the versioned JSON document in the metadata of every patch file.

The document is untrusted until it is a :class:`PatchInfo`: every text is short and free of control
characters, every collection is bounded, every number is finite, and an unknown field is refused.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from deltapatch.errors import PatchFileError
from deltapatch.preprocessing import Preprocessing

FORMAT_VERSION = 1
MAX_JSON_DEPTH = 32
DAMAGED = "the file is damaged or was not written by deltapatch, so get or fit it again"

# C0 and C1 controls, line separators, the characters that reorder the text around them, and surrogates:
# printed by a terminal or a web page, they can make one text look like another, or stop the printing.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Room for 100,000 classes, 10,000 sites, and the rest.
_MAX_VALUES = 300_000
_LONGEST_SHOWN = 80
_LARGEST_INTEGER = 2**63 - 1
_IMMUTABLE = ConfigDict(frozen=True, extra="forbid")

PlainScalar = bool | int | float | str | None
PlainValue = PlainScalar | tuple[PlainScalar, ...]


def shown(text: str) -> str:
    """Quotes a text that nobody has checked so that it can stand in a message: ASCII only, and short."""
    quoted = ascii(text)
    return quoted if len(quoted) <= _LONGEST_SHOWN else f"{quoted[:_LONGEST_SHOWN]}…"


def _without_control_characters(text: str) -> str:
    found = _CONTROL_CHARACTERS.search(text)
    if found:
        raise ValueError(f"text must be one line without control characters, but it contains {found[0]!a}")
    return text


def _plain_scalar(value: object) -> PlainScalar:
    match value:
        case bool() | None:
            return value
        case int() if abs(value) <= _LARGEST_INTEGER:
            return value
        case float() if math.isfinite(value):
            return value
        case str() if len(value) <= 512:
            return _without_control_characters(value)
        case _:
            raise ValueError("should be true, false, null, a finite number or a text of up to 512 characters")


def _plain_value(value: object) -> PlainValue:
    if not isinstance(value, (list, tuple)):
        return _plain_scalar(value)
    if len(value) > 256:
        raise ValueError("should be a list of at most 256 values")
    return tuple(_plain_scalar(item) for item in value)


def _plain_tree(value: object) -> object:
    """A site is a small tree of plain values; how deep and how large the document bounds as a whole."""
    if isinstance(value, dict):
        return {_without_control_characters(str(key)): _plain_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain_tree(item) for item in value)
    return _plain_scalar(value)


def _site(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("should be an object of plain values")
    return _plain_tree(value)


def _distinct(classes: tuple[str, ...]) -> tuple[str, ...]:
    first_index: dict[str, int] = {}
    for index, name in enumerate(classes):
        earlier = first_index.setdefault(unicodedata.normalize("NFC", name), index)
        if earlier != index:
            raise ValueError(f"classes {earlier} and {index} have the same name {shown(name)}")
    return classes


def _utc_time(text: str) -> str:
    try:
        is_utc = datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        is_utc = False
    if not is_utc:
        raise ValueError("should be an ISO 8601 time in UTC such as 2025-01-31T12:00:00+00:00")
    return text


Line = Annotated[str, AfterValidator(_without_control_characters)]
Name = Annotated[Line, Field(min_length=1, max_length=512)]
ShortText = Annotated[Line, Field(max_length=512)]
Key = Annotated[Line, Field(min_length=1, max_length=128)]
ClassName = Annotated[Line, Field(min_length=1, max_length=256)]
ClassNames = Annotated[tuple[ClassName, ...], Field(max_length=100_000), AfterValidator(_distinct)]
Count = Annotated[int, Field(ge=0, le=_LARGEST_INTEGER)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
ConfigValue = Annotated[PlainValue, PlainValidator(_plain_value)]
Site = Annotated[dict[str, object], PlainValidator(_site)]
Figures = Annotated[dict[Key, FiniteFloat], Field(max_length=256)]


class BaseReference(BaseModel):
    """The base that a patch belongs to.

    Attributes:
        name: the base's name, for people.
        fingerprint: ``sha256:`` and 64 hexadecimal digits; decides whether a base is the right one.
        source: where the base came from, such as ``timm/resnet50.a1_in1k``; informational, never opened.
    """

    model_config = _IMMUTABLE

    name: Name
    fingerprint: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    source: ShortText


class MethodReference(BaseModel):
    """The patch method, its configuration and the sites that it touches, as plain values.

    The method itself validates configuration and sites when a patch is built from them.
    """

    model_config = _IMMUTABLE

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    config: Annotated[dict[Key, ConfigValue], Field(max_length=64)]
    sites: Annotated[tuple[Site, ...], Field(max_length=10_000)] = ()


class HeadReference(BaseModel):
    """The size of a task's own output layer; it has one output per class of the patch."""

    model_config = _IMMUTABLE

    in_features: Annotated[int, Field(ge=1, le=_LARGEST_INTEGER)]


class FittedOn(BaseModel):
    """What a patch was fitted on and how.

    Attributes:
        source: where the images came from, in words.
        digest: identifies the set of images and labels.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        bad_images: number of images that could not be read and were left out.
        validation: how the validation images were chosen.
        seed: seed of the fit's random numbers.
        epochs: passes over the training images.
        seconds: wall-clock time of the fit.
        cache: whether trunk activations were kept, and why.
        precision: what was computed in, and why.
    """

    model_config = _IMMUTABLE

    source: ShortText
    digest: ShortText
    train: Count
    val: Count
    test: Count
    bad_images: Count
    validation: ShortText
    seed: Annotated[int, Field(ge=-_LARGEST_INTEGER, le=2**64 - 1)]
    epochs: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    cache: ShortText = ""
    precision: ShortText = ""


class PatchInfo(BaseModel):
    """Everything that a patch file holds besides its tensors.

    Attributes:
        format_version: version of this document; see :data:`FORMAT_VERSION`.
        task: what the head's outputs mean.
        method: the patch method and its configuration.
        base: the only base that the patch may act on.
        classes: label names in the order of the head's outputs; distinct after Unicode NFC normalisation.
            Empty for a patch without a head, which only changes what a backbone computes.
        preprocessing: how an image becomes the base's input.
        head: the task's output layer, None where the method has none of its own.
        fitted_on: the data and the run that made the patch.
        figures: measured results such as ``test_accuracy``.
        versions: libraries and their versions at the time of fitting.
        created: ISO 8601 time in UTC.
        licence: terms of use, in words or as an SPDX identifier.
        author: who made the patch.
        note: one line of free text.
    """

    model_config = _IMMUTABLE

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    task: Literal["classification", "detection", "segmentation"]
    method: MethodReference
    base: BaseReference
    classes: ClassNames
    preprocessing: Preprocessing
    head: HeadReference | None = None
    fitted_on: FittedOn | None = None
    figures: Figures
    versions: Annotated[dict[Key, ShortText], Field(max_length=64)]
    created: Annotated[Line, Field(max_length=64), AfterValidator(_utc_time)]
    licence: ShortText = ""
    author: ShortText = ""
    note: Annotated[Line, Field(max_length=4096)] = ""


def info_to_json(info: PatchInfo) -> bytes:
    """Writes a patch's description as JSON; equal descriptions give equal bytes."""
    document = info.model_dump()
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def info_from_json(text: bytes, source: str, max_depth: int = MAX_JSON_DEPTH) -> PatchInfo:
    """Reads a patch's description.

    Args:
        text: the JSON document.
        source: the file that it came from, for messages.
        max_depth: the deepest nesting that is accepted.

    Raises:
        PatchFileError: the document is no valid description, or is one of a newer version of deltapatch.
    """
    document = parse_json(text, f"the description in {source}", max_depth, _MAX_VALUES)
    version = document.get("format_version")
    # Before anything else: a newer version may have changed the rest, and its user needs to hear just this.
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PatchFileError(
            f"{source} was written by a newer deltapatch (format {str(version)[:20]}; this one reads up to"
            f" {FORMAT_VERSION}); upgrade deltapatch"
        )
    try:
        return PatchInfo.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise PatchFileError(f"{source}: {explain(error)}; {DAMAGED}") from error


def explain(error: ValidationError) -> str:
    """Says in one clause which field pydantic refused first, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = shown(".".join(str(step) for step in first["loc"]))
    match first["type"]:
        case "missing":
            return f"the field {field} is missing"
        case "extra_forbidden":
            return f"the field {field} is not one that this version of deltapatch knows"
        case "json_invalid":
            return first["msg"]
        case _:
            reason = first["msg"].removeprefix("Value error, ")
            return f"the field {field} is refused: {reason[:1].lower()}{reason[1:]}"


def parse_json(text: bytes, name: str, max_depth: int, max_values: int) -> dict[str, object]:
    """Parses one JSON object, refusing what Python's parser would let pass.

    Args:
        text: UTF-8 encoded JSON.
        name: what the text is, for messages.
        max_depth: the deepest nesting that is accepted.
        max_values: how many values are accepted, containers included.

    Raises:
        PatchFileError: the text is not a JSON object, names a key twice, nests too deeply, holds too many
            values, or holds NaN or Infinity, which are not JSON.
    """

    def distinct_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) < len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise PatchFileError(f"{name} has the key {shown(repeated)} twice; {DAMAGED}")
        return members

    def refused_constant(constant: str) -> object:
        raise PatchFileError(f"{name} holds {constant}, which is not JSON; {DAMAGED}")

    # Before parsing: the parser recurses, so nesting could exhaust the stack, and each value costs memory.
    structure = outside_strings(text)
    if sum(map(structure.count, (b",", b"[", b"{"))) > max_values:
        raise PatchFileError(f"{name} has more than {max_values} values; {DAMAGED}")
    if _nesting(structure) > max_depth:
        raise PatchFileError(f"{name} is nested deeper than {max_depth} levels; {DAMAGED}")
    try:
        document = json.loads(text.decode(), object_pairs_hook=distinct_keys, parse_constant=refused_constant)
    except PatchFileError:
        raise
    except ValueError as error:
        raise PatchFileError(f"{name} is not JSON ({error}); {DAMAGED}") from error
    if not isinstance(document, dict):
        raise PatchFileError(f"{name} is not a JSON object; {DAMAGED}")
    return document


def outside_strings(text: bytes) -> bytes:
    """Returns what is left of a JSON text without its strings, so that its brackets can be counted."""
    unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2])


def _nesting(structure: bytes) -> int:
    brackets = re.findall(rb"[\[\]{}]", structure)
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)
