"""Images per second of a fit: full fine-tuning, PEFT LoRA, and Δ-patches with and without the trunk cache.

All train with the same loop on the same images, pictures of smooth noise with labels in turn: as arrays of
224 pixels, which need no decoding, and as JPEG files of 500 x 375 pixels. Each contestant's epoch is measured
once a round. What ours does before its second epoch (filling the cache, fitting the head, the first epoch) is
one row; later epochs are another.

    python benchmarks/speed/fitting.py --rounds 3 --images 128
"""

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from accelerate import Accelerator
from common import (
    CLASSES,
    PIXELS,
    PeerUnavailable,
    add_lora,
    delta_method,
    interleaved,
    machine,
    network_arguments,
    random_base,
    ratio,
    shares,
    write_table,
)
from PIL import Image
from torch import Tensor, nn

import deltapatch as dp
from deltapatch.data import ImageSet, TaskData, evaluation_transform, load_batches, open_data
from deltapatch.fitting.examples import ImageExamples
from deltapatch.fitting.fit import FitConfig, fit_task
from deltapatch.fitting.loop import train

JPEG_SIZE = (500, 375)
FULL, LORA = "full fine-tuning", "PEFT LoRA"
FP32, BF16 = "fp32", "bf16, channels_last"
FULL_TARGETS = {"resnet18": 14, "convnext_tiny": 20, "resnet50": 10}
LORA_TARGET = 15

Epochs = Mapping[str, float]
"""Row -> seconds of one epoch."""


class ImagesToLogits(nn.Module):
    """A peer as the training loop calls it; in ``channels_last`` if wanted."""

    def __init__(self, module: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.module = module.to(memory_format=self.memory_format)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.module(inputs[0].contiguous(memory_format=self.memory_format))


# --- images -----------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int) -> dict[str, Path]:
    """The same kind of pictures twice: how they are stored -> where. Noise is smooth, as photos are."""
    generator = np.random.default_rng(0)
    arrays = [picture(generator, (PIXELS, PIXELS)) for _ in range(count)]
    labels = np.arange(count) % len(CLASSES)
    np.savez(folder / "arrays.npz", train_images=np.stack(arrays), train_labels=labels)
    for index, label in enumerate(labels):
        path = folder / "jpeg" / "train" / CLASSES[label] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(generator, JPEG_SIZE)).save(path, quality=90)
    return {"arrays": folder / "arrays.npz", "JPEG": folder / "jpeg"}


def picture(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """RGB, uint8 of shape (height, width, 3)."""
    coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    grain = generator.normal(0, 4, (size[1], size[0], 3))
    return (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + grain).clip(0, 255).astype(np.uint8)


# --- contestants ------------------------------------------------------------------------------------------


def full_model(name: str, channels_last: bool) -> ImagesToLogits:
    """The network with a new head; all of its parameters train."""
    return ImagesToLogits(timm.create_model(name, pretrained=False, num_classes=len(CLASSES)), channels_last)


def lora_model(name: str, head: str, channels_last: bool) -> ImagesToLogits:
    """The network with PEFT's LoRA and a new head, which train."""
    module = timm.create_model(name, pretrained=False, num_classes=len(CLASSES))
    return ImagesToLogits(add_lora(module, head, ["task"]), channels_last)


def peer_epoch(
    row: str, model: nn.Module, base: dp.Base, images: ImageSet, options: argparse.Namespace
) -> Epochs:
    """One epoch of a peer over all images."""
    precision = "fp32" if row.endswith(FP32) else "bf16"
    config = FitConfig(epochs=1, batch_size=options.batch, learning_rate=1e-4, precision=precision)
    batches = load_batches(
        images.with_transform(evaluation_transform(base.preprocessing)),
        batch_size=options.batch,
        shuffle=True,
        workers=options.workers,
    )
    accelerator = Accelerator(cpu=base.device.type == "cpu")
    outcome = train(model, ImageExamples(batches), None, config, accelerator=accelerator)
    return {row: outcome.history[0].seconds}


def our_epochs(
    module: str, cached: bool, base: dp.Base, task: TaskData, options: argparse.Namespace
) -> Epochs:
    """A fit of three epochs; with a cache, one that begins empty."""
    config = FitConfig(
        epochs=3,
        batch_size=options.batch,
        patience=None,
        precision=options.precision,
        workers=options.workers,
        cache="on" if cached else "off",
    )
    with TemporaryDirectory() as folder:
        os.environ["DELTAPATCH_CACHE"] = folder
        result = fit_task(base, task, delta_method(module), config, progress=False)
    assert result.trunk_kept == cached, "the cache was not used as asked"
    later = [epoch.seconds for epoch in result.history[1:]]
    if not cached:
        return {ours(module, "no cache"): statistics.median(later)}
    return {
        ours(module, "cached, first epoch and all before"): result.seconds - sum(later),
        ours(module, "cached, later epochs"): statistics.median(later),
    }


def ours(module: str, what: str) -> str:
    return f"Δ {module}, {what}"


def contestants(
    base: dp.Base, peers: Mapping[str, nn.Module], task: TaskData, options: argparse.Namespace
) -> dict[str, Callable[[], Epochs]]:
    """All that are measured on one form of the images."""
    assert task.train is not None
    found: dict[str, Callable[[], Epochs]] = {}
    for row, model in peers.items():
        # Libraries choose their kernels at the first step, which is not measured.
        peer_epoch(row, model, base, task.train.subset(range(options.batch)), options)
        found[row] = partial(peer_epoch, row, model, base, task.train, options)
    for module in options.delta:
        for cached in (False, True):
            found[ours(module, str(cached))] = partial(our_epochs, module, cached, base, task, options)
    return found


# --- the table --------------------------------------------------------------------------------------------


def measure(name: str, data: Mapping[str, Path], options: argparse.Namespace) -> list[list[str]]:
    """The rows of one network."""
    base = random_base(name, options.device)
    head = base.anatomy.head.path or ""
    allowed = {module: shares(base, module) for module in options.delta}
    peers: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    for precision in (FP32, BF16):
        peers[f"{FULL}, {precision}"] = full_model(name, precision == BF16)
    for precision in (FP32, BF16):
        try:
            peers[f"{LORA}, {precision}"] = lora_model(name, head, precision == BF16)
        except PeerUnavailable as error:
            refused[f"{LORA}, {precision}"] = str(error)
    floors = {
        ours(module, what): share.fitting(cached)
        for module, share in allowed.items()
        for what, cached in (
            ("no cache", False),
            ("cached, first epoch and all before", False),
            ("cached, later epochs", True),
        )
    }
    rows: list[list[str]] = []
    for form in options.data:
        print(f"{name}, {form}", flush=True)
        task = open_data(data[form], validation=0)
        measured = interleaved(contestants(base, peers, task, options), options.rounds)
        seconds: dict[str, list[float]] = {}
        for epochs in (epochs for rounds in measured.values() for epochs in rounds):
            for row, value in epochs.items():
                seconds.setdefault(row, []).append(value)
        rows += [cells(name, form, row, seconds, floors, options.images) for row in seconds]
        rows += [[name, form, row, reason, *[""] * 6] for row, reason in refused.items()]
    return rows


def cells(
    name: str,
    form: str,
    row: str,
    seconds: Mapping[str, list[float]],
    floors: Mapping[str, float],
    images: int,
) -> list[str]:
    def faster(peer: str) -> str:
        return f"{ratio(seconds[peer], seconds[row]):.2f}x" if peer in seconds else ""

    targets: list[str] = []
    # The published Δ-module alone is a third of resnet50's own multiply-adds.
    if "later epochs" in row and name in FULL_TARGETS and ("light" in row or name != "resnet50"):
        targets = [f"full fp32 ≥ {FULL_TARGETS[name]}x"]
        targets += [f"LoRA fp32 ≥ {LORA_TARGET}x"] if f"{LORA}, {FP32}" in seconds else []
    return [
        name,
        form,
        row,
        f"{images / statistics.median(seconds[row]):.2f}",
        *(faster(f"{peer}, {precision}") for peer in (FULL, LORA) for precision in (FP32, BF16)),
        f"{floors[row]:.1f}x" if row in floors else "",
        ", ".join(targets),
    ]


def main() -> None:
    parser = network_arguments(__doc__, "fitting", rounds=3, batch=16)
    parser.add_argument("--images", type=int, default=128, help="images in an epoch")
    parser.add_argument("--data", nargs="+", choices=["arrays", "JPEG"], default=["arrays", "JPEG"])
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--precision", default="auto", help="of our fits, as FitConfig names it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[list[str]] = []
    with TemporaryDirectory() as folder:
        data = write_images(Path(folder), options.images)
        for name in options.networks:
            rows += measure(name, data, options)
            report(rows, options)


def report(rows: list[list[str]], options: argparse.Namespace) -> None:
    note = (
        f"{machine(options.threads, options.device)} {options.images} images of 224 pixels in batches of"
        f" {options.batch}, ours in precision '{options.precision}'; ratios are medians over {options.rounds}"
        " interleaved rounds. Arrays need no decoding, JPEG files do. Multiply-adds: how many times fewer a"
        " step has than full fine-tuning, at the same precision. PEFT LoRA: rank 8 on all convolutions, and a"
        " new head."
    )
    columns = [
        "network",
        "images as",
        "training",
        "images/s",
        "against full fp32",
        "against full bf16",
        "against LoRA fp32",
        "against LoRA bf16",
        "multiply-adds allow",
        "target",
    ]
    write_table(options.out, "Fitting speed", [note], columns, rows)


if __name__ == "__main__":
    main()
