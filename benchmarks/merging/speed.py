"""Seconds and peak memory of merges of large checkpoints, beside doing it with whole state dicts.

    python benchmarks/merging/speed.py --work /tmp/merging

Checkpoints of a vision transformer with 300 M parameters and random weights are written to ``--work`` once.
Every contestant runs in a process of its own, and the rounds are interleaved, so that a slow moment of the
machine hits all of them. "Whole" is the straightforward way: load all models, flatten, compute, save; it
computes in fp32 as well. Its TIES takes the threshold of each model by sorting out the k-th value of its
vector.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
OUT = REPOSITORY / "benchmarks" / "results" / "merging_speed.md"
MERGES = ("average", "task_arithmetic", "ties", "dare")
KEEP, SCALE, DROP = 0.2, 0.3, 0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for all checkpoints")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--network", default="vit_large_patch16_224")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--merges", nargs="*", default=list(MERGES))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contest(options)
        return
    paths = checkpoints(options)
    size = paths[0].stat().st_size
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name in options.merges:
            for kind in ("whole", "streamed"):
                found.setdefault(f"{kind} {name}", []).append(measure(options, f"{kind} {name}"))
    write(options, found, size)


def checkpoints(options: argparse.Namespace) -> list[Path]:
    """The base and the models, written if they are not there."""
    import timm

    options.work.mkdir(parents=True, exist_ok=True)
    paths = [options.work / f"model{number}.safetensors" for number in range(options.models + 1)]
    if all(path.is_file() for path in paths):
        return paths
    torch.manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in timm.create_model(options.network).state_dict().items()}
    base = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        moved = {
            name: tensor + (0.002 * torch.randn(tensor.shape) if number else 0)
            for name, tensor in base.items()
        }
        save_file({name: tensor.to(DTYPES[options.dtype]) for name, tensor in moved.items()}, path)
    return paths


def measure(options: argparse.Namespace, contestant: str) -> tuple[float, float]:
    """Seconds and peak MiB beyond an idle process with the same imports."""
    command = [sys.executable, __file__, "--contestant", contestant, "--work", str(options.work)]
    command += ["--models", str(options.models), "--threads", str(options.threads), "--dtype", options.dtype]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, memory = json.loads(printed.splitlines()[-1])
    print(f"{contestant}: {seconds:.1f} s, {memory:.0f} MiB", flush=True)
    return seconds, memory


def contest(options: argparse.Namespace) -> None:
    """Does one merge and prints what it took."""
    from deltapatch import merging

    kind, name = options.contestant.split()
    torch.set_num_threads(options.threads)
    base, *models = [options.work / f"model{number}.safetensors" for number in range(options.models + 1)]
    out = options.work / f"{kind}_{name}.safetensors"
    # What is imported on first use is no part of a merge.
    merging.average([{"w": torch.zeros(1)}])
    # The kernel's own mark of the highest resident size is set back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    idle = _peak()
    started = time.perf_counter()
    if kind == "streamed":
        run = merging.RunOptions(threads=options.threads)
        arguments: dict[str, dict[str, float]] = {
            "average": {},
            "task_arithmetic": {"scale": SCALE},
            "ties": {"keep": KEEP, "scale": SCALE},
            "dare": {"drop": DROP, "scale": SCALE},
        }
        getattr(merging, name)(models, base, **arguments[name], out=out, run=run)
    else:
        whole(name, models, base, out)
    print(json.dumps([time.perf_counter() - started, _peak() - idle]))


def _peak() -> float:
    """The highest resident size since it was set back, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def whole(name: str, models: list[Path], base: Path, out: Path) -> None:
    """The straightforward way."""
    start = load_file(base)
    loaded = [load_file(path) for path in models]
    if name == "average":
        merged = {key: sum(model[key].float() for model in loaded) / len(loaded) for key in start}
    else:
        deltas = [{key: model[key].float() - start[key].float() for key in start} for model in loaded]
        del loaded
        if name == "dare":
            for one in deltas:
                for key, delta in one.items():
                    one[key] = torch.bernoulli(torch.full_like(delta, 1 - DROP)) * delta / (1 - DROP)
        added = whole_ties(deltas) if name == "ties" else _summed(deltas)
        merged = {key: start[key].float() + SCALE * added[key] for key in start}
    save_file({key: tensor.to(start[key].dtype).contiguous() for key, tensor in merged.items()}, out)


def _summed(deltas: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([one[key] for one in deltas]).sum(0) for key in deltas[0]}


def whole_ties(deltas: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Trim by the k-th value of the whole vector, elect signs, mean of those that agree."""
    shapes = {key: delta.shape for key, delta in deltas[0].items()}
    keys = list(shapes)
    vectors = torch.empty(len(deltas), sum(shape.numel() for shape in shapes.values()))
    for vector in vectors:  # each dictionary is let go, or two copies of all would not fit into memory
        one = deltas.pop(0)
        torch.cat([one[key].flatten() for key in keys], out=vector)
    dropped = vectors.shape[1] - int(KEEP * vectors.shape[1])
    for vector in vectors:
        vector[vector.abs() <= vector.abs().kthvalue(dropped).values] = 0
    signs = torch.sign(vectors.sum(0))
    signs[signs == 0] = torch.sign(signs.sum())
    total, agreeing = torch.zeros_like(signs), torch.zeros_like(signs)
    for vector in vectors:
        vector[torch.sign(vector) != signs] = 0
        total += vector
        agreeing += vector != 0
    merged = total / agreeing.clamp(min=1)
    ends = torch.cumsum(torch.tensor([shape.numel() for shape in shapes.values()]), 0).tolist()
    starts = [0, *ends[:-1]]
    return {
        key: merged[start:end].view(shapes[key]) for key, start, end in zip(keys, starts, ends, strict=True)
    }


def write(options: argparse.Namespace, found: Mapping[str, list[tuple[float, float]]], size: int) -> None:
    """The table, on screen and in a file."""
    moved = size * (options.models + 2)
    rows: list[str] = []
    for name in options.merges:
        slow, fast = found[f"whole {name}"], found[f"streamed {name}"]
        seconds = [statistics.median(run[0] for run in runs) for runs in (slow, fast)]
        memory = [statistics.median(run[1] for run in runs) for runs in (slow, fast)]
        rows.append(
            f"| {name} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {seconds[0] / seconds[1]:.2f} × |"
            f" {memory[0]:,.0f} MiB | {memory[1]:,.0f} MiB | 1/{memory[0] / max(memory[1], 1):.0f} |"
            f" {moved / seconds[1] / 2**20:,.0f} MiB/s |"
        )
    disk, copy = bandwidths(options.work / "model0.safetensors")
    text = "\n".join(
        [
            f"# Merging {options.models} checkpoints of {options.network} ({size / 2**20:,.0f} MiB each,"
            f" {options.dtype}), {options.threads} threads, median of {options.rounds}",
            "",
            "Peak memory is the process's own beyond its imports; input files are in the system's cache as"
            " far as it holds them. Throughput counts every input once and the output. Reading one checkpoint"
            f" takes {disk:,.0f} MiB/s here, copying memory {copy:,.0f} MiB/s.",
            "",
            "| merge | whole | streamed | faster | whole, peak | streamed, peak | memory | throughput |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")


def bandwidths(path: Path) -> tuple[float, float]:
    """MiB a second of reading a file, and of copying memory."""
    started = time.perf_counter()
    content = path.read_bytes()
    read = len(content) / 2**20 / (time.perf_counter() - started)
    source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    started = time.perf_counter()
    source.clone()
    return read, len(content) / 2**20 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
