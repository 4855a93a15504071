"""Many patches on one batch: together, in a loop, as separate models, and as PEFT adapters.

Together they should reach 90 % of the speed-up that the multiply-adds allow at 32 patches: with trunk τ, tail
λ = 1 − τ, first sub-block β and Δ-module δ as shares of the base's own multiply-adds, T patches together cost

    R(T) = [τ + β + T(λ − β + δ)] / [T(1 + δ)]

of what they cost one after the other. A trunk that takes a larger share of the time than of the multiply-adds
can bring more than these allow.

    python benchmarks/speed/many.py --rounds 5
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from common import (
    MEGABYTE,
    PeerUnavailable,
    Shares,
    add_lora,
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
from torch import Tensor, nn

import deltapatch as dp

COPIES_MEGABYTES = 4096
TARGET = 0.9
SWITCHED, MIXED, COPIES = "PEFT, one after the other", "PEFT, mixed batch", "separate models"

Timed = Callable[[], float]


class Network:
    """A base and its peers, to which patches and adapters are added as their number grows."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = options
        self.base = random_base(name, options.device)
        self.images = self.base.example(options.batch)
        self.models = {module: dp.PatchedModel(self.base) for module in options.delta}
        self.peer: Any = deepcopy(self.base.module).eval()
        self.names: list[str] = []
        self.why_no_peer = ""

    def grow(self, count: int) -> None:
        """Adds patches and adapters until there are so many."""
        new = [f"task-{index}" for index in range(len(self.names), count)]
        for module, model in self.models.items():
            for index, name in enumerate(new, start=len(self.names)):
                model.add_patch(name, random_patch(self.base, module, index))
        if not self.why_no_peer:
            try:
                self.peer = add_lora(self.peer, self.base.anatomy.head.path or "", new)
                self.peer.eval()
            except PeerUnavailable as error:
                self.why_no_peer = str(error)
        self.names += new

    def contestants(self) -> dict[str, Timed]:
        """All ways to get all answers; names of ours begin with the Δ-module."""
        found: dict[str, Timed] = {}
        for module, model in self.models.items():
            check(model, self.images, self.names)
            found[f"{module} together"] = self.timed(lambda model=model: model.all(self.images, self.names))
            found[f"{module} loop"] = self.timed(lambda model=model: loop(model, self.images, self.names))
        copies = self.copies()
        found[COPIES] = self.timed(lambda: [copy(self.images) for copy in copies])
        if not self.why_no_peer:
            found[SWITCHED] = self.timed(self.switch_adapters)
            if self.mixes:
                found[MIXED] = self.timed(self.mix_adapters)
        return found

    def timed(self, call: Callable[[], object]) -> Timed:
        return lambda: seconds_of(call, self.options.device)

    def copies(self) -> Sequence[nn.Module]:
        """A complete model for each patch; one of them again and again where all would take too much room."""
        module = self.base.module
        if not self.copies_fit:
            return [module] * len(self.names)
        return [deepcopy(module) for _ in self.names]

    @property
    def copies_fit(self) -> bool:
        size = sum(tensor.nbytes for tensor in self.base.module.state_dict().values())
        return len(self.names) * size <= COPIES_MEGABYTES * MEGABYTE

    @property
    def mixes(self) -> bool:
        """Whether a batch in which every adapter answers every image is small enough to be tried."""
        return len(self.names) * len(self.images) <= self.options.mixed

    def switch_adapters(self) -> None:
        for name in self.names:
            self.peer.set_adapter(name)
            self.peer(self.images)

    def mix_adapters(self) -> None:
        rows = self.images.repeat(len(self.names), 1, 1, 1)
        self.peer(rows, adapter_names=[name for name in self.names for _ in range(len(self.images))])


def loop(model: dp.PatchedModel, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The same answers one patch after the other."""
    return {name: model(images, patch=name) for name in names}


def check(model: dp.PatchedModel, images: Tensor, names: Sequence[str]) -> None:
    """Wrong answers have no speed: together and in a loop they must be the same up to rounding."""
    together = model.all(images, names)
    for name in {names[0], names[-1]}:
        torch.testing.assert_close(together[name], model(images, patch=name), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def measure(name: str, options: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """The rows of one network, and what has to be said about them."""
    network = Network(name, options)
    allowed = {module: shares(network.base, module) for module in options.delta}
    rows: list[list[str]] = []
    one_copy: list[str] = []
    notes: list[str] = []
    for count in sorted(options.patches):
        network.grow(count)
        if not network.copies_fit:
            one_copy.append(str(count))
        print(f"{name}, {count} patches", flush=True)
        times = interleaved(network.contestants(), options.rounds)
        rows += [row(network, module, allowed[module], times) for module in options.delta]
    if one_copy:
        notes.append(
            f"{name}: {' and '.join(one_copy)} separate models would take more than {COPIES_MEGABYTES} MB;"
            " one was called as often."
        )
    if network.why_no_peer:
        notes.append(f"{name}: PEFT {network.why_no_peer}")
    return rows, notes


def row(network: Network, module: str, allowed: Shares, times: dict[str, list[float]]) -> list[str]:
    count, together = len(network.names), times[f"{module} together"]
    answers = count * len(network.images) / statistics.median(together)
    faster, floor = ratio(times[f"{module} loop"], together), allowed.many(count)

    def against(peer: str) -> str:
        if peer in times:
            return f"{ratio(times[peer], together):.2f}x"
        return "not run" if network.why_no_peer else f"not run (over {network.options.mixed} images)"

    return [
        network.name,
        f"{module} (τ {allowed.trunk:.3f}, β {allowed.first:.3f}, δ {allowed.delta:.3f})",
        str(count),
        f"{answers:.1f}",
        f"{faster:.2f}x",
        f"{floor:.2f}x",
        f"{faster / floor:.0%}" + (f" (target {TARGET:.0%})" if count == 32 else ""),
        *map(against, (COPIES, SWITCHED, MIXED)),
    ]


def main() -> None:
    parser = network_arguments(__doc__, "many", rounds=3, batch=4)
    parser.add_argument("--images", dest="batch", type=int, help="the same as --batch")
    parser.add_argument("--patches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument(
        "--mixed", type=int, default=256, help="images of the largest mixed batch of PEFT's that is tried"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[list[str]] = []
    notes: list[str] = []
    for name in options.networks:
        new_rows, new_notes = measure(name, options)
        rows, notes = rows + new_rows, notes + new_notes
        report(rows, notes, options)


def report(rows: list[list[str]], notes: list[str], options: argparse.Namespace) -> None:
    first = (
        f"{machine(options.threads, options.device)} fp32, {options.batch} images of 224 pixels in a batch;"
        f" ratios are medians over {options.rounds} interleaved rounds: how many times faster all patches"
        " together are. PEFT: LoRA of rank 8 on all convolutions and a head for each adapter."
    )
    columns = [
        "network",
        "Δ-module",
        "patches",
        "answers/s together",
        "against the loop",
        "multiply-adds allow",
        "share of that",
        "against separate models",
        "against PEFT, set_adapter",
        "against PEFT, mixed batch",
    ]
    write_table(options.out, "Many patches on one batch", [" ".join([first, *notes])], columns, rows)


if __name__ == "__main__":
    main()
