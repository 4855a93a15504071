"""Training from scratch on small ResNets with random weights: everything, everything with Δ, norms alone.

In the manner of tables 12 and 13 of arXiv 2303.14772 and of Frankle, Schwab, Morcos (arXiv 2003.00152). Each
seed has random weights and a fit of its own. The validation images choose the epoch (and the penalty of a
head that is solved); test images are looked at once, after the fit. Every finished fit is kept in a
``.jsonl`` file beside the table, from which the command goes on after an end.

    python benchmarks/accuracy/scratch.py --depth 14 --epochs 60
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from finished import Finished, spread
from settings import REPOSITORY, arguments, load_task, write_table

import deltapatch as dp
from deltapatch.data import TaskData
from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.answers import evaluate
from deltapatch.evaluation.sparsity import clamped, dead_channels, gain_sparsity
from deltapatch.fitting.fit import FitConfig, fit_task
from deltapatch.method import make_method
from deltapatch.patch import Patch

SETS = ("cifar10", "cifar100")
KEYS = ("depth", "task", "seed", "row", "epochs", "rate", "augment", "most")


@dataclass(frozen=True)
class Row:
    """What is trained.

    Attributes:
        method: its name.
        options: its configuration.
        train_head: whether the output layer trains too; otherwise it stays random.
        is_norm: whether nothing but norms (and the head) trains, so that its sparsity is measured.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    train_head: bool = True
    is_norm: bool = False


_NORMS = {"statistics": "own", "gain": "uniform"}
# In the source the norms of the control normalise, too; those of a random network have no statistics yet.
_GATHERED = "dua:images=all"
_PUBLISHED = "delta:norm=module+start=plain+module=published"
ROWS: Mapping[str, Row] = {
    "everything": Row("full"),
    "everything and Δ": Row("compose", {"methods": ["delta", "full"]}),
    "everything and Δ as published": Row("compose", {"methods": [_PUBLISHED, "full"]}),
    "norms and head": Row("norm", _NORMS, is_norm=True),
    "norms, head random": Row("norm", _NORMS, train_head=False, is_norm=True),
    "2 random weights a channel and head": Row("compose", {"methods": [_GATHERED, "random-weights"]}),
    "head, statistics of the task": Row("dua", {"images": "all"}),
    "head": Row("head"),
}


def main() -> None:
    parser = arguments(__doc__ or "", "scratch.md")
    parser.add_argument("--depth", type=int, default=14, help="layers of the ResNet: 8, 14, 20, 32, ...")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate, of every row")
    parser.add_argument("--augment", default="standard", choices=["none", "flip", "crop", "standard"])
    parser.add_argument("--most", type=int, default=None, help="training images; all where left out")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.set_defaults(epochs=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    finished = Finished(options.out.with_suffix(".jsonl"), KEYS)
    for seed in range(options.seeds):
        base = random_base(options.depth, seed)
        for task_name in options.only or SETS:
            task = load_task(task_name, options.most, None)
            for row in options.rows:
                key = {"task": task_name, "seed": seed, "row": row, **fixed(options)}
                if not finished.has(key):
                    measure(finished, key, base, task)
        write_results(options, finished)


def fixed(options: argparse.Namespace) -> dict[str, Any]:
    """What one table has in common."""
    return {name: getattr(options, name) for name in ("depth", "epochs", "rate", "augment", "most")}


def random_base(depth: int, seed: int) -> dp.Base:
    """The ResNet for 32 x 32 pixels with the random weights of a seed."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    module = import_module("cifar_resnet").random_resnet(depth, seed=seed)
    return dp.load_base(module.eval(), size=32, crop_pct=1.0, name=f"random ResNet-{depth}, seed {seed}")


def measure(finished: Finished, key: dict[str, Any], base: dp.Base, task: TaskData) -> None:
    """One fit, judged on the test images; a method that is not there is left out."""
    assert task.test is not None
    row = ROWS[key["row"]]
    config = FitConfig(
        epochs=key["epochs"],
        learning_rate=key["rate"],
        patience=None,
        start_from_head=False,
        train_head=row.train_head,
        augment=key["augment"],
        seed=key["seed"],
    )
    started = time.perf_counter()
    try:
        method = make_method(row.method, row.options)
        patch = fit_task(base, task, method, config, progress=False).patch
    except DeltapatchError as refusal:
        print(f"{key['row']} is left out: {refusal}", flush=True)
        return
    result = {
        "accuracy": 100 * evaluate(base, task.test, patch).accuracy.value,
        "parameters": patch.num_parameters(head=False),
        "seconds": time.perf_counter() - started,
    }
    finished.add(key, {**result, **(sparsity(base, task, patch) if row.is_norm else {})})


def sparsity(base: dp.Base, task: TaskData, patch: Patch) -> dict[str, float]:
    """Percentages: gains near zero, the accuracy without them, channels that are dead on the test images."""
    assert task.test is not None
    return {
        "small_gains": 100 * gain_sparsity(patch).share,
        "clamped": 100 * evaluate(base, task.test, clamped(patch)).accuracy.value,
        "dead_channels": 100 * dead_channels(base, task.test, patch).share,
    }


def write_results(options: argparse.Namespace, finished: Finished) -> None:
    """One row a line: accuracy on each set's test images, parameters without the head, sparsity of norms."""
    found = [entry for entry in finished.where(**fixed(options)) if entry["seed"] < options.seeds]
    tasks = list(dict.fromkeys(entry["task"] for entry in found))
    rows: list[list[str]] = []
    for row in ROWS:
        own = [entry for entry in found if entry["row"] == row]
        if own:
            accuracies = [spread([e["accuracy"] for e in own if e["task"] == task]) for task in tasks]
            rows.append([row, *accuracies, f"{own[0]['parameters']:,}", *sparsity_cells(own)])
    columns = ["trained", *tasks, "parameters", "gains near 0", "accuracy lost without them", "dead channels"]
    images = "all" if options.most is None else f"at most {options.most}"
    title = (
        f"From scratch, ResNet-{options.depth}: test accuracy, {images} training images, {options.seeds}"
        f" seeds, {options.epochs} epochs, learning rate {options.rate:g}, augmentation {options.augment}"
    )
    write_table(options.out, title, columns, rows)


def sparsity_cells(entries: list[dict[str, Any]]) -> list[str]:
    """Over all sets and seeds; dashes where it was not measured."""
    measured = [entry for entry in entries if "small_gains" in entry]
    lost = [entry["accuracy"] - entry["clamped"] for entry in measured]
    small, dead = ([e[name] for e in measured] for name in ("small_gains", "dead_channels"))
    cells = [spread(small), spread(lost, 2), spread(dead)]
    return [f"{cell} %" if cell != "–" and index != 1 else cell for index, cell in enumerate(cells)]


if __name__ == "__main__":
    main()
