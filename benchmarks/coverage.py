"""Which model families of timm can be patched: the smallest model of each module, with random weights.

For each: its stages, a delta patch on all of them (published start, so that its answer must differ from the
base's) run on one batch, and the base's answer and weights compared before and after, bit for bit. Inputs are
made small where the model takes them; what is found is a matter of structure, not of size.

    python benchmarks/coverage.py
"""

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from torch import nn

import deltapatch as dp
from deltapatch.base import Base, fingerprint
from deltapatch.trace import Trace, record

RESULTS = Path(__file__).parent / "results" / "coverage.md"
SMALL = 128
ATTENTION = {"scaled_dot_product_attention", "softmax", "bmm", "einsum", "multi_head_attention_forward"}


@dataclass(frozen=True)
class Row:
    """What was found for one family."""

    family: str
    model: str
    kind: str
    stages: str
    patched: bool
    reason: str
    base_exact: bool
    seconds: float


def smallest(family: str) -> str:
    """The model of a timm module with the fewest parameters; inputs of at most 256 pixels if it has any."""
    best: tuple[bool, int, str] | None = None
    for name in timm.list_models(module=family):
        known = timm.get_pretrained_cfg(name, allow_unregistered=True)
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:  # a model that cannot be made on the meta device is no candidate
                continue
        large = known is not None and known.input_size[-1] > 256
        candidate = (large, sum(p.numel() for p in model.parameters()), name)
        best = candidate if best is None else min(best, candidate)
    assert best is not None, family
    return best[2]


def bases(name: str) -> Iterator[Base]:
    """The model as a base: built for small inputs, given small inputs, as it comes; until one runs."""
    for small_build, size in ((True, SMALL), (False, SMALL), (False, 224), (False, None)):
        torch.manual_seed(0)
        try:
            module = timm.create_model(name, **({"img_size": SMALL} if small_build else {}))
        except Exception:  # most models do not take img_size
            continue
        yield dp.load_base(module.eval(), size=size, name=name)


def kind_of(module: nn.Module, trace: Trace) -> str:
    """convolutional, transformer or hybrid: by spatial convolutions after the first one, and attention."""
    spatial = [m for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    convolutional = len(spatial) > 2
    names = {operation.name for operation in trace.operations}
    attends = bool(names & ATTENTION)
    if convolutional:
        return "hybrid" if attends else "convolutional"
    return "transformer"


def examine(family: str) -> Row:
    """One row of the table; a failure becomes the row's reason."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    name = smallest(family)
    kind, reason = "?", "no input size runs"
    for base in bases(name):
        try:
            with torch.no_grad(), base.freezer.frozen():
                trace, _ = record(base.module, base.example())
            kind = kind_of(base.module, trace)
            stages = base.anatomy.stages
        except dp.DeltapatchError as error:
            reason = str(error)
            continue
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        found = f"{len(stages)} ({', '.join(str(len(s.sub_blocks)) for s in stages)})"
        patched, reason, exact = try_patch(base)
        return Row(family, name, kind, found, patched, reason, exact, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return Row(family, name, kind, "-", False, reason.splitlines()[0][:120], True, seconds)


@torch.no_grad()
def try_patch(base: Base) -> tuple[bool, str, bool]:
    """Whether a delta patch acts on all stages, why not, and whether the base stayed what it was."""
    images = base.example()
    model = dp.PatchedModel(base)
    before, weights = model(images), fingerprint(base.module)
    torch.manual_seed(1)
    reason = ""
    try:
        patch = dp.methods.Delta("all", norm="both", start="plain").build(base, ["a", "b"])
        model.add_patch("all", patch)
        logits = model(images, patch="all")
        with model.active("all"):
            features = record_head_input(base, images)
        plain = record_head_input(base, images)
        if logits.shape != (len(images), 2) or not torch.isfinite(logits).all():
            reason = "the patched model's logits are not finite"
        elif torch.equal(features, plain):
            reason = "the patch does not reach the features"
    except dp.DeltapatchError as error:
        reason = str(error)
    exact = torch.equal(before, model(images)) and weights == fingerprint(base.module)
    return not reason, reason, exact


def record_head_input(base: Base, images: torch.Tensor) -> torch.Tensor:
    """What the classifier is given (the output where there is none)."""
    path = base.anatomy.head.path
    if path is None:
        return base.module.eval()(images).clone()
    noted: list[torch.Tensor] = []
    classifier = base.submodule(path)
    hook = classifier.register_forward_pre_hook(lambda module, given: noted.append(given[0].clone()))
    try:
        base.module(images)
    finally:
        hook.remove()
    return noted[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="timm modules")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    families = options.only or sorted(m for m in timm.list_modules() if timm.list_models(module=m))
    started = time.perf_counter()
    with get_context("spawn").Pool(options.processes, maxtasksperchild=8) as pool:
        rows = []
        for row in pool.imap(examine, families):
            rows.append(row)
            words = (
                f"{row.family:<24} {row.model:<34} {row.seconds:5.0f} s  {row.stages:<22} {row.reason[:50]}"
            )
            print(words, flush=True)
    report(rows, time.perf_counter() - started, options.out)


def report(rows: list[Row], seconds: float, path: Path) -> None:
    """Prints and writes the table and its totals."""
    table = [
        f"| {r.family} | {r.model} | {r.kind} | {r.stages} |"
        f" {'patched' if r.patched else 'refused: ' + r.reason} | {'yes' if r.base_exact else 'NO'} |"
        for r in rows
    ]
    with_convolutions = [r for r in rows if r.kind in ("convolutional", "hybrid")]
    totals = [
        f"- convolutional and hybrid families: {share(with_convolutions)}",
        f"- all families: {share(rows)}",
        f"- base exact: {sum(r.base_exact for r in rows)} of {len(rows)}",
        f"- timm {timm.__version__}, torch {torch.__version__}; {seconds / 60:.0f} minutes",
    ]
    lines = [
        "# Coverage of timm's model families",
        "",
        *totals,
        "",
        "| family | smallest model | kind | stages (sub-blocks) | delta on all stages | base exact |",
        "|---|---|---|---|---|---|",
        *table,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def share(rows: list[Row]) -> str:
    patched = sum(row.patched for row in rows)
    return f"{patched} of {len(rows)} patched ({patched / max(len(rows), 1):.1%})"


if __name__ == "__main__":
    main()
