"""``deltapatch diagnose``: what a patch did to its base's weights and features."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import BaseClasses, Device, OptionalBaseSource, Weights, Workers, open_base_of

if TYPE_CHECKING:
    from rich.table import Table

    from ..selection.diagnosing.drift import FeatureDrift
    from ..selection.diagnosing.weights import WeightChanges

EXAMPLE = "deltapatch diagnose birds.safetensors --data photos/ --out birds.png"


def command(
    patch: Annotated[Path, typer.Argument(help="A patch file.")],
    base: OptionalBaseSource = None,
    weights: Weights = None,
    classes: BaseClasses = None,
    device: Device = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to compare features on, at most 500 of them; labels are not needed.",
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        Path | None,
        typer.Option(help="Weights that the base's training began from; else estimated.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path("diagnosis.png"),
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    workers: Workers = 0,
) -> None:
    """Show how far a patch moved its base's weights, layer by layer, and its features, stage by stage."""
    from rich.console import Console

    from ..patch import Patch
    from ..selection.diagnosing import diagnose
    from ..selection.diagnosing.drift import some_images
    from ..selection.diagnosing.picture import check_picture, draw_diagnosis

    check_picture(out)
    loaded = Patch.from_pretrained(patch)
    opened = open_base_of(loaded, base, weights, classes, device)
    images = None if data is None else some_images(data)
    found = diagnose(opened, loaded, images, random=random, batch_size=batch_size, workers=workers)
    draw_diagnosis(found, f"{patch.name}: {loaded.method.name} on {opened.name}", out)
    console = Console(width=None if Console().is_terminal else 120)
    lines: list[str] = []
    if found.weights is None:
        lines.append(f"a {loaded.method.name} patch changes no weights of its base")
    else:
        console.print(_weights_table(found.weights))
        lines += _said_of_weights(found.weights)
    if found.drift is not None:
        console.print(_drift_table(found.drift))
        lines += [f"note: {note}" for note in found.drift.notes]
    else:
        lines.append("for the drift of features, give images with --data")
    for line in (*lines, f"picture: {out}"):
        typer.echo(line)


def _weights_table(weights: "WeightChanges") -> "Table":
    from rich.table import Table

    table = Table("layer", "kind", "changed", title="weights, by layer")
    table.add_column("relative distance", justify="right")
    table.add_column("T", justify="right")
    for layer in weights.layers:
        transferability = "" if layer.transferability is None else f"{layer.transferability:.2f}"
        names = ", ".join(name.removeprefix("running_") for name in layer.tensors)
        table.add_row(layer.path, layer.kind, names, f"{layer.relative:.4f}", transferability)
    return table


def _said_of_weights(weights: "WeightChanges") -> list[str]:
    lines = [f"{weights.unchanged} other layers are as in the base"] if weights.unchanged else []
    if weights.transferability is None:
        lines.append("no weight of a convolution or linear layer moved, so there is no T")
    else:
        lines.append(
            f"T = {weights.transferability:.2f}, the mean of its column: how much closer to the patched"
            " weights the pre-trained ones are than random ones"
        )
    return lines + [f"note: {note}" for note in weights.notes]


def _drift_table(drift: "FeatureDrift") -> "Table":
    from rich.table import Table

    unreadable = f", {drift.unreadable} could not be read" if drift.unreadable else ""
    table = Table("at the end of", title=f"features of {drift.images} images{unreadable}")
    table.add_column("relative distance", justify="right")
    table.add_column("linear CKA", justify="right")
    for place in drift.places:
        cka = "none" if place.cka is None else f"{place.cka:.4f}"
        table.add_row(place.name, f"{place.relative:.4f}", cka)
    return table
