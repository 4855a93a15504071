"""``deltapatch fit``: a patch and its report from a folder of labelled images."""

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
    fit_config,
)
from .options import (
    BaseClasses,
    BaseSource,
    Device,
    Mean,
    Size,
    Std,
    Weights,
    Workers,
    open_base,
    open_method,
)

if TYPE_CHECKING:
    from ..base import Base
    from ..data import ImageSet, TaskData
    from ..evaluation.comparing import Budget
    from ..fitting.config import FitConfig
    from ..fitting.fit import FitResult

EXAMPLE = "deltapatch fit photos/ --base timm/resnet50.a1_in1k --out birds.safetensors"


def command(
    data: Annotated[
        str, typer.Argument(help="Class-per-folder tree, .npz, Parquet, or a hub data set's name.")
    ],
    base: BaseSource,
    out: Annotated[Path, typer.Option(help="The patch file; the report stands beside it as .html.")],
    method: Annotated[
        str, typer.Option(help="Kind of patch: delta, head, ...; auto tries all of them.")
    ] = "delta",
    modules: Annotated[
        str | None,
        typer.Option(help="How many stages are patched, from the last; or all.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Method option as KEY=VALUE.", show_default=False),
    ] = None,
    budget_parameters: Annotated[
        int | None,
        typer.Option(help="For auto: leave out larger patches, heads not counted.", show_default=False),
    ] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(help="For auto: how long to look.", show_default=False)
    ] = None,
    budget_milliseconds: Annotated[
        float | None,
        typer.Option(help="For auto: leave out slower patches; time of an image.", show_default=False),
    ] = None,
    supporting: Annotated[
        str | None,
        typer.Option(
            help="For interpolate: labelled images of the base's own task, to weigh against the new one.",
            show_default=False,
        ),
    ] = None,
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
    feature_noise: Annotated[
        float, typer.Option(help="Noise on trunk activations, relative to theirs.")
    ] = 0.0,
    cache: CacheUse = "auto",
    cache_dtype: Annotated[str, typer.Option(help="How they are kept: bf16, fp32 or int8.")] = "bf16",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile, for long fits.")] = False,
    balance: Balance = False,
    patience: Patience = 10,
    precision: PrecisionName = "auto",
    on_bad: Annotated[str, typer.Option(help="Unreadable images: skip or fail.")] = "skip",
    validation: ValidationShare = 0.2,
    seed: int = 0,
    workers: Workers = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a kill, to the same result.")] = False,
    track: Annotated[
        list[str] | None, typer.Option(help="Tracker: tensorboard, mlflow, wandb ...", show_default=False)
    ] = None,
    progress: Annotated[bool, typer.Option(help="Draw a progress bar.")] = True,
    licence: Annotated[str, typer.Option(help="Written into the file.")] = "",
    author: Annotated[str, typer.Option(help="Written into the file.")] = "",
    note: Annotated[str, typer.Option(help="Written into the file.")] = "",
) -> None:
    """Fit a patch on labelled images and write it with a report of what it is worth."""
    from ..data import open_data
    from ..errors import DeltapatchError
    from ..evaluation.comparing import Budget
    from ..evaluation.metrics import paired_difference
    from ..evaluation.wording import comparison, summary
    from ..evaluation.worth import measure, with_figures, write_fit_report
    from ..fitting.fit import fit_task

    config = fit_config(
        patience,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        augment=augment,
        views=views,
        feature_noise=feature_noise,
        cache=cache,
        cache_dtype=cache_dtype,
        compile=compile,
        balance=balance,
        precision=precision,
        on_bad=on_bad,
        validation=validation,
        seed=seed,
        workers=workers,
    )
    budget = Budget(budget_parameters, budget_minutes, budget_milliseconds)
    is_auto = method == "auto"
    _check_auto(is_auto, budget, bool(option or modules or resume or track or supporting))
    chosen = None if is_auto else open_method(method, option or [], modules)
    if chosen is not None and supporting is not None and not chosen.shares_weights:
        raise DeltapatchError(
            "--supporting is for methods that change the weights with which the base answers, such as"
            f" interpolate, and {method} keeps them; leave it out"
        )
    _check_target(out)
    opened = open_base(base, weights, classes, size, mean, std, device)
    task = open_data(data, validation=validation, seed=seed)
    if chosen is None:
        result = _choose(opened, task, config, budget, progress)
    else:
        result = fit_task(
            opened,
            task,
            chosen,
            config,
            checkpoint=out.with_name(out.name + ".checkpoint"),
            resume=resume,
            progress=progress,
            track=track or (),
            supporting=None if supporting is None else _supporting_images(opened, supporting),
        )
    patch = result.patch
    patch.info = patch.info.model_copy(update={"licence": licence, "author": author, "note": note})
    # First of all the work that was done is made safe; figures are added once they are known.
    patch.save(out)
    for bad in result.bad_images:
        typer.echo(f"left out: {bad.path}: {bad.reason}", err=True)
    if result.interrupted:
        typer.echo(f"interrupted after {len(result.history)} epochs; go on with --resume", err=True)
    worth = measure(opened, task, result, workers)
    if worth is None:
        typer.echo(f"wrote {out}; there are no images to evaluate it on")
        return
    with_figures(patch, worth)
    patch.save(out)
    page = out.with_suffix(".html")
    write_fit_report(page, opened, task, result, worth, out.stat().st_size)
    for warning in worth.warnings:
        typer.echo(f"warning: {warning}", err=True)
    compared = paired_difference(worth.patch, worth.head_only)
    typer.echo(f"{summary(worth.patch, worth.split)} {comparison(worth.head_only, compared)}")
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB) and {page}")


def _check_auto(is_auto: bool, budget: "Budget", is_specific: bool) -> None:
    """Options that would have no effect are refused."""
    from ..errors import DeltapatchError
    from ..evaluation.comparing import Budget

    if is_auto and is_specific:
        raise DeltapatchError(
            "--method auto chooses the method and its options and fits many of them; leave out --modules,"
            " --option, --resume, --track and --supporting"
        )
    if not is_auto and budget != Budget():
        raise DeltapatchError("the budgets are for --method auto; give that, or leave them out")


def _supporting_images(base: "Base", source: str) -> "ImageSet | None":
    """What a method may choose by; images to measure the base's own task on are left alone."""
    from ..data import open_data
    from ..evaluation.protocols import Supporting

    return Supporting.of(base, open_data(source, validation=0)).validation


def _choose(
    base: "Base", task: "TaskData", config: "FitConfig", budget: "Budget", progress: bool
) -> "FitResult":
    """The fit of the best method, with the ranking printed."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.comparing import choose_method
    from ..evaluation.comparing.contenders import describe
    from ..evaluation.wording import duration, percent

    def tell(line: str) -> None:
        if progress:
            typer.echo(line, err=True)

    choice = choose_method(base, task, config, budget, tell=tell)
    table = Table("method", "validation", "parameters", "epochs", "time of the fit")
    for one in choice.ranking:
        table.add_row(
            describe(one.method),
            percent(one.accuracy),
            f"{one.parameters:,}",
            str(one.epochs),
            duration(one.result.seconds),
        )
    Console().print(table)
    for name, reason in choice.left_out:
        typer.echo(f"left out: {name}: {reason}", err=True)
    typer.echo(f"{choice.by} The validation figure of the best of several is optimistic.")
    return choice.result


def _check_target(out: Path) -> None:
    """An output that cannot be written is told before the work; what a killed run left half-written goes."""
    from tempfile import TemporaryFile

    from ..errors import DeltapatchError
    from ..file import sweep_temporary_files

    if out.is_dir() or not out.parent.is_dir():
        raise DeltapatchError(
            f"{out}: the patch cannot be written there; give a file name in a folder that exists"
        )
    try:
        TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise DeltapatchError(
            f"{out}: the patch cannot be written there ({error.strerror}); choose another folder"
        ) from error
    sweep_temporary_files(out.parent)
    if out.suffix != ".safetensors":
        raise DeltapatchError(f"{out}: a patch file ends in .safetensors")
