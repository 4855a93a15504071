"""The bases and image sets of the accuracy benchmarks, found in the shared folder."""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import deltapatch as dp
from deltapatch.data import ImageSet, TaskData, open_data

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DELTAPATCH_SHARED", REPOSITORY.parent / "shared"))


@dataclass(frozen=True)
class Setting:
    """One base and one task."""

    base: str
    task: str


SETTINGS = (
    Setting("MobileNetV2", "flowers5"),
    Setting("MobileNetV2", "dtd10"),
    Setting("MobileNetV2", "brain_tumor_mri"),
    Setting("MobileNetV2", "bccd_cells"),
    Setting("ResNet-56", "omniglot"),
    Setting("ResNet-56", "mnist"),
)


def load_base(name: str, size: int) -> dp.Base:
    """MobileNetV2 trained on ImageNet at ``size`` pixels, or the CIFAR-10 ResNet-56 at its 32."""
    if name == "MobileNetV2":
        weights = SHARED / "weights" / "mobilenet_v2_imagenet.safetensors"
        return dp.load_base("torchvision/mobilenet_v2", weights=weights, classes="imagenet1k", size=size)
    weights = SHARED / "weights" / "cifar10_resnet56.safetensors"
    source = f"{REPOSITORY / 'examples' / 'cifar_resnet.py'}:resnet56"
    return dp.load_base(source, weights=weights, size=32, crop_pct=1.0, name="ResNet-56")


def load_task(name: str, most_train: int | None, most_test: int | None) -> TaskData:
    """The set with at most so many training and test images (the splits are shuffled, so a prefix is a
    mix).
    """
    task = open_data(SHARED / "data" / f"{name}.npz")
    return replace(task, train=_prefix(task.train, most_train), test=_prefix(task.test, most_test))


def development_split(task: TaskData, most: int, seed: int) -> TaskData:
    """Training and validation images put together, ``most`` of them, and halved again by class; no test
    images.
    """
    assert task.train is not None
    rng = np.random.default_rng(seed)
    images = task.train
    order = rng.permutation(len(images))[:most]
    fit_rows: list[int] = []
    judge_rows: list[int] = []
    for label in np.unique(images.labels[order]):
        rows = order[images.labels[order] == label]
        fit_rows += rows[: -(-len(rows) // 2)].tolist()
        judge_rows += rows[-(-len(rows) // 2) :].tolist()
    return replace(task, train=images.subset(fit_rows), val=images.subset(judge_rows), test=None)


def _prefix(images: ImageSet | None, most: int | None) -> ImageSet | None:
    if images is None or most is None or len(images) <= most:
        return images
    return images.subset(range(most))


def arguments(description: str, out: str) -> argparse.ArgumentParser:
    """Options that the accuracy benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=96, help="input pixels of MobileNetV2")
    parser.add_argument("--only", nargs="*", default=None, help="names of image sets")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / out)
    return parser


def write_table(path: Path, title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a Markdown table and writes it to a file."""
    lines = [f"# {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
