"""What the speed benchmarks share: options, interleaved rounds, random patches, multiply-adds, the table."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deltapatch as dp
from deltapatch.method import Method, make_method
from deltapatch.split import Split, split_before

RESULTS = Path(__file__).resolve().parents[1] / "results"
NETWORKS = ("resnet18", "resnet50", "convnext_tiny")
DELTA_MODULES = ("published", "light")
CLASSES = tuple(f"class {index}" for index in range(10))
PIXELS = 224
MEGABYTE = 2**20

T = TypeVar("T")

# --- options ----------------------------------------------------------------------------------------------


def arguments(description: str | None, name: str, rounds: int) -> argparse.ArgumentParser:
    """Options of every speed benchmark; the table goes to ``benchmarks/results/speed_<name>.md``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds, help="each contestant runs once in a round")
    parser.add_argument("--out", type=Path, default=RESULTS / f"speed_{name}.md")
    return parser


def network_arguments(
    description: str | None,
    name: str,
    rounds: int,
    batch: int,
    networks: Sequence[str] = NETWORKS,
    delta: Sequence[str] = DELTA_MODULES,
) -> argparse.ArgumentParser:
    """Options of the benchmarks that run networks, as `arguments` and: which, on what, in which batches."""
    parser = arguments(description, name, rounds)
    parser.add_argument("--batch", type=int, default=batch, help="images in a batch")
    parser.add_argument("--networks", nargs="+", default=list(networks), help="names that timm knows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--delta", nargs="+", choices=DELTA_MODULES, default=list(delta), help="Δ-modules")
    return parser


# --- what is measured -------------------------------------------------------------------------------------


def random_base(name: str, device: str) -> dp.Base:
    """timm's network with random weights at 224 pixels; a picture of that size is used as it is."""
    torch.manual_seed(0)
    return dp.load_base(f"timm/{name}", weights="random", size=PIXELS, crop_pct=1.0, device=device)


def delta_method(module: str) -> Method:
    """Δ on the last stage, with the published or the light Δ-module."""
    return make_method("delta", {"modules": 1, "module": module})


def randomise(patch: dp.Patch, seed: int) -> dp.Patch:
    """Moves all parameters of a patch at random, so that no two patches are alike and no gain is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return patch


def random_patch(base: dp.Base, module: str, seed: int) -> dp.Patch:
    """A patch with random parameters, as if it had been fitted."""
    return randomise(delta_method(module).build(base, CLASSES, seed=seed), seed)


class PeerUnavailable(Exception):
    """A peer cannot be measured; the message is what the table says instead of a number."""


def add_lora(module: nn.Module, head: str, adapters: Iterable[str]) -> Any:
    """PEFT's LoRA of rank 8 on all convolutions, with a head of its own for each adapter.

    Args:
        module: the network, which PEFT changes; or what this function returned, to add more adapters.
        head: name of the network's classifier.
        adapters: names of the adapters to add.

    Raises:
        PeerUnavailable: PEFT is not installed, or cannot wrap this network.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise PeerUnavailable("not installed") from error
    convolutions = [name for name, inner in module.named_modules() if type(inner) is nn.Conv2d]
    wrapped: Any = module
    for adapter in adapters:
        try:
            if isinstance(wrapped, PeftModel):
                wrapped.add_adapter(adapter, wrapped.peft_config[wrapped.active_adapter])
            else:
                config = LoraConfig(r=8, target_modules=convolutions, modules_to_save=[head])
                wrapped = get_peft_model(wrapped, config, adapter_name=adapter)
        except (ValueError, NotImplementedError, TypeError) as error:
            raise PeerUnavailable(f"refused: {str(error).splitlines()[0]}") from error
    return wrapped


# --- multiply-adds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Multiply-adds as shares of the base's own, of which there are 1 + δ with a patch.

    Attributes:
        trunk: τ, all before the first sub-block of the patched stage.
        first: β, that sub-block: the same for all patches.
        delta_first: the Δ-module's first layer, whose input needs no gradient.
        delta_rest: its other layers.
    """

    trunk: float
    first: float
    delta_first: float
    delta_rest: float

    @property
    def tail(self) -> float:
        """λ = 1 − τ."""
        return 1 - self.trunk

    @property
    def delta(self) -> float:
        """δ, the whole Δ-module."""
        return self.delta_first + self.delta_rest

    def many(self, patches: int) -> float:
        """How many times fewer multiply-adds T patches need together than one after the other: 1 / R(T)."""
        shared = self.trunk + self.first
        own = self.tail - self.first + self.delta
        return patches * (1 + self.delta) / (shared + patches * own)

    def fitting(self, cached: bool) -> float:
        """How many times fewer multiply-adds a fitting step needs than full fine-tuning, which needs about
        three forward passes.
        """
        forward = self.tail if cached else 1.0
        gradients = self.tail - self.first
        return 3 / (forward + gradients + 2 * self.delta_first + 3 * self.delta_rest)


@torch.no_grad()
def multiply_adds(call: Callable[[], object]) -> float:
    """Multiply-adds of what a call computes in convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


@torch.no_grad()
def shares(base: dp.Base, module: str) -> Shares:
    """The shares of a base and a patch on its last stage, counted in forward passes of one image."""
    patch = delta_method(module).build(base)  # without a head: what it adds is the Δ-module
    split, image = split_of(base, patch), base.example(1)
    model = dp.PatchedModel(base)
    model.add_patch("delta", patch)
    first = base.submodule(patch.sites[0].sub_blocks[0].path)
    first_layer = next(m for m in patch.parts.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    whole = multiply_adds(lambda: model(image, patch=None))
    delta = multiply_adds(lambda: model(image, patch="delta")) - whole
    given = noted_input(first_layer, lambda: model(image, patch="delta"))
    delta_first = multiply_adds(lambda: first_layer(given))
    given = noted_input(first, lambda: model(image, patch=None))
    return Shares(
        trunk=multiply_adds(lambda: split.trunk(image)) / whole,
        first=multiply_adds(lambda: first(given)) / whole,
        delta_first=delta_first / whole,
        delta_rest=(delta - delta_first) / whole,
    )


def split_of(base: dp.Base, patch: dp.Patch) -> Split:
    """The base cut before the first sub-block that the patch touches."""
    split = split_before(base, patch.sites[0].sub_blocks[0].path)
    assert split is not None, f"{base.name} cannot be split"
    return split


def noted_input(module: nn.Module, call: Callable[[], object]) -> Tensor:
    """What the module is given during the call."""
    given: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()))
    try:
        call()
    finally:
        hook.remove()
    return given[0]


# --- time -------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of a call, until the device is done with it."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contestants: Mapping[str, Callable[[], T]], rounds: int, quiet: bool = False
) -> dict[str, list[T]]:
    """What each contestant measures of itself in each round, in the order A B C A B C ...

    Whatever else loads the machine meanwhile then slows all of them, and a ratio within a round holds.
    """
    measured: dict[str, list[T]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name, contestant in contestants.items():
            measured[name].append(contestant())
        if not quiet:
            print(f"  round {number} of {rounds}", flush=True)
    return measured


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


# --- the table --------------------------------------------------------------------------------------------


def machine(threads: int, device: str = "cpu") -> str:
    """What it ran on, in general words: kind of processor, threads, torch, device."""
    processor = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.device(device).type == "cuda":
        device += " of compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    number = f"{threads} thread" if threads == 1 else f"{threads} threads"
    return f"Processor {processor} ({capability}), {number}; torch {torch.__version__}; device {device}."


def write_table(
    path: Path, title: str, notes: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints a Markdown table under a title and notes, and writes it to a file."""
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    table += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    text = "\n".join([f"# {title}", "", *notes, "", *table]) + "\n"
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
