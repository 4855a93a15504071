"""The single-task table of one base: every method on many sets; validation chooses, test reports.

    python benchmarks/accuracy/single.py --base ResNet-20 --work /tmp/single

All that a fit and a choice look at are training and validation images; test images are answered once by each
finished patch. ``--work`` keeps the ledger of `deltapatch compare`, from which the command goes on after an
end. Beside the methods the table has two rows that use no further fits: the method that has the best
validation accuracy, chosen for each set and seed, and the method that is best on the test images, which
nobody can know beforehand.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from finished import spread
from settings import BASES, arguments, capped_set, load_base, write_table

from deltapatch.evaluation.comparing.comparison import compare
from deltapatch.evaluation.comparing.planning import ComparisonConfig
from deltapatch.evaluation.comparing.table import Line, Section
from deltapatch.evaluation.protocols.seeds import compare_over_seeds
from deltapatch.fitting.fit import FitConfig

SETS = (
    "flowers5",
    "dtd10",
    "pacs_sketch",
    "bccd_cells",
    "brain_tumor_mri",
    "caltech101",
    "usps",
    "mnist",
    "omniglot",
)
METHODS = (
    "head",
    "skips",
    "delta:modules=1",
    "delta:modules=all",
    "dua",
    "norm",
    "norm:statistics=own",
    "random-weights",
    "lora",
    "parallel-adapter",
    "series-adapter",
    'compose:methods=["delta:modules=1","norm"]',
    'compose:methods=["norm","lora"]',
    'compose:methods=["delta:modules=1","lora"]',
    'compose:methods=["delta:modules=1","series-adapter"]',
    "full",
)


def main() -> None:
    parser = arguments("Every method on many sets, one base.", "single.md")
    parser.add_argument("--base", choices=BASES, default="ResNet-20")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--most", type=int, nargs=3, default=(600, 300, 1000), help="train, val, test images")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the ledger and the patches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load_base(options.base, options.size)
    most = dict(zip(("train", "val", "test"), options.most, strict=True))
    sets = [capped_set(name, options.work / "data", most) for name in options.only or SETS]
    fit = FitConfig(epochs=options.epochs, patience=None)
    found = compare(
        base,
        sets,
        ",".join(options.methods),
        options.work / options.base,
        ComparisonConfig(seeds=options.seeds),
        fit,
        progress=False,
    )
    (section,) = found.sections
    title = (
        f"{options.base}: test accuracy in %, mean ± standard deviation over {options.seeds} seeds; at most"
        f" {most['train']} training, {most['val']} validation and {most['test']} test images a set,"
        f" {options.epochs} epochs"
    )
    names = [path.stem for path in sets]
    write_table(
        options.out.with_name(f"single_{options.base.lower().replace('-', '')}.md"),
        title,
        ["method", *names, "mean", "parameters", "against the best"],
        table(section, names),
    )
    for reason in found.left_out:
        print(reason)


def table(section: Section, names: Sequence[str]) -> list[list[str]]:
    """A row for each method, the best first, and two rows of choices among them."""
    rows: list[list[str]] = []
    for standing in section.standings:
        lines = {line.task: line for line in standing.lines}
        verdict = standing.verdict
        rows.append(_row(standing.contender, lines, names, standing.accuracy, verdict))
    lines_of = {one.contender: {line.task: line for line in one.lines} for one in section.standings}
    chosen = _chosen_on_validation(lines_of, names)
    best = section.standings[0]
    test = {
        (name, seed): score.accuracy
        for name in names
        for seed, score in lines_of[best.contender][name].scores.items()
    }
    compared = compare_over_seeds(chosen, test)
    by_set = {name: [value for (task, _), value in chosen.items() if task == name] for name in names}
    mean = statistics.mean(statistics.mean(values) for values in by_set.values())
    difference = 100 * compared.difference.value
    rows.append(
        [
            "*chosen on validation*",
            *(spread([100 * value for value in by_set[name]]) for name in names),
            f"{100 * mean:.1f}",
            "",
            f"{difference:+.1f} ({compared.verdict}) against {best.contender}",
        ]
    )
    ceiling = [max(lines[name].accuracy.mean for lines in lines_of.values()) for name in names]
    rows.append(
        [
            "*best on test, in hindsight*",
            *(f"{100 * value:.1f}" for value in ceiling),
            f"{100 * statistics.mean(ceiling):.1f}",
            "",
            "",
        ]
    )
    return rows


def _row(name: str, lines: Mapping[str, Line], names: Sequence[str], mean: float, verdict: str) -> list[str]:
    cells = [spread([100 * score.accuracy for score in lines[task].scores.values()]) for task in names]
    parameters = round(statistics.mean(line.parameters for line in lines.values()))
    return [name, *cells, f"{100 * mean:.1f}", f"{parameters:,}", verdict]


def _chosen_on_validation(
    lines_of: Mapping[str, Mapping[str, Line]], names: Sequence[str]
) -> dict[tuple[str, int], float]:
    """(set, seed) -> the test accuracy of the patch that is best on validation; of equals the smallest."""
    chosen: dict[tuple[str, int], float] = {}
    for name in names:
        lines = [of_task[name] for of_task in lines_of.values()]
        for seed in lines[0].scores:
            best = max(lines, key=lambda line: (line.scores[seed].validation_accuracy, -line.parameters))
            chosen[name, seed] = best.scores[seed].accuracy
    return chosen


if __name__ == "__main__":
    main()
