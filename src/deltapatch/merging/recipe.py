"""A merge as a small file that says what was merged how, so that it can be done again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .inputs import Inputs
from .rules import Merge, make_merge
from .safetensors_files import read_metadata
from .sources import MergeError


class Recipe(BaseModel):
    """What was, or is to be, merged.

    Attributes:
        merge: the name of the merge.
        options: its configuration.
        models: files, hub ids, or names of models in memory, in order.
        base: the same of the base; empty where there was none.
        skip: patterns of tensors that are not merged.
        dtype: of the merged tensors, such as "bfloat16"; empty for that of the first model.
        mixed_dtypes: whether a tensor may have different floating dtypes in different models.
        version: of this form.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    merge: str
    options: dict[str, Any] = Field(default_factory=dict)
    models: tuple[str, ...]
    base: str = ""
    skip: tuple[str, ...] = ()
    dtype: Literal["", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"] = ""
    mixed_dtypes: bool = False
    version: Literal[1] = 1

    @classmethod
    def of(
        cls,
        how: Merge,
        inputs: Inputs,
        skip: tuple[str, ...],
        dtype: torch.dtype | None = None,
        mixed_dtypes: bool = False,
    ) -> "Recipe":
        """The recipe of a merge under way."""
        return cls(
            merge=how.name,
            options=_canonical(how.options()),
            models=tuple(source.label for source in inputs.models),
            base="" if inputs.base is None else inputs.base.label,
            skip=skip,
            dtype="" if dtype is None else str(dtype).removeprefix("torch."),  # pyright: ignore[reportArgumentType]
            mixed_dtypes=mixed_dtypes,
        )

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """The recipe in a YAML or JSON file, or in the metadata of a merged model.

        Raises:
            MergeError: there is none, or it is none.
        """
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                return cls.model_validate_json(_recipe_in(path))
            if path.suffix == ".json":
                return cls.model_validate_json(_read_text(path))
            return cls.model_validate(_read_yaml(path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "recipe"
            raise MergeError(f"{path}: {place}: {first['msg']}; see docs/merging.md") from error

    @property
    def how(self) -> Merge:
        """The merge that it names.

        Raises:
            MergeError: there is no such merge or option.
        """
        return make_merge(self.merge, self.options)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the merged tensors; None for that of the first model."""
        return getattr(torch, self.dtype) if self.dtype else None

    def to_json(self) -> str:
        """As it stands in a file's metadata; the same for the same merge."""
        return self.model_dump_json()


def _canonical(value: Any) -> Any:
    """Options as JSON has them, and a whole number in one way: 1 and 1.0 are one scale, and one text."""
    match value:
        case Mapping():
            return {str(key): _canonical(one) for key, one in value.items()}
        case list() | tuple():
            return [_canonical(one) for one in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def _recipe_in(path: Path) -> str:
    text = read_metadata(path).get("deltapatch_merge")
    if text is None:
        raise MergeError(f"{path} was not made by a merge: its metadata has no recipe; give another file")
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MergeError(f"{path} cannot be read as a recipe: {error}; see docs/merging.md") from error


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise MergeError(f"{path} cannot be read as a recipe: {reason}; see docs/merging.md") from error
