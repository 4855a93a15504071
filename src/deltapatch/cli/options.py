"""Options that several commands share, and how they become a base or a method."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeltapatchError

if TYPE_CHECKING:
    from ..base import Base
    from ..method import Method
    from ..patch import Patch

BaseSource = Annotated[
    str,
    typer.Option(
        "--base",
        help="timm/NAME, torchvision/NAME, open_clip/ARCHITECTURE/TAG, FILE.py:FUNCTION, or demo.",
        show_default=False,
    ),
]
OptionalBaseSource = Annotated[
    str | None,
    typer.Option("--base", help="The base; left out, the one that the patch names.", show_default=False),
]
Weights = Annotated[
    str | None,
    typer.Option(help="The base's weights: a .safetensors or .pth file, or 'random'.", show_default=False),
]
BaseClasses = Annotated[
    str | None,
    typer.Option(
        help="The base's classes: a text file, one a line, or imagenet1k. open_clip needs them.",
        show_default=False,
    ),
]
Size = Annotated[int | None, typer.Option(help="Input height and width in pixels.", show_default=False)]
Mean = Annotated[
    str | None, typer.Option(help="Mean of pixels in 0..1, as in 0.485,0.456,0.406.", show_default=False)
]
Std = Annotated[
    str | None, typer.Option(help="Standard deviation, as in 0.229,0.224,0.225.", show_default=False)
]
Device = Annotated[
    str | None, typer.Option(help="Where to compute, such as cpu or cuda.", show_default=False)
]
PatchFile = Annotated[Path, typer.Option("--patch", help="A patch file.", show_default=False)]
Workers = Annotated[int, typer.Option(help="Processes that decode images.")]


def open_base(
    source: str,
    weights: str | None,
    classes: str | None,
    size: int | None,
    mean: str | None,
    std: str | None,
    device: str | None,
    num_classes: int | None = None,
) -> "Base":
    """The base that the options name; with another number of classes where that is given."""
    from ..loading import load_base

    return load_base(
        source,
        weights=weights,
        classes=classes,
        num_classes=num_classes,
        size=size,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        device=device or _best_device(),
    )


def open_base_of(
    patch: "Patch", source: str | None, weights: str | None, classes: str | None, device: str | None
) -> "Base":
    """The base of a patch: the one named on the command line, else the one it was fitted on where that is a
    name.

    A patch file never makes a Python file run: such a base has to be named. So has one that is made from the
    names of its classes, which are not in the file.
    """
    from ..loading import load_base

    recorded, preprocessing = patch.info.base.source, patch.info.preprocessing
    if source is None and recorded.startswith("open_clip/"):
        raise DeltapatchError(
            f"this patch was fitted on base {patch.info.base.name} ({recorded}), which is made from the names"
            " of its classes; give --base and --classes as for the fit"
        )
    if source is None and not (recorded.startswith(("timm/", "torchvision/")) or recorded == "demo"):
        raise DeltapatchError(
            f"this patch was fitted on base {patch.info.base.name} ({recorded or 'a module in memory'}),"
            " which is not loaded on a file's word; give --base"
        )
    base = load_base(
        recorded if source is None else source,
        weights=weights,
        classes=classes,
        size=preprocessing.input_size[1:],
        mean=preprocessing.mean,
        std=preprocessing.std,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        device=device or _best_device(),
    )
    patch.check_base(base)
    return base


def open_method(name: str, options: list[str], modules: str | None) -> "Method":
    """The method with its options, given as KEY=VALUE."""
    from ..method import make_method, parse_option

    values: dict[str, Any] = {}
    for option in [*options, *([] if modules is None else [f"modules={modules}"])]:
        key, value = parse_option(option)
        values[key] = value
    return make_method(name, values)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DeltapatchError(f"{option} takes numbers with commas between them, not '{text}'") from None


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
