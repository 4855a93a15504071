"""``deltapatch rank``: which base to patch for these images."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Workers

EXAMPLE = (
    "deltapatch rank photos/ --bases timm/resnet50.a1_in1k,torchvision/mobilenet_v2,own.toml --out ranked"
)


def command(
    data: Annotated[
        str, typer.Argument(help="Class-per-folder tree, .npz, Parquet, or a hub data set's name.")
    ],
    bases: Annotated[
        str,
        typer.Option(
            help="With commas between them, as --base of fit; a name that ends in .toml is a file with one"
            " [[base]] for each base.",
            show_default=False,
        ),
    ],
    scores: Annotated[
        str | None, typer.Option(help="With commas between them; all: every score.", show_default=False)
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Score the end of each stage too.")] = False,
    probe: Annotated[int, typer.Option(help="Training images to look at.")] = 500,
    draws: Annotated[int, typer.Option(help="Random halves of them, for ties and stability.")] = 10,
    seed: Annotated[int, typer.Option(help="Of probe and halves.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A folder for tables and picture.", show_default=False)
    ] = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    workers: Workers = 0,
    history: Annotated[bool, typer.Option(help="Show what is expected from known results.")] = True,
    progress: Annotated[bool, typer.Option(help="Draw a table of how far it is.")] = True,
) -> None:
    """Rank bases by how well a patch on each is expected to do, from one pass over some of the images."""
    from rich.console import Console

    from ..errors import DeltapatchError
    from ..evaluation.comparing.writing import check_parquet
    from ..selection.history.prior import History
    from ..selection.ranking.candidates import parse_candidates
    from ..selection.ranking.files import prepare_folder, write_ranking
    from ..selection.ranking.rank_bases import rank
    from ..selection.ranking.table import LiveRanking, as_layer_table, as_table, problems, summary
    from ..selection.score import ranking_scores

    if out is not None:
        check_parquet()
        prepare_folder(out)
    wanted = None if scores is None else [name.strip() for name in scores.split(",")]
    with LiveRanking(progress) as live:
        ranking = rank(
            data,
            parse_candidates(bases),
            list(ranking_scores()) if wanted == ["all"] else wanted,
            layers=layers,
            probe=probe,
            draws=draws,
            seed=seed,
            device=device,
            batch_size=batch_size,
            workers=workers,
            # Of the published pools, the one of torchvision's networks; several together rank worse than one.
            history=History.carried("supervised") + History.read() if history else None,
            watch=live,
        )
    console = Console(width=None if Console().is_terminal else 1000)  # in a file no column is cut
    if ranking.best is not None:
        console.print(as_table(ranking))
        if any(row.layers for row in ranking.rows):
            console.print(as_layer_table(ranking))
    typer.echo(summary(ranking))
    for sentence in problems(ranking):
        typer.echo(f"left out: {sentence}", err=True)
    for sentence in ranking.warnings:
        typer.echo(f"warning: {sentence}", err=True)
    if out is not None:
        typer.echo(f"wrote {', '.join(str(out / name) for name in write_ranking(ranking, out))}")
    if ranking.interrupted:
        typer.echo("interrupted; the bases above are those that were done", err=True)
        raise KeyboardInterrupt
    if ranking.best is None:
        raise DeltapatchError("no base could be ranked; the reasons are above")
