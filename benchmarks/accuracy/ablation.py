"""What makes Δ-Networks work: the rows of table 8 of arXiv 2303.14772 on bases and image sets of ours.

Judged on images held out from the training sets (test images are not touched): each training set, or at most
``--most`` of its images, is halved by class, once for each seed. Nothing is chosen on the images that judge:
the last epoch counts, and a head that is solved has the default penalty. "+ Random" is not defined in the
paper: the rows that begin with "random" are readings of it. Without anything to train but the head, the
head is solved on the patched features. Every finished fit is kept in a ``.jsonl`` file beside the table, from
which the command goes on after an end.

    python benchmarks/accuracy/ablation.py --epochs 20
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from finished import Finished, spread
from settings import BASES, arguments, development_split, load_base, load_task, write_table

import deltapatch as dp
from deltapatch.data import TaskData
from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.answers import evaluate
from deltapatch.fitting.fit import FitConfig, fit_task
from deltapatch.method import Method, make_method

SETS = ("dtd10", "brain_tumor_mri")
DEFAULT_BASES = ("MobileNetV2", "ResNet-56")
KEYS = ("base", "task", "seed", "row", "epochs", "most", "size")

ROWS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "head": ("head", {}),
    "existing skips, learned": ("skips", {"which": "existing"}),
    "all skips, learned": ("skips", {}),
    "all skips, learned, + norm": ("skips", {"norm": True}),
    "all skips, weight 1": ("skips", {"weights": "one"}),
    "all skips, weight 1, + norm": ("skips", {"weights": "one", "norm": True}),
    "random weights": ("skips", {"weights": "random"}),
    "random weights, + norm": ("skips", {"weights": "random", "norm": True}),
    "random weights drawn for each batch, + norm": ("skips", {"weights": "redrawn", "norm": True}),
    "random Δ-module": ("skips", {"weights": "untrained-module"}),
    "random Δ-module, + norm": ("skips", {"weights": "untrained-module", "norm": True}),
    "Δ, last stage": ("delta", {"modules": 1}),
    "Δ, all stages": ("delta", {"modules": "all"}),
    "Δ, all stages, as published": ("delta", {"norm": "module", "start": "plain", "module": "published"}),
}


def main() -> None:
    parser = arguments(__doc__ or "", "ablation.md")
    parser.add_argument("--most", type=int, default=500)
    parser.add_argument("--bases", nargs="*", default=DEFAULT_BASES, choices=BASES)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    finished = Finished(options.out.with_suffix(".jsonl"), KEYS)
    for seed in range(options.seeds):
        for base_name in options.bases:
            base = load_base(base_name, options.size)
            for task_name in options.only or SETS:
                task = development_split(load_task(task_name, None, None), options.most, seed)
                for row in options.rows:
                    settings = {"epochs": options.epochs, "most": options.most, "size": options.size}
                    key = {"base": base_name, "task": task_name, "seed": seed, "row": row, **settings}
                    if not finished.has(key):
                        measure(finished, key, base, task)
        write_results(options, finished)


def measure(finished: Finished, key: dict[str, Any], base: dp.Base, task: TaskData) -> None:
    """One fit on the first half of the images, judged on the second; a base may refuse a method."""
    assert task.val is not None
    config = FitConfig(epochs=key["epochs"], patience=None, seed=key["seed"])
    started = time.perf_counter()
    try:
        method: Method = make_method(*ROWS[key["row"]])
        patch = fit_task(base, replace(task, val=None), method, config, progress=False).patch
    except DeltapatchError as refusal:
        print(f"{key['row']} on {key['base']} is left out: {refusal}", flush=True)
        return
    accuracy = 100 * evaluate(base, task.val, patch).accuracy.value
    seconds = time.perf_counter() - started
    result = {"accuracy": accuracy, "parameters": patch.num_parameters(head=False), "seconds": seconds}
    finished.add(key, result)


def write_results(options: argparse.Namespace, finished: Finished) -> None:
    """One row of the paper's table a line: accuracy on each base and set, and parameters without the head."""
    found = finished.where(epochs=options.epochs, most=options.most, size=options.size)
    found = [entry for entry in found if entry["seed"] < options.seeds]
    places = list(dict.fromkeys((entry["base"], entry["task"]) for entry in found))
    rows: list[list[str]] = []
    for row in ROWS:
        own = [entry for entry in found if entry["row"] == row]
        values = [[e["accuracy"] for e in own if (e["base"], e["task"]) == place] for place in places]
        parameters = [
            next((f"{e['parameters']:,}" for e in own if e["base"] == base), "–")
            for base in dict.fromkeys(base for base, _ in places)
        ]
        if own:
            rows.append([row, *[spread(cell) for cell in values], " / ".join(parameters)])
    bases = " / ".join(dict.fromkeys(base for base, _ in places))
    columns = ["", *[f"{base} → {task}" for base, task in places], f"parameters on {bases}"]
    title = (
        f"What makes Δ-Networks work: held-out training images, at most {options.most} images a set,"
        f" {options.seeds} seeds, {options.epochs} epochs, last epoch"
    )
    write_table(options.out, title, columns, rows)


if __name__ == "__main__":
    main()
