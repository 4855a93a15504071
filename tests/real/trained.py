"""The networks of the shared folder, and what is known about each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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
_MEDIUM: dict[str, Any] = {"size": 96, "crop_pct": 1.0}

NETWORKS = {
    "mobilenet_v2": Network(
        "torchvision/mobilenet_v2", "mobilenet_v2_imagenet", (1, 2, 3, 2, 2), options=_MEDIUM
    ),
    "birds": Network("torchvision/mobilenet_v2", "mobilenet_v2_inat_bird", (1, 2, 3, 2, 2), options=_MEDIUM),
    "squeezenet1_1": Network("torchvision/squeezenet1_1", "squeezenet1_1_imagenet", (), options=_MEDIUM),
    "resnet20": Network(f"{_CIFAR_RESNET}:resnet20", "cifar10_resnet20", (3, 3, 3), options=_SMALL),
    "resnet56": Network(f"{_CIFAR_RESNET}:resnet56", "cifar10_resnet56", (9, 9, 9), options=_SMALL),
    "cifar_vit": Network(f"{_OWN}:cifar_transformer", "cifar10_vit", (6,), options=_CIFAR_VIT),
    "mnist_vit": Network(f"{_OWN}:mnist_transformer", "mnist_vit", (6,), "usps", _MNIST_VIT),
}
PATCHABLE = [name for name, network in NETWORKS.items() if network.sub_blocks]
