"""A thousand patches of one base in one process: memory, attaching, cold answers and switching.

Attaching reads only a file's header; tensors are loaded when a patch first answers, and those of the patches
that have not answered for longest give way under the byte budget. The files are real patches with random
parameters; those beyond the disk limit are hard links to the first ones.

    python benchmarks/speed/resident.py --patches 1000 --networks resnet50
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from common import (
    CLASSES,
    MEGABYTE,
    delta_method,
    interleaved,
    machine,
    network_arguments,
    random_base,
    randomise,
    seconds_of,
    write_table,
)
from torch import Tensor

import deltapatch as dp

SWITCH_TARGET = "< 1 ms"


@dataclass(frozen=True)
class Memory:
    """Bytes of the patches' tensors, and of the whole process in memory."""

    patches: int
    process: int

    @classmethod
    def of(cls, model: dp.PatchedModel) -> "Memory":
        return cls(model.resident_bytes, psutil.Process().memory_info().rss)


def write_patches(base: dp.Base, module: str, folder: Path, count: int, disk: int) -> list[Path]:
    """Files of ``count`` patches in at most ``disk`` bytes; once these are used up, the first ones again."""
    paths = [folder / f"task-{index}.safetensors" for index in range(count)]
    patch = delta_method(module).build(base, CLASSES, seed=0)
    patch.save(paths[0])
    distinct = min(count, disk // paths[0].stat().st_size)
    if distinct < 1:
        raise SystemExit(f"--disk-megabytes: one patch has {megabytes(paths[0].stat().st_size)}; give more")
    for index, path in enumerate(paths):
        if index < distinct:
            randomise(patch, index).save(path)
        else:
            os.link(paths[index % distinct], path)
    return paths


def attach_all(model: dp.PatchedModel, paths: Sequence[Path]) -> list[float]:
    """Attaches each file under its own name; seconds of each."""
    return [seconds_of(lambda path=path: model.attach_patch(path.stem, path), "cpu") for path in paths]


def first_answers(model: dp.PatchedModel, image: Tensor, names: Sequence[str], device: str) -> list[float]:
    """Asks every patch twice; how many seconds longer the first answer takes than the second."""
    beyond: list[float] = []
    for name in names:
        cold = seconds_of(lambda name=name: model(image, patch=name), device)
        beyond.append(cold - seconds_of(lambda name=name: model(image, patch=name), device))
    return beyond


def switching(
    model: dp.PatchedModel, image: Tensor, names: tuple[str, str], rounds: int, device: str
) -> float:
    """Seconds that an answer takes longer after another patch's answer than after its own."""
    a, b = names

    def pair(first: str) -> float:
        return seconds_of(lambda: (model(image, patch=first), model(image, patch=a)), device)

    # Both end with a: "same" is two answers without a switch, "alternating" two answers and two switches.
    times = interleaved({"same": lambda: pair(a), "alternating": lambda: pair(b)}, rounds, quiet=True)
    return statistics.median((y - x) / 2 for x, y in zip(times["same"], times["alternating"], strict=True))


@torch.no_grad()
def measure(name: str, module: str, options: argparse.Namespace) -> list[list[str]]:
    """The rows of one network and Δ-module."""
    base = random_base(name, options.device)
    image = base.example(1)[..., : options.pixels, : options.pixels]
    budget, disk = options.budget_megabytes * MEGABYTE, options.disk_megabytes * MEGABYTE
    base_bytes = sum(tensor.nbytes for tensor in base.module.state_dict().values())
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        paths = write_patches(base, module, Path(folder), options.patches, disk)
        file_bytes = paths[0].stat().st_size
        if budget < 2 * file_bytes:
            raise SystemExit(
                f"--budget-megabytes: two patches of {megabytes(file_bytes)} must fit; give more"
            )
        print(f"{len(paths)} files written in {time.perf_counter() - started:.0f} s", flush=True)
        model = dp.PatchedModel(base, budget=budget)
        model(image)  # what the base allocates for an answer is not the patches'
        before = Memory.of(model)
        attaching = attach_all(model, paths)
        attached = Memory.of(model)
        names = [path.stem for path in paths]
        beyond = first_answers(model, image, names, options.device)
        answered = Memory.of(model)
        last = (names[-1], names[-2 % len(names)])
        switch = switching(model, image, last, options.rounds, options.device)
    copies = options.patches * base_bytes
    limit, count = f"≤ {megabytes(budget)}", options.patches
    rows = [
        ["one patch file", megabytes(file_bytes), ""],
        ["process before any patch", megabytes(before.process), ""],
        [f"tensors of patches, {count} attached", megabytes(attached.patches), limit],
        [f"process, {count} attached", megabytes(attached.process), ""],
        ["tensors of patches, after each has answered", megabytes(answered.patches), limit],
        ["process, after each has answered", megabytes(answered.process), ""],
        [f"{count} copies of the base (their weights)", megabytes(copies), ""],
        ["... against the process", f"{copies / answered.process:.1f}x", ""],
        ["attaching a file, median", milliseconds(statistics.median(attaching)), ""],
        ["first answer beyond a warm one, median", milliseconds(statistics.median(beyond)), ""],
        ["switching between two warm patches", milliseconds(switch), SWITCH_TARGET],
    ]
    return [[name, module, *row] for row in rows]


def megabytes(number: float) -> str:
    return f"{number / MEGABYTE:.1f} MB"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3f} ms"


def main() -> None:
    parser = network_arguments(__doc__, "resident", 200, batch=1, networks=["resnet50"], delta=["light"])
    parser.add_argument("--patches", type=int, default=1000)
    parser.add_argument("--budget-megabytes", type=int, default=1024, help="for the tensors of patches")
    parser.add_argument("--disk-megabytes", type=int, default=4096, help="for the files of distinct patches")
    parser.add_argument(
        "--pixels", type=int, default=64, help="side of the image asked with; small, to see beyond the base"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row for name in options.networks for module in options.delta for row in measure(name, module, options)
    ]
    note = (
        f"{machine(options.threads, options.device)} {options.patches} patches, files in the system's page"
        f" cache where there is room; answers for one image of {options.pixels} pixels; switching: median of"
        f" {options.rounds} interleaved rounds."
    )
    columns = ["network", "Δ-module", "what", "value", "target"]
    write_table(options.out, "Many patches in memory", [note], columns, rows)


if __name__ == "__main__":
    main()
