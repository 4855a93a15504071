"""``deltapatch evaluate``: a patch's figures on labelled images."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from .options import BaseClasses, Device, OptionalBaseSource, PatchFile, Weights, Workers, open_base_of

if TYPE_CHECKING:
    from ..data import ImageSet, TaskData
    from ..patch import Patch

EXAMPLE = "deltapatch evaluate photos/ --patch birds.safetensors --split test"


def command(
    data: Annotated[
        str, typer.Argument(help="Class-per-folder tree, .npz, Parquet, or a hub data set's name.")
    ],
    patch: PatchFile,
    base: OptionalBaseSource = None,
    weights: Weights = None,
    classes: BaseClasses = None,
    device: Device = None,
    split: Annotated[str, typer.Option(help="test, val or train; left out: test, else all there is.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Workers = 0,
) -> None:
    """Say how well a patch does on labelled images, with 95 % intervals."""
    from ..data import open_data
    from ..evaluation.answers import evaluate
    from ..evaluation.wording import figure_rows
    from ..patch import Patch

    loaded = Patch.from_pretrained(patch)
    opened = open_base_of(loaded, base, weights, classes, device)
    # Everything that stands in a folder without splits is to be evaluated, so nothing is held out.
    task = open_data(data, validation=0)
    name, images = _split(task, split)
    evaluation = evaluate(
        opened, _in_classes_of(loaded, task, images), loaded, batch_size=batch_size, workers=workers
    )
    if as_json:
        typer.echo(json.dumps({"split": name, "images": len(evaluation.labels), **evaluation.figures(name)}))
        return
    typer.echo(f"{name}: {len(evaluation.labels)} images, {evaluation.skipped} could not be read")
    for row in figure_rows([evaluation]):
        typer.echo(f"  {row.name:<24} {row.values[0]}")


def _split(task: "TaskData", name: str) -> "tuple[str, ImageSet]":
    from ..errors import DeltapatchError

    splits = {"test": task.test, "val": task.val, "train": task.train}
    if name and name not in splits:
        raise DeltapatchError(f"--split is test, val or train, not '{name}'")
    for candidate in [name] if name else list(splits):
        images = splits[candidate]
        if images is not None and len(images):
            return candidate, images
    raise DeltapatchError(f"{task.name} has no {name or 'labelled'} images")


def _in_classes_of(patch: "Patch", task: "TaskData", images: "ImageSet") -> "ImageSet":
    """The same images with labels that count as the patch's classes do, matched by name."""
    from ..errors import DeltapatchError

    place = {name: index for index, name in enumerate(patch.classes)}
    unknown = [name for name in task.classes if name not in place]
    if unknown:
        raise DeltapatchError(
            f"{task.name} has the class '{unknown[0]}', which this patch does not know; its classes are"
            f" {', '.join(patch.classes[:8])}{' ...' if len(patch.classes) > 8 else ''}"
        )
    return images.with_labels([place[task.classes[label]] for label in images.labels])
