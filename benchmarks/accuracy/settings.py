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


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_OF_IMAGENET = {
    "MobileNetV2": ("torchvision/mobilenet_v2", "mobilenet_v2_imagenet"),
    "SqueezeNet": ("torchvision/squeezenet1_1", "squeezenet1_1_imagenet"),
    "MobileNetV2-birds": ("torchvision/mobilenet_v2", "mobilenet_v2_inat_bird"),
}
_OF_CIFAR10 = {
    "ResNet-20": ("examples/cifar_resnet.py:resnet20", "cifar10_resnet20"),
    "ResNet-56": ("examples/cifar_resnet.py:resnet56", "cifar10_resnet56"),
    "ViT": ("tests/real/networks.py:cifar_transformer", "cifar10_vit"),
}
_OF_MNIST = {"MNIST-ViT": ("tests/real/networks.py:mnist_transformer", "mnist_vit")}
BASES = (*_OF_IMAGENET, *_OF_CIFAR10, *_OF_MNIST)


def load_base(name: str, size: int) -> dp.Base:
    """A base trained on large images at ``size`` pixels, or one trained on CIFAR-10 or MNIST at its own."""
    source, weights = (_OF_IMAGENET | _OF_CIFAR10 | _OF_MNIST)[name]
    path = SHARED / "weights" / f"{weights}.safetensors"
    if name in _OF_IMAGENET:
        classes = None if name == "MobileNetV2-birds" else "imagenet1k"
        return dp.load_base(source, weights=path, classes=classes, size=size, name=name)
    if name in _OF_MNIST:
        return dp.load_base(
            str(REPOSITORY / source), weights=path, size=28, mean=0.1307, std=0.3081, name=name
        )
    normalised = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)} if name == "ViT" else {}
    return dp.load_base(
        str(REPOSITORY / source),
        weights=path,
        size=32,
        crop_pct=1.0,
        name=name,
        classes=CIFAR10_CLASSES,
        **normalised,
    )


def capped_set(name: str, folder: Path, most: dict[str, int]) -> Path:
    """A copy of a set in ``folder`` with at most so many images a split, as a file that `compare` opens.

    The splits are shuffled, so that their first images are a mix of classes.
    """
    path = folder / f"{name}.npz"
    with np.load(SHARED / "data" / f"{name}.npz", allow_pickle=False) as whole:
        arrays = {key: whole[key] for key in whole.files}
    for split, count in most.items():
        for kind in ("images", "labels"):
            arrays[f"{split}_{kind}"] = arrays[f"{split}_{kind}"][:count]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


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
