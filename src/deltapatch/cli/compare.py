"""``deltapatch compare``: which method for these images on this base."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .fit_options import (
    AugmentName,
    Balance,
    CacheUse,
    LearningRate,
    Patience,
    PrecisionName,
    ValidationShare,
    Views,
    checked,
    fit_config,
)
from .options import BaseClasses, BaseSource, Device, Mean, Size, Std, Weights, Workers, open_base

if TYPE_CHECKING:
    from ..evaluation.comparing import Comparison

EXAMPLE = (
    "deltapatch compare birds/ cars/ --base timm/resnet50.a1_in1k --methods 'head,norm,delta:modules=1|all'"
    " --out compared"
)


def command(
    data: Annotated[
        list[str], typer.Argument(help="One or more: class-per-folder tree, .npz, Parquet, hub data set.")
    ],
    base: BaseSource,
    out: Annotated[Path, typer.Option(help="A folder for tables, page, patches and finished jobs.")],
    methods: Annotated[
        str,
        typer.Option(
            help="With commas between them, as NAME or NAME:OPTION=VALUE; + between options, | between"
            " values of which validation chooses; all: every method."
        ),
    ] = "all",
    seeds: Annotated[int, typer.Option(help="Fits of each method.")] = 5,
    budget_minutes: Annotated[
        float | None,
        typer.Option(help="Drop variants and seeds that take longer in all.", show_default=False),
    ] = None,
    budget_parameters: Annotated[
        int | None, typer.Option(help="Leave out larger patches, heads not counted.", show_default=False)
    ] = None,
    protocols: Annotated[
        str, typer.Option(help="single, joint, sequential, parallel; with commas between them.")
    ] = "single",
    supporting: Annotated[
        str | None,
        typer.Option(
            help="Labelled images of the base's own task. The test images are measured; interpolate chooses"
            " by the validation images.",
            show_default=False,
        ),
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(help="Per cent of the training images, such as 15,30,50,100.", show_default=False),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="So many training images a class.", show_default=False)
    ] = None,
    select: Annotated[
        str, typer.Option(help="What chooses epoch and variant: validation, or test as in the papers.")
    ] = "validation",
    weights: Weights = None,
    classes: BaseClasses = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    epochs: int = 30,
    batch_size: int = 32,
    learning_rate: LearningRate = None,
    augment: AugmentName = "none",
    views: Views = None,
    cache: CacheUse = "auto",
    balance: Balance = False,
    patience: Patience = 10,
    precision: PrecisionName = "auto",
    validation: ValidationShare = 0.2,
    workers: Workers = 0,
    progress: Annotated[bool, typer.Option(help="Draw a table of how far it is.")] = True,
    history: Annotated[
        bool, typer.Option(help="Note what this base reached, for rankings of bases on other images.")
    ] = True,
) -> None:
    """Compare methods on images and seeds. The same command goes on after a kill, or with more seeds."""
    from ..evaluation.comparing import Budget, ComparisonConfig, compare, parse_contenders
    from ..evaluation.comparing.writing import as_markdown, check_parquet

    check_parquet()
    fields = {
        "seeds": seeds,
        "protocols": [name.strip() for name in protocols.split(",")],
        "shares": _whole_numbers(shares),
        "few_shot": few_shot,
        "selection": select,
    }
    config = checked(ComparisonConfig, fields, {"selection": "--select"})
    fit = fit_config(
        patience,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        augment=augment,
        views=views,
        cache=cache,
        balance=balance,
        precision=precision,
        validation=validation,
        workers=workers,
    )
    budget = Budget(parameters=budget_parameters, minutes=budget_minutes)
    contenders = parse_contenders(methods)
    opened = open_base(base, weights, classes, size, mean, std, device)
    try:
        found = compare(
            opened,
            data,
            contenders,
            out,
            config,
            fit,
            budget,
            supporting=supporting,
            weights=weights,
            progress=progress,
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; finished fits are kept in {out}, and the same command goes on", err=True)
        raise
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(as_markdown(found))
    files = ("results.parquet", "results.md", "report.html", "settings.json")
    typer.echo(f"wrote {', '.join(str(out / name) for name in files)}")
    if history:
        _remember(found)


def _remember(found: "Comparison") -> None:
    from ..errors import DeltapatchError
    from ..selection.history.file import append, own_history_path
    from ..selection.history.remembering import records_of

    path, records = own_history_path(), records_of(found)
    if not records:
        typer.echo(
            "history: nothing to note, since no patch was fitted on all images and chosen by validation"
        )
        return
    try:
        added = append(records, path)
    except DeltapatchError as error:
        typer.echo(f"warning: the history was not added to: {error}", err=True)
        return
    typer.echo(f"history: {added} of {len(records)} results are new in {path}")


def _whole_numbers(text: str | None) -> tuple[int, ...]:
    from ..errors import DeltapatchError

    try:
        return () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DeltapatchError(
            f"--shares takes whole numbers with commas between them, not '{text}'"
        ) from None
