"""Trained networks from the shared folder, and small pieces of real image sets."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.loading import load_base

LoadNetwork = Callable[..., Base]
OpenSmall = Callable[[str], TaskData]


@dataclass(frozen=True)
class Network:
    """A trained network and what is known about it.

    Attributes:
        source: what `load_base` is given.
        weights: the file's name.
        sub_blocks: how many each stage has.
        task: the real set that it is patched to.
        options: for `load_base`.
    """

    source: str
    weights: str
    sub_blocks: tuple[int, ...]
    task: str = "flowers5"
    options: dict[str, Any] = field(default_factory=dict)


_CIFAR_RESNET = Path(__file__).parents[2] / "examples" / "cifar_resnet.py"
_OWN = Path(__file__).with_name("networks.py")
_SMALL: dict[str, Any] = {"size": 32, "crop_pct": 1.0}
_CIFAR_VIT = _SMALL | {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
_MNIST_VIT = {"size": 28, "crop_pct": 1.0, "mean": 0.1307, "std": 0.3081}
# A fifth of the work of the 224 pixels that these were trained with.
_96_PIXELS = {"size": 96, "crop_pct": 1.0}

NETWORKS = {
    "mobilenet_v2": Network(
        "torchvision/mobilenet_v2", "mobilenet_v2_imagenet", (1, 2, 3, 2, 2), options=_96_PIXELS
    ),
    "birds": Network(
        "torchvision/mobilenet_v2", "mobilenet_v2_inat_bird", (1, 2, 3, 2, 2), options=_96_PIXELS
    ),
    "squeezenet1_1": Network("torchvision/squeezenet1_1", "squeezenet1_1_imagenet", (), options=_96_PIXELS),
    "resnet20": Network(f"{_CIFAR_RESNET}:resnet20", "cifar10_resnet20", (3, 3, 3), options=_SMALL),
    "resnet56": Network(f"{_CIFAR_RESNET}:resnet56", "cifar10_resnet56", (9, 9, 9), options=_SMALL),
    "cifar_vit": Network(f"{_OWN}:cifar_transformer", "cifar10_vit", (6,), options=_CIFAR_VIT),
    "mnist_vit": Network(f"{_OWN}:mnist_transformer", "mnist_vit", (6,), "usps", _MNIST_VIT),
}
PATCHABLE = [name for name, network in NETWORKS.items() if network.sub_blocks]


@pytest.fixture(scope="session")
def load_network(shared: Path) -> LoadNetwork:
    """Loads a network with its trained weights; one object for all tests, since none may change it."""

    @cache
    def load(name: str, size: int | None = None) -> Base:
        network = NETWORKS[name]
        folder = shared / "weights"
        options = network.options | ({} if size is None else {"size": size})
        if name == "birds":
            options |= {"classes": folder / "inat_bird_labels.txt"}
        return load_base(network.source, weights=folder / f"{network.weights}.safetensors", **options)

    return load


@pytest.fixture(scope="session")
def open_small(shared: Path) -> OpenSmall:
    """Opens a real set cut to 32 training, 32 validation and 16 test images."""

    def open_cut(name: str) -> TaskData:
        task = open_data(shared / "data" / f"{name}.npz")
        assert task.train is not None
        assert task.val is not None
        assert task.test is not None
        return replace(
            task,
            train=task.train.subset(range(32)),
            val=task.val.subset(range(32)),
            test=task.test.subset(range(16)),
        )

    return open_cut
