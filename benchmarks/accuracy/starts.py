"""Which start and which place of the normalisation Δ-Networks should have by default.

Judged on images held out from the training sets (test images are not touched): each training set, or at most
``--most`` of its images, is halved by class, once for each seed.

    python benchmarks/accuracy/starts.py --modules 1
"""

import statistics
import time
from dataclasses import replace

import torch
from settings import SETTINGS, arguments, development_split, load_base, load_task, write_table

import deltapatch as dp
from deltapatch.fitting.fit import FitConfig, fit_task

Delta = dp.methods.Delta


def variants(modules: int | str, epochs: int) -> dict[str, tuple[Delta, FitConfig]]:
    """Name -> what is compared. All train with the same schedule and no early stop."""
    config = FitConfig(epochs=epochs, learning_rate=1e-3, patience=None)
    return {
        "zero-gain, both": (Delta(modules, "both", "zero-gain", "published"), config),
        "zero-gain, sum": (Delta(modules, "sum", "zero-gain", "published"), config),
        "zero-gain, both, rate 3e-3": (
            Delta(modules, "both", "zero-gain", "published"),
            replace(config, learning_rate=3e-3),
        ),
        "zero-gain, both, new head": (
            Delta(modules, "both", "zero-gain", "published"),
            replace(config, start_from_head=False),
        ),
        "plain, module": (Delta(modules, "module", "plain", "published"), config),
        "plain, both": (Delta(modules, "both", "plain", "published"), config),
        "identity, module": (Delta(modules, "module", "identity", "published"), config),
        "identity, both": (Delta(modules, "both", "identity", "published"), config),
    }


def main() -> None:
    parser = arguments(__doc__ or "", "starts.md")
    parser.add_argument("--modules", default="1")
    parser.add_argument("--most", type=int, default=500)
    parser.add_argument("--variants", nargs="*", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    modules = options.modules if options.modules == "all" else int(options.modules)
    chosen = variants(modules, options.epochs)
    chosen = {
        name: value for name, value in chosen.items() if options.variants is None or name in options.variants
    }
    settings = [s for s in SETTINGS if options.only is None or s.task in options.only]
    results: dict[str, list[list[float]]] = {name: [] for name in ("head", *chosen)}
    for done, setting in enumerate(settings, start=1):
        base = load_base(setting.base, options.size)
        found: dict[str, list[float]] = {name: [] for name in results}
        for seed in range(options.seeds):
            task = development_split(load_task(setting.task, None, None), options.most, seed)
            for name, (method, config) in chosen.items():
                started = time.perf_counter()
                result = fit_task(base, task, method, replace(config, seed=seed), progress=False)
                # The last epoch, not the best: the best would be chosen on the images that judge.
                found[name].append(100 * (result.history[-1].validation_accuracy or 0))
                seconds = time.perf_counter() - started
                print(
                    f"{setting.task} seed {seed} {name}: {found[name][-1]:.1f} ({seconds:.0f} s)", flush=True
                )
            found["head"].append(100 * result.head_only.info.figures["validation/accuracy"])
        for name, values in found.items():
            results[name].append(values)
        title = (
            f"Δ-Networks, modules={modules}: held-out images, {options.seeds} seeds, {options.epochs} epochs"
        )
        columns = ["start, norm", *[s.task for s in settings[:done]], "mean"]
        write_table(options.out, title, columns, [row(name, per_set) for name, per_set in results.items()])


def row(name: str, per_set: list[list[float]]) -> list[str]:
    """Mean ± standard deviation over seeds for each set, and the mean over sets."""
    cells = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}" for v in per_set]
    return [name, *cells, f"{statistics.mean(statistics.mean(v) for v in per_set):.1f}"]


if __name__ == "__main__":
    main()
