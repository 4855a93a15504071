"""Methods × tasks × seeds: plans the jobs, does those that are not done yet, writes down what came out."""

from collections.abc import Sequence
from pathlib import Path

from ...base import Base
from ...data import TaskData, open_data
from ...errors import DataError, DeltapatchError
from ...file import sweep_temporary_files
from ...fitting.config import FitConfig
from ..protocols import Supporting
from .budget import Budget
from .contenders import Contender, describe, parse_contenders
from .job import BaseOptions, DataSource
from .ledger import Row, read_row
from .live import LiveTable
from .planning import ComparisonConfig, Planned, expected_seconds, plan
from .result import Comparison
from .running import run_job
from .writing import check_parquet, write_comparison


def compare(
    base: Base,
    data: Sequence[str | Path],
    methods: str | Sequence[Contender],
    folder: str | Path,
    config: ComparisonConfig | None = None,
    fit: FitConfig | None = None,
    budget: Budget | None = None,
    *,
    supporting: str | Path | None = None,
    weights: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Compares patch methods on tasks and seeds, and writes tables, page and patches into a folder.

    What is done stays done: after a kill, or with more methods or seeds, the same call goes on, and a second
    call of a finished comparison fits nothing. All seeds have the same validation images. Of the variants of
    a method the one with the best mean validation accuracy is chosen for each task, and only its test figures
    enter the tables.

    With a budget of minutes the first seed of every method is done in any case; then other variants and
    seeds, until the next job would not fit, going by the time that earlier ones took. What is not done is
    named.

    Args:
        base: the frozen model.
        data: one or more sets of labelled images, as `open_data` takes them.
        methods: as `parse_contenders` reads them, or contenders.
        folder: where everything is written; made if missing.
        config: seeds, protocols and amounts of training images.
        fit: how each patch is fitted.
        budget: methods over its parameters or milliseconds are not fitted.
        supporting: labelled images of the base's own task, as `Supporting.of` divides them.
        weights: what the base was loaded with, noted so that jobs can be done on other machines.
        progress: whether to draw a table that shows how far it is.

    Raises:
        DataError: images cannot be read, or a task lacks the splits that are needed.
        DeltapatchError: a method or option is not known, or pyarrow is not installed.
        KeyboardInterrupt: the user ended it; finished jobs are kept.

    Example:
        >>> found = compare(base, ["birds/", "cars/"], "head,norm,delta:modules=1|all", "compared/")
        >>> print(found.sections[0].standings[0].contender)
    """
    check_parquet()
    config, fit, budget = config or ComparisonConfig(), fit or FitConfig(), budget or Budget()
    contenders = parse_contenders(methods) if isinstance(methods, str) else tuple(methods)
    folder = _prepared_folder(folder)
    tasks = _open_tasks(data, fit, config)
    sources = {
        task.name: DataSource.of(source, task) for source, task in zip(data, tasks.values(), strict=True)
    }
    own: Supporting | None = None
    own_source: DataSource | None = None
    if supporting is not None:
        opened = open_data(supporting, validation=0)
        own, own_source = Supporting.of(base, opened), DataSource.of(supporting, opened)
    affordable, left_out = _affordable(base, next(iter(tasks.values())), contenders, budget)
    planned = plan(BaseOptions.of(base, weights), sources, affordable, fit, config, own_source)
    done: list[tuple[Planned, Row]] = []
    with LiveTable(progress) as live:
        live.plan(planned)
        for one in planned:
            if not _is_wanted(one, done, budget, folder):
                left_out.append(f"{one}: not run, since the budget of {budget.minutes:g} minutes is used up")
                continue
            live.begin(one)
            row = run_job(one.job, folder, base, [tasks[name] for name in one.tasks], own)
            done.append((one, row))
            live.finish(one, row)
    left_out += _refusals(done)
    found = Comparison(
        base.name, base.fingerprint, config, fit, budget, sources, tuple(done), tuple(left_out)
    )
    write_comparison(found, folder)
    return found


def _is_wanted(one: Planned, done: Sequence[tuple[Planned, Row]], budget: Budget, folder: Path) -> bool:
    """Whether to do a job: it is a method's first, costs nothing any more, or fits into the budget."""
    if one.is_first or budget.minutes is None or read_row(folder, one.job) is not None:
        return True
    spent = sum(row.job_seconds for _, row in done)
    return spent + expected_seconds(one, done) <= budget.seconds


def _prepared_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    try:
        for part in (folder, folder / "jobs", folder / "patches"):
            part.mkdir(parents=True, exist_ok=True)
            sweep_temporary_files(part)
    except OSError as error:
        raise DeltapatchError(
            f"{folder}: nothing can be written there ({error.strerror}); choose another folder"
        ) from error
    return folder


def _open_tasks(data: Sequence[str | Path], fit: FitConfig, config: ComparisonConfig) -> dict[str, TaskData]:
    """The tasks by name, each with what it takes to be fitted, chosen by and measured."""
    if not data:
        raise DataError("there is no task to compare methods on; give labelled images")
    tasks: dict[str, TaskData] = {}
    for source in data:
        task = open_data(source, validation=fit.validation, seed=0)
        if task.name in tasks:
            raise DataError(f"two sets of images are called '{task.name}'; rename a folder or file")
        needed = (
            {"training": task.train, "test": task.test}
            if config.selection == "test"
            else {"training": task.train, "validation": task.val}
        )
        missing = next((name for name, images in needed.items() if images is None or not len(images)), None)
        if missing is not None:
            raise DataError(f"{source} has no {missing} images, which a comparison needs; give it some")
        tasks[task.name] = task
    return tasks


def _affordable(
    base: Base, task: TaskData, contenders: Sequence[Contender], budget: Budget
) -> tuple[tuple[Contender, ...], list[str]]:
    """The contenders with those variants that keep to the budget, and what was left out."""
    kept: list[Contender] = []
    left_out: list[str] = []
    for contender in contenders:
        variants = list(contender.variants)
        for variant in contender.variants:
            try:
                refusal = budget.refusal(base, variant, task.classes)
            except DeltapatchError:
                continue  # the fit will say so, for each task
            if refusal:
                left_out.append(f"{describe(variant)}: over the budget, {refusal}")
                variants.remove(variant)
        if variants:
            kept.append(Contender(contender.name, tuple(variants)))
    if not kept:
        raise DeltapatchError(f"no method keeps to the budget ({'; '.join(left_out)}); allow more")
    return tuple(kept), left_out


def _refusals(done: Sequence[tuple[Planned, Row]]) -> list[str]:
    """Why there is no result, once for all seeds with the same reason."""
    lines = [
        f"{describe(one.variant)} on {', '.join(one.tasks)}: {row.refused}"
        for one, row in done
        if row.refused
    ]
    return list(dict.fromkeys(lines))
