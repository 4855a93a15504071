"""Joint, sequential and parallel patching of three tasks at a time, with what the base loses on its own task.

    python benchmarks/accuracy/protocols.py --base ResNet-20 --work /tmp/protocols

A base that was trained on CIFAR-10 answers for CIFAR-10's test images as its own task. ``--work`` keeps the
ledger of `deltapatch compare`, from which the command goes on after an end.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from finished import spread
from settings import BASES, arguments, capped_set, load_base, write_table

from deltapatch.evaluation.comparing.comparison import compare
from deltapatch.evaluation.comparing.ledger import Row
from deltapatch.evaluation.comparing.planning import ComparisonConfig, Planned
from deltapatch.evaluation.protocols.scores import AccuracyMatrix
from deltapatch.fitting.fit import FitConfig

TRIPLES = (("usps", "dtd10", "bccd_cells"), ("pacs_sketch", "brain_tumor_mri", "flowers5"))
PROTOCOLS = ("joint", "sequential", "parallel")
METHODS = (
    "head",
    "delta:modules=1",
    "norm",
    'compose:methods=["delta:modules=1","norm"]',
    "series-adapter",
    "interpolate",
    "interpolate:statistics=re-estimated",
)
Done = Sequence[tuple[Planned, Row]]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    base = load_base(options.base, options.size)
    most = dict(zip(("train", "val", "test"), options.most, strict=True))
    supporting = capped_set("cifar10", options.work / "data", {"val": 300, "test": options.most[2]})
    rows: list[list[str]] = []
    for triple in TRIPLES:
        sets = [capped_set(name, options.work / "data", most) for name in triple]
        found = compare(
            base,
            sets,
            ",".join(options.methods),
            options.work / options.base / "-".join(triple),
            ComparisonConfig(seeds=options.seeds, protocols=PROTOCOLS),
            FitConfig(epochs=options.epochs, patience=None),
            supporting=supporting,
            progress=False,
        )
        for protocol in PROTOCOLS:
            rows += _rows(found.done, protocol, triple)
    write_table(
        options.out.with_name(f"protocols_{options.base.lower().replace('-', '')}.md"),
        f"{options.base}: three tasks at a time; test accuracy in % after the last step,"
        f" {options.seeds} seeds (mean ± standard deviation where several); at most {most['train']} training"
        f" images a set, {options.epochs} epochs",
        ["protocol", "method", "tasks", "each task", "own task (base)", "harmonic mean", "mean", "forgotten"],
        rows,
    )


def _rows(done: Done, protocol: str, triple: Sequence[str]) -> list[list[str]]:
    """One row for each method: over the seeds, from the matrices of the ledger."""
    rows: list[list[str]] = []
    contenders = dict.fromkeys(one.contender for one, _ in done)
    for contender in contenders:
        matrices = [
            _matrix(row)
            for one, row in done
            if one.contender == contender and one.job.protocol == protocol and row.matrix is not None
        ]
        if not matrices:
            continue
        final = [matrix.final() for matrix in matrices]
        own = matrices[0].columns[0]
        tasks = ", ".join(spread([100 * found[name] for found in final]) for name in matrices[0].columns[1:])
        forgotten = [max(0.0, *_last(matrix)) for matrix in matrices]
        rows.append(
            [
                protocol,
                contender,
                ", ".join(triple),
                tasks,
                spread([100 * found[own] for found in final]),
                spread([100 * matrix.score("harmonic") for matrix in matrices]),
                spread([100 * matrix.score("mean") for matrix in matrices]),
                f"{100 * statistics.mean(forgotten):.1f}",
            ]
        )
    return rows


def _matrix(row: Row) -> AccuracyMatrix:
    assert row.matrix is not None
    values = [[math.nan if value is None else value for value in line] for line in row.matrix.values]
    return AccuracyMatrix(row.matrix.columns, row.matrix.rows, np.array(values))


def _last(matrix: AccuracyMatrix) -> list[float]:
    """What each column has lost at the end, as far as it was measured before."""
    return [float(value) for value in matrix.forgetting()[-1] if value == value]


def _options() -> argparse.Namespace:
    parser = arguments("Joint, sequential and parallel patching.", "protocols.md")
    parser.add_argument("--base", choices=[base for base in BASES if "Net-" in base], default="ResNet-20")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--most", type=int, nargs=3, default=(400, 300, 1000), help="train, val, test images")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the ledger and the patches")
    return parser.parse_args()


if __name__ == "__main__":
    main()
