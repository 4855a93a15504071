"""``deltapatch demo``: the whole idea in two minutes, without a network or a download."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "deltapatch demo"


def command(
    out: Annotated[Path, typer.Option(help="Folder for patches and report.")] = Path("demo-output"),
) -> None:
    """Patch a small base that reads printed characters to handwritten digits; compare with fine-tuning."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..demo.tour import run_demo
    from ..evaluation.wording import file_size, percent

    # Layers this small gain nothing from more threads, and lose much where something else runs beside them.
    torch.set_num_threads(1)
    console = Console(width=None if Console().is_terminal else 110)
    console.print(
        "Base: a ResNet of 0.7 M parameters that reads 47 printed characters. New task: handwritten digits."
    )
    tour = run_demo(out, note=lambda line: console.print(f"  {line} ..."))
    table = Table("", "new task", "old task", "old answers", "trainable", "file", "seconds")
    for row in tour.rows:
        fitted = row.parameters > 0
        table.add_row(
            row.way,
            "-" if row.new_task is None else percent(row.new_task),
            f"{100 * row.old_task:.2f} %",
            "bit-identical" if row.unchanged else "changed",
            f"{row.parameters:,}" if fitted else "-",
            file_size(row.bytes) if fitted else "-",
            f"{row.seconds:.1f}" if fitted else "-",
        )
    console.print(table)
    console.print(f"Patch:  {tour.patch}\nReport: {tour.report}  (open it in a browser)")
    console.print("Next:")
    for line in (
        f"deltapatch inspect {tour.patch}",
        f"deltapatch verify {tour.patch}",
        "deltapatch anatomy timm/resnet50 --weights random",
        "deltapatch fit PHOTOS/ --base timm/resnet50.a1_in1k --out photos.safetensors",
    ):
        console.print(f"  {line}", highlight=False)
