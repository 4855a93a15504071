"""What attaching costs: the base through `PatchedModel` against the bare module, and one patch.

Without a patch the answer should take at most 1.01 times as long as the bare module's.

    python benchmarks/speed/overhead.py --rounds 50
"""

import argparse
from collections.abc import Callable

import torch
from common import (
    interleaved,
    machine,
    network_arguments,
    random_base,
    random_patch,
    ratio,
    seconds_of,
    shares,
    write_table,
)

import deltapatch as dp

TARGET = "≤ 1.01"
BARE, WITHOUT = "bare module", "no patch"


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> list[list[str]]:
    """The rows of one network: no patch, and one patch with each Δ-module."""
    base = random_base(name, options.device)
    images, bare = base.example(options.batch), base.module.eval()
    model = dp.PatchedModel(base)
    calls: dict[str, Callable[[], object]] = {
        BARE: lambda: bare(images),
        WITHOUT: lambda: model(images, patch=None),
    }
    theory = {WITHOUT: 1.0}
    for module in options.delta:
        model.add_patch(module, random_patch(base, module, seed=0))
        calls[module] = lambda module=module: model(images, patch=module)
        theory[module] = 1 + shares(base, module).delta
    for call in calls.values():
        call()
    print(name, flush=True)
    contestants = {key: lambda call=call: seconds_of(call, options.device) for key, call in calls.items()}
    times = interleaved(contestants, options.rounds, quiet=True)
    return [
        [
            name,
            key if key == WITHOUT else f"Δ, {key}",
            f"{ratio(times[key], times[BARE]):.3f}",
            f"{macs:.3f}",
            TARGET if key == WITHOUT else "",
        ]
        for key, macs in theory.items()
    ]


def main() -> None:
    options = network_arguments(__doc__, "overhead", rounds=50, batch=16).parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for name in options.networks for row in measure(name, options)]
    note = (
        f"{machine(options.threads, options.device)} fp32, {options.batch} images of 224 pixels in a batch;"
        f" medians of the ratios within {options.rounds} interleaved rounds."
    )
    columns = ["network", "patch", "time / bare module's", "multiply-adds / bare module's", "target"]
    write_table(options.out, "What a patched model costs", [note], columns, rows)


if __name__ == "__main__":
    main()
