"""``deltapatch merge``: several models of one architecture, or patches of one base, into one."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeltapatchError
from .merge_options import (
    Architecture,
    Dtype,
    EpochsOfDistillation,
    Evaluated,
    HeadsName,
    ImageFolders,
    LeastAgreement,
    MergeBase,
    MergeName,
    MergeOption,
    MixedDtypes,
    Models,
    Output,
    Picture,
    Skip,
    StorageName,
    SweepText,
    Threads,
    check_choice,
    images_of,
    is_patch,
    read_recipe,
)
from .options import BaseClasses, Device, Mean, Size, Std, Weights, open_base, open_base_of

if TYPE_CHECKING:
    from ..data import ImageSet
    from ..merging.contests import Contest, LabelledImages
    from ..merging.recipe import Recipe
    from ..merging.running import RunOptions
    from ..merging.sweeping import Sweep

EXAMPLE = (
    "deltapatch merge birds.safetensors cars.safetensors --method ties --base base.safetensors"
    " --skip 'fc.*' --out both.safetensors"
)


def command(
    models: Models,
    method: MergeName = None,
    option: MergeOption = None,
    base: MergeBase = None,
    skip: Skip = None,
    out: Output = None,
    images: ImageFolders = None,
    evaluate: Evaluated = None,
    sweep: SweepText = None,
    picture: Picture = None,
    architecture: Architecture = None,
    heads: HeadsName = "own",
    agreement: LeastAgreement = 0.9,
    epochs: EpochsOfDistillation = 5,
    storage: StorageName = "fp32",
    dtype: Dtype = "",
    mixed_dtypes: MixedDtypes = False,
    weights: Weights = None,
    classes: BaseClasses = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    threads: Threads = None,
    progress: Annotated[bool, typer.Option(help="Draw a progress bar.")] = True,
) -> None:
    """Merge fine-tuned models, or patches of one base, into one; or do what a recipe says."""
    from ..merging.sweeping import Sweep

    recipe = read_recipe(models, method, option or [], base, tuple(skip or ()), dtype, mixed_dtypes)
    swept = None if sweep is None else Sweep.parse(sweep)
    if swept is not None:
        swept.at(recipe.how, swept.values[0])
    _check_request(out, evaluate or [], swept, picture)
    check_choice("--heads", heads)
    check_choice("--storage", storage)
    patches = [is_patch(model) for model in recipe.models]
    if any(patches) and not all(patches):
        raise DeltapatchError(
            f"{recipe.models[patches.index(False)]} is no patch, and {recipe.models[patches.index(True)]} is"
            " one; merge models with models, or patches with patches"
        )
    job = _Job(recipe, out, images or [], evaluate or [], swept, picture, threads, progress)
    if patches[0]:
        if architecture or size or mean or std or dtype:
            raise DeltapatchError(
                "--architecture, --size, --mean, --std and --dtype are for models that are no patches; a"
                " patch names its base, or give --base"
            )
        _merge_patches(job, weights, classes, device, heads, agreement, epochs, storage)
        return
    if (heads, storage) != ("own", "fp32") or weights or classes:
        raise DeltapatchError("--heads, --storage, --weights and --classes are for patches; leave them out")
    if (job.images or job.evaluate) and architecture is None:
        raise DeltapatchError(
            "--images and --evaluate run the models; give --architecture, such as timm/resnet50"
        )
    make = _maker(architecture, size, mean, std, device)
    _merge_checkpoints(job, make)


@dataclass(frozen=True)
class _Job:
    """What is asked for, whatever is merged."""

    recipe: "Recipe"
    out: Path | None
    images: "Sequence[str]"
    evaluate: "Sequence[str]"
    sweep: "Sweep | None"
    picture: Path | None
    threads: int | None
    progress: bool

    def run(self) -> "RunOptions":
        from ..merging.running import RunOptions

        recipe = self.recipe
        return RunOptions(recipe.skip, recipe.torch_dtype, recipe.mixed_dtypes, self.threads)


def _merge_checkpoints(job: _Job, make: Callable[[int | None], Any]) -> None:
    from ..merging.contests import CheckpointContest
    from ..merging.gathering.batches import ImageBatches
    from ..merging.gathering.norm_statistics import re_estimate_file
    from ..merging.running import merge
    from ..merging.sources import open_source

    recipe, run = job.recipe, job.run()
    sets = images_of(job.images)
    contest = CheckpointContest(make, recipe.models, recipe.base or None, run, sets)
    recipe = _with_best(job, contest)
    result: Any = None
    if job.out is not None:
        with _merging_bar(job.progress, contest.sources[0].specs) as advance:
            merge(recipe.how, contest.sources, contest.base, job.out, replace(run, progress=advance))
        if sets:
            made = contest.architecture_for(open_source(job.out))
            re_estimate_file(job.out, made.module, ImageBatches(sets, made))
        result = open_source(job.out)
    _print_accuracies(job, contest, recipe, result)
    _say_written(job.out)


def _merge_patches(
    job: _Job,
    weights: str | None,
    classes: str | None,
    device: str | None,
    heads: Any,
    agreement: float,
    epochs: int,
    storage: Any,
) -> None:
    from ..merging.contests import PatchContest
    from ..merging.distilling import Check
    from ..merging.patches import merge_patches
    from ..patch import Patch

    recipe, run = job.recipe, job.run()
    first = Patch.load(recipe.models[0])
    base = open_base_of(first, recipe.base or None, weights, classes, device)
    names = [Path(model).stem for model in recipe.models]
    sets = _one_for_each(images_of(job.images), len(names))
    loaded = dict(zip(names, [Patch.load(model).to(base.device) for model in recipe.models], strict=True))
    contest = PatchContest(base, loaded, run, heads, sets or None)
    recipe = _with_best(job, contest)
    result = merge_patches(
        base,
        recipe.models,
        recipe.how,
        heads=heads,
        images=sets or None,
        check=Check(agreement=agreement, epochs=epochs),
        storage=storage,
        out=job.out,
        run=run,
        progress=job.progress,
    )
    for name, patch in result.items():
        figures = patch.info.figures
        agreed = [
            f"{key.rpartition('/')[2]} {value:.1%}" for key, value in figures.items() if "/agreement/" in key
        ]
        taught = int(figures.get("merge/distillation/epochs", 0))
        if agreed:
            how = f", after {taught} epochs of distillation" if taught else ""
            typer.echo(f"{name}: answers as its inputs do on {', '.join(agreed)} of their images{how}")
    _print_accuracies(job, contest, recipe, result)
    _say_written(job.out)


def _with_best(job: _Job, contest: "Contest") -> "Recipe":
    """The recipe with the best value of the sweep, where there is one, which is drawn too."""
    from ..merging.sweeping import draw_sweep, run_sweep

    tasks = _tasks(job, validation=True)
    if tasks:
        contest.check_tasks(len(tasks))
    if job.sweep is None:
        return job.recipe
    picture = job.picture or (job.out or Path("sweep.png")).with_suffix(".png")
    with _bar(job.progress, f"sweep of {job.sweep.option}", len(job.sweep.values)) as advance:
        found = run_sweep(contest, job.recipe.how, job.sweep, tasks, lambda: advance(1))
    draw_sweep(found, f"{job.recipe.merge} of {len(job.recipe.models)} models", picture)
    rows = zip(job.sweep.values, found.accuracies, strict=True)
    _print_table(
        job.sweep.option, [(f"{value:g}", row) for value, row in rows], found.tasks, "validation images"
    )
    typer.echo(
        f"best: {job.sweep.option} = {found.best:g}, with {max(found.means):.1%} on average; {picture}"
    )
    return job.recipe.model_copy(update={"options": {**job.recipe.options, job.sweep.option: found.best}})


def _print_accuracies(job: _Job, contest: "Contest", recipe: "Recipe", result: Any) -> None:
    tasks = _tasks(job, validation=False)
    if not tasks:
        return
    models = {**contest.inputs, "merged": contest.merged(recipe.how) if result is None else result}
    with _bar(job.progress, "evaluating", len(models)) as advance:
        rows: list[tuple[str, tuple[float, ...]]] = []
        for name, model in models.items():
            rows.append((name, contest.row(model, tasks)))
            advance(1)
    _print_table("model", rows, [task.name for task in tasks], "accuracy")


def _tasks(job: _Job, validation: bool) -> "list[LabelledImages]":
    """What a sweep chooses by, or what accuracies are measured on; never the same images."""
    from ..data import open_data
    from ..merging.contests import LabelledImages

    found: list[LabelledImages] = []
    for data in job.evaluate:
        task = open_data(data, validation=0.2 if job.sweep is not None else 0)
        splits = (task.val,) if validation and job.sweep is not None else (task.test, task.train)
        if job.sweep is None:
            splits = (task.test, task.val, task.train)
        images = next((split for split in splits if split is not None and len(split)), None)
        if images is None:
            raise DeltapatchError(f"{task.name} has no {'validation' if validation else 'labelled'} images")
        found.append(LabelledImages(task.name, task.classes, images))
    return found


def _print_table(
    first: str, rows: "Sequence[tuple[str, tuple[float, ...]]]", tasks: "Sequence[str]", title: str
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(first, title=title)
    for name in (*tasks, *(["mean"] if len(tasks) > 1 else [])):
        table.add_column(name, justify="right")
    for name, values in rows:
        mean = [sum(values) / len(values)] if len(tasks) > 1 else []
        table.add_row(name, *(f"{value:.1%}" for value in (*values, *mean)))
    Console(width=None if Console().is_terminal else 1000).print(table)


def _maker(
    architecture: str | None, size: int | None, mean: str | None, std: str | None, device: str | None
) -> "Callable[[int | None], Any]":
    def make(classes: int | None) -> Any:
        assert architecture is not None
        return open_base(architecture, "random", None, size, mean, std, device, num_classes=classes)

    return make


def _one_for_each(sets: "list[ImageSet]", count: int) -> "list[ImageSet]":
    """One set of images may be for all patches."""
    return sets * count if len(sets) == 1 else sets


def _check_request(out: Path | None, evaluate: "Sequence[str]", sweep: Any, picture: Path | None) -> None:
    from ..selection.diagnosing.picture import check_picture

    if out is None and not evaluate:
        raise DeltapatchError("nothing would be left of the merge; give --out, or --evaluate")
    if sweep is not None and not evaluate:
        raise DeltapatchError("--sweep chooses by accuracy; give --evaluate with the data of each task")
    if picture is not None and sweep is None:
        raise DeltapatchError("--picture is for what --sweep finds; leave it out")
    if picture is not None:
        check_picture(picture)
    if out is not None and not out.absolute().parent.is_dir():
        raise DeltapatchError(f"{out}: nothing can be written there; give a name in a folder that exists")


def _say_written(out: Path | None) -> None:
    if out is not None:
        size = f" ({out.stat().st_size / 1e6:.2f} MB)" if out.is_file() else ""
        typer.echo(f"wrote {out}{size}")


@contextmanager
def _bar(shown: bool, label: str, total: int) -> "Generator[Callable[[int], None]]":
    """A bar on standard error; yields what to call with how much more is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, advance=done)


def _merging_bar(shown: bool, specs: Any) -> Any:
    return _bar(shown, "merging", sum(spec.elements for spec in specs.values() if spec.is_floating))
