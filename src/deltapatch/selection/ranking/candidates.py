"""What is ranked: bases that are there, and recipes of bases that are loaded when their turn comes."""

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...base import Base
from ...errors import DeltapatchError
from ...loading import load_base

_OPEN_CLIP = "open_clip/"
_NO_FILES = ("random", "imagenet1k")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A base to be ranked. Make one with `Candidate.of`, or from a file with `read_candidates`.

    Attributes:
        name: what tables call it.
        source: a base, which stays the caller's, or what `load_base` takes.
        options: further arguments of `load_base`.

    Example:
        >>> Candidate.of("timm/resnet50.a1_in1k")
        >>> Candidate("ours", "ours.py:network", {"weights": "ours.safetensors", "size": 224})
    """

    name: str
    source: Base | str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, source: "Candidate | Base | str") -> "Candidate":
        """A candidate as it is, or one named after its base or source."""
        if isinstance(source, Candidate):
            return source
        return cls(source.name if isinstance(source, Base) else source, source)

    @property
    def has_published_weights(self) -> bool:
        """Whether its weights are a library's own, so that results published under its name are of them."""
        is_named = isinstance(self.source, str) and self.source.startswith(("timm/", "torchvision/"))
        return is_named and "weights" not in self.options

    def load(self, device: str | None = None, task_classes: Sequence[str] = ()) -> Base:
        """The base: the one that was given, where it is, or a new one.

        Args:
            device: where to put a new one; left out, the graphics processor where there is one.
            task_classes: what a base whose classes are texts is asked about unless its options say.

        Raises:
            DeltapatchError: it cannot be loaded.
        """
        if isinstance(self.source, Base):
            return self.source
        options = dict(self.options)
        if self.source.startswith(_OPEN_CLIP):
            options.setdefault("classes", list(task_classes))
        return load_base(self.source, device=device or _best_device(), **options)


def as_candidates(sources: Sequence[Candidate | Base | str]) -> tuple[Candidate, ...]:
    """Candidates with names of their own.

    Raises:
        DeltapatchError: there is none, or two have one name.
    """
    if isinstance(sources, str):
        raise DeltapatchError(
            f"candidates must be a sequence of bases, but it is the single text '{sources}'"
        )
    candidates = tuple(Candidate.of(source) for source in sources)
    if not candidates:
        raise DeltapatchError("there is no base to rank; give one or more")
    name, count = Counter(candidate.name for candidate in candidates).most_common(1)[0]
    if count > 1:
        raise DeltapatchError(f"{count} bases are called '{name}'; give each a name of its own (name=)")
    return candidates


def parse_candidates(text: str) -> tuple[Candidate, ...]:
    """Reads sources of bases, and TOML files of them, with commas between them.

    Raises:
        DeltapatchError: a file cannot be read, there is no base, or two have one name.
    """
    found: list[Candidate] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found += read_candidates(part) if part.endswith(".toml") else [Candidate.of(part)]
    return as_candidates(found)


class _Entry(BaseModel):
    """One ``[[base]]`` of a file: the arguments of `load_base`, but for the device."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str
    weights: str | None = None
    classes: str | list[str] | None = None
    num_classes: int | None = None
    size: int | list[int] | None = None
    mean: float | list[float] | None = None
    std: float | list[float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    templates: list[str] | None = None
    name: str | None = None


def read_candidates(path: str | Path) -> tuple[Candidate, ...]:
    """Reads a TOML file with one ``[[base]]`` for each base.

    Its keys are the arguments of `load_base`: ``source``, and where wanted ``weights``, ``classes``,
    ``num_classes``, ``size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``templates`` and ``name``.
    Files that it names are looked for beside it.

    Raises:
        DeltapatchError: the file cannot be read, or holds something else; the message names the entry.

    Example:
        >>> print(Path("bases.toml").read_text())
        [[base]]
        source = "timm/resnet50.a1_in1k"

        [[base]]
        source = "ours.py:network"
        weights = "ours.safetensors"
        size = 224
        name = "ours"
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeltapatchError(f"{path}: cannot be read ({error.strerror}); expected a TOML file") from error
    except ValueError as error:
        raise DeltapatchError(f"{path}: is no TOML file: {error}") from error
    unknown = sorted(content.keys() - {"base"})
    entries = content.get("base", [])
    if unknown or not isinstance(entries, list) or not entries:
        found = f"holds '{unknown[0]}'" if unknown else "holds no base"
        raise DeltapatchError(f"{path}: {found}; expected one [[base]] with source = ... for each base")
    return tuple(_candidate(path, number, entry) for number, entry in enumerate(entries, 1))


def _candidate(path: Path, number: int, values: Any) -> Candidate:
    try:
        entry = _Entry.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        called = values.get("name", values.get("source", "")) if isinstance(values, dict) else ""
        what = f"base {number}" + (f" ('{called}')" if called else "")
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(_Entry.model_fields)
            raise DeltapatchError(
                f"{path}: {what} has the unknown key '{key}'; the keys are {allowed}"
            ) from None
        if first["type"] == "missing":
            raise DeltapatchError(f"{path}: {what} has no {key}; give one, as in {key} = ...") from None
        raise DeltapatchError(
            f"{path}: {what}: {key} cannot be {first['input']!r}: {first['msg'].lower()}"
        ) from None
    options = entry.model_dump(exclude={"source"}, exclude_none=True)
    for key in ("weights", "classes"):
        if isinstance(options.get(key), str) and options[key] not in _NO_FILES:
            options[key] = str(path.parent / options[key])
    if isinstance(entry.size, list):
        options["size"] = tuple(entry.size)
    return Candidate(entry.name or entry.source, _beside(path, entry.source), options)


def _beside(path: Path, source: str) -> str:
    """A source; where it names a file, that file beside ``path``."""
    python, _, function = source.rpartition(":")
    if python.endswith(".py"):
        return f"{path.parent / python}:{function}"
    if source.startswith(_OPEN_CLIP) and source.endswith(".json"):
        return f"{_OPEN_CLIP}{path.parent / source.removeprefix(_OPEN_CLIP)}"
    return source


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
