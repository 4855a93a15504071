"""Trains the base that the demo ships, on one core and without a download; about a quarter of an hour.

    OMP_NUM_THREADS=1 python benchmarks/train_demo_base.py \\
        --out src/deltapatch/demo/printed_characters.safetensors

Every epoch draws its own images, so none is seen twice. The schedule is fixed and the last weights are kept:
the test images decide nothing.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from deltapatch.demo.base import (
    ARCHITECTURE,
    ARCHITECTURE_ARGUMENTS,
    build_demo_model,
    old_task_test,
    to_input,
)
from deltapatch.demo.characters import render_characters

FAMILIAR_TEST_SEED = 3_000_000


@dataclass(frozen=True)
class Schedule:
    """How the base is trained; the one-cycle schedule spans all epochs."""

    epochs: int = 16
    images_per_epoch: int = 32_000
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.epochs * (self.images_per_epoch // self.batch_size)


def train(schedule: Schedule) -> nn.Module:
    """Trains a base from random weights and prints one line per epoch."""
    torch.manual_seed(schedule.seed)
    model = timm.create_model(ARCHITECTURE, **ARCHITECTURE_ARGUMENTS)
    optimizer = AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    scheduler = OneCycleLR(optimizer, max_lr=schedule.learning_rate, total_steps=schedule.steps)
    for epoch in range(schedule.epochs):
        start = time.perf_counter()
        loss = train_epoch(model, epoch, optimizer, scheduler, schedule)
        print(
            f"epoch {epoch + 1}/{schedule.epochs}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return model


def train_epoch(
    model: nn.Module, epoch: int, optimizer: AdamW, scheduler: OneCycleLR, schedule: Schedule
) -> float:
    """Trains on new images, drawn with the epoch's number as seed, and returns the mean loss."""
    model.train()
    images, labels = render_characters(schedule.images_per_epoch, epoch, "training")
    inputs, targets = to_input(images), torch.from_numpy(labels)
    losses: list[float] = []
    for first in range(0, len(images) - schedule.batch_size + 1, schedule.batch_size):
        batch = slice(first, first + schedule.batch_size)
        logits = model(inputs[batch])
        loss = functional.cross_entropy(logits, targets[batch], label_smoothing=schedule.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def write_weights(model: nn.Module, path: Path) -> None:
    """Writes the weights in float16, which halves the file; an old file stays until the new one is whole."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(save(tensors))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.inference_mode()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((model(to_input(images)).argmax(dim=1).numpy() == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--epochs", type=int, default=Schedule.epochs)
    arguments = parser.parse_args()
    write_weights(train(Schedule(epochs=arguments.epochs)), arguments.out)
    model = build_demo_model(arguments.out)
    familiar = accuracy(model, *render_characters(2000, FAMILIAR_TEST_SEED, "training"))
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB")
    print(f"new images in the training fonts: {familiar:.1%} correct")
    print(f"held-out fonts: {accuracy(model, *old_task_test()):.1%} correct")


if __name__ == "__main__":
    main()
