"""The options of ``deltapatch merge``, and how they become a recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeltapatchError

if TYPE_CHECKING:
    from ..data import ImageSet
    from ..merging.recipe import Recipe

Models = Annotated[
    list[str],
    typer.Argument(
        help="Models (.safetensors, a sharded index, .pth, a folder, a hub id), or patch files; or one recipe"
        " (.yaml, .json, or a merged file).",
        show_default=False,
    ),
]
MergeName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="average, task_arithmetic, ties, dare, fisher, regmean, atlas, weight_signature.",
        show_default=False,
    ),
]
MergeOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="Option of the merge as KEY=VALUE.", show_default=False),
]
MergeBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="What the models were fine-tuned from, a file as they are; of patches, as for fit.",
        show_default=False,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Tensors that are not merged, such as heads: 'fc.*'.", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--out", help="A .safetensors or .pth file; for several patches a folder.", show_default=False
    ),
]
ImageFolders = Annotated[
    list[str] | None,
    typer.Option(
        help="Unlabelled images to re-estimate norm statistics on; may be given several times. Of patches,"
        " once or once for each, in order: the result is checked on them too.",
        show_default=False,
    ),
]
Evaluated = Annotated[
    list[str] | None,
    typer.Option(
        help="Labelled images of the task of each model, in order: accuracies of all.", show_default=False
    ),
]
SweepText = Annotated[
    str | None,
    typer.Option(help="OPTION=FIRST:LAST:STEP: the best on validation images is taken.", show_default=False),
]
Picture = Annotated[
    Path | None, typer.Option(help="Where the sweep is drawn; left out: beside --out.", show_default=False)
]
Architecture = Annotated[
    str | None,
    typer.Option(help="Of models, as --base of fit: timm/NAME, FILE.py:FUNCTION …", show_default=False),
]
HeadsName = Annotated[
    str, typer.Option(help="Of patches: own (a patch for each task), joint, or average (same classes).")
]
LeastAgreement = Annotated[
    float, typer.Option(min=0, max=1, help="Of patches: taught where the result agrees on fewer images.")
]
EpochsOfDistillation = Annotated[
    int, typer.Option("--distil-epochs", min=0, help="Of patches: how long it is taught; 0: never.")
]
StorageName = Annotated[str, typer.Option(help="Of patches of weights: fp32, bf16 or int8.")]
Dtype = Annotated[
    str, typer.Option(help="Of the merged tensors, such as bfloat16; left out: the first model's.")
]
MixedDtypes = Annotated[bool, typer.Option("--mixed-dtypes", help="Models may differ in dtype.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Left out: all processors.", show_default=False)]

MOST_IMAGES = 1000
_CHOICES = {"--heads": ("own", "joint", "average"), "--storage": ("fp32", "bf16", "int8")}


def read_recipe(
    models: Sequence[str],
    method: str | None,
    options: Sequence[str],
    base: str | None,
    skip: tuple[str, ...],
    dtype: str,
    mixed_dtypes: bool,
) -> "Recipe":
    """The recipe in a file, or the one that flags make.

    Raises:
        DeltapatchError: there is no method, or the recipe's own is to be changed.
    """
    from ..merging.recipe import Recipe
    from ..method import parse_option

    if method is None and _is_recipe(models):
        if options or skip or dtype or mixed_dtypes:
            raise DeltapatchError(
                f"{models[0]} is a recipe and says how to merge; change it there, or give the models and"
                " --method"
            )
        found = _recipe_in(Path(models[0]))
        return found if base is None else found.model_copy(update={"base": base})
    if method is None:
        raise DeltapatchError("give --method, such as average or ties, or one recipe file")
    content: dict[str, Any] = {
        "merge": method,
        "options": dict(parse_option(option) for option in options),
        "models": tuple(models),
        "base": base or "",
        "skip": skip,
        "dtype": dtype,
        "mixed_dtypes": mixed_dtypes,
    }
    try:
        recipe = Recipe.model_validate(content)
    except ValueError as error:
        raise DeltapatchError(
            f"--dtype '{dtype}' is none of float32, bfloat16, float16, float64 …"
        ) from error
    assert recipe.how
    return recipe


def is_patch(model: str) -> bool:
    """Whether a file is a patch, by its header."""
    from ..merging.safetensors_files import read_metadata

    path = Path(model)
    return path.suffix == ".safetensors" and path.is_file() and "deltapatch" in read_metadata(path)


def images_of(sources: Sequence[str]) -> "list[ImageSet]":
    """Images to look at, without their labels; of splits the training images."""
    return [_images(source) for source in sources]


def check_choice(option: str, value: str) -> None:
    """Raises DeltapatchError unless an option has one of its values."""
    if value not in _CHOICES[option]:
        raise DeltapatchError(f"{option} is one of {', '.join(_CHOICES[option])}, not '{value}'")


def _is_recipe(models: Sequence[str]) -> bool:
    name = models[0]
    is_text = name.endswith((".yaml", ".yml", ".json")) and not name.endswith(".index.json")
    return len(models) == 1 and (is_text or name.endswith(".safetensors"))


def _recipe_in(path: Path) -> "Recipe":
    from ..merging.patches import recipe_of_patch
    from ..merging.recipe import Recipe
    from ..patch import Patch

    found = recipe_of_patch(Patch.load(path)) if is_patch(str(path)) else Recipe.read(path)
    # A file never makes a Python file run; such a base has to be named on the command line.
    return found.model_copy(update={"base": ""}) if ".py:" in found.base else found


def _images(source: str) -> "ImageSet":
    import numpy as np

    from ..data import list_images, open_data, open_images

    path = Path(source).expanduser()
    if path.is_dir() and not any(path.glob("*.parquet")):
        inner = path / "train"
        images = open_images(list_images([inner if inner.is_dir() else path]))
    else:
        task = open_data(source, validation=0)
        found = next(
            (split for split in (task.train, task.val, task.test) if split is not None and len(split)), None
        )
        if found is None:
            raise DeltapatchError(f"{task.name} has no images")
        images = found
    chosen = np.random.default_rng(0).permutation(len(images))[:MOST_IMAGES]
    return images.subset(np.sort(chosen))
