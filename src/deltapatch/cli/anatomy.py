"""``deltapatch anatomy``: where a base can be patched, and what that would cost."""

from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Mean, Size, Std, Weights, open_base

if TYPE_CHECKING:
    from ..base import Base

EXAMPLE = "deltapatch anatomy timm/resnet50 --weights random"


def command(
    base: Annotated[str, typer.Argument(help="timm/NAME, torchvision/NAME, FILE.py:FUNCTION, or demo.")],
    weights: Weights = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
) -> None:
    """Show a base's stages, sub-blocks and joins, and the cost of Δ-modules in parameters and
    multiply-adds.
    """
    from rich.console import Console
    from rich.table import Table

    opened = open_base(base, weights, None, size, mean, std, device="cpu")
    anatomy = opened.anatomy
    stages = Table(
        "stage", "sub-blocks", "join", "channels", "layout", "skips", title=f"{opened.name}: stages"
    )
    for stage in anatomy.stages:
        joins = sorted({_join(s.join.addition, s.join.has_shortcut) for s in stage.sub_blocks})
        channels = f"{stage.in_channels} -> {stage.channels}" if stage.projects else str(stage.channels)
        stages.add_row(
            stage.path, str(len(stage.sub_blocks)), ", ".join(joins), channels, stage.layout, str(stage.skips)
        )
    console = Console(width=None if Console().is_terminal else 120)
    if anatomy.stages:
        console.print(stages)
        console.print(_costs(opened))
    else:
        console.print(
            f"{opened.name}: no stage was found; only methods that need none, such as head, can patch it"
        )
    head = anatomy.head
    console.print(f"classifier: {head.path or 'none, the output itself'} ({head.features} features)")


def _join(addition: int | None, has_shortcut: bool) -> str:
    if addition is not None:
        return f"addition {addition + 1}"
    return "output" if has_shortcut else "output, no skip yet"


def _costs(base: "Base"):
    """What Δ-modules add to the base: a row for each number of modules and kind, light and published."""
    from rich.table import Table
    from torch.utils.flop_counter import FlopCounterMode

    from ..methods.delta import Delta
    from ..patched import PatchedModel

    example = base.example(2)
    with FlopCounterMode(display=False) as plain, base.freezer.frozen():
        base.module(example)
    whole = plain.get_total_flops() / 4  # two images, and a multiply-add counts as two
    table = Table(
        "modules",
        "kind",
        "parameters",
        "multiply-adds an image",
        "share of the base's",
        title="cost of delta patches",
    )
    count = len(base.anatomy.stages)
    for modules, kind in product(range(1, count + 1), ("light", "published")):
        patch = Delta(modules=modules, norm="module", start="plain", module=kind).build(base)
        model = PatchedModel(base)
        model.add_patch("cost", patch)
        with FlopCounterMode(display=False) as patched, model.active("cost"):
            base.module(example)
        added = patched.get_total_flops() / 4 - whole
        name = f"{modules} (all)" if modules == count else str(modules)
        table.add_row(
            name, kind, f"{patch.num_parameters():,}", f"{added / 1e6:,.1f} M", f"{added / whole:.1%}"
        )
    return table
