"""A merge as a small file that says what was merged how, so that it can be done again."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .inputs import Inputs
from .rules import Merge, make_merge
from .safetensors_files import read_metadata
from .sources import MergeError

_VERSION = 1


class Recipe(BaseModel):
    """What was, or is to be, merged.

    Attributes:
        merge: the name of the merge.
        options: its configuration.
        models: files, hub ids, or names of models in memory, in order.
        base: the same of the base; empty where there was none.
        skip: patterns of tensors that are not merged.
        version: of this form.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    merge: str
    options: dict[str, Any] = Field(default_factory=dict)
    models: tuple[str, ...]
    base: str = ""
    skip: tuple[str, ...] = ()
    version: int = _VERSION

    @classmethod
    def of(cls, how: Merge, inputs: Inputs, skip: tuple[str, ...]) -> "Recipe":
        """The recipe of a merge under way."""
        return cls(
            merge=how.name,
            options=how.options(),
            models=tuple(source.label for source in inputs.models),
            base="" if inputs.base is None else inputs.base.label,
            skip=skip,
        )

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """The recipe in a YAML or JSON file, or in the metadata of a merged model.

        Raises:
            MergeError: there is none, or it is none.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            text = read_metadata(path).get("deltapatch_merge")
            if text is None:
                raise MergeError(f"{path} was not made by a merge: its metadata has no recipe")
            content: Any = text
        else:
            content = _read_yaml(path)
        try:
            if isinstance(content, str):
                return cls.model_validate_json(content)
            return cls.model_validate(content)
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

    def to_json(self) -> str:
        """As it stands in a file's metadata; the same for the same merge."""
        return self.model_dump_json()


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MergeError(f"{path} cannot be read as a recipe: {error}; see docs/merging.md") from error
