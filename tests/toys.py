"""Small models whose answers can be worked out by hand, and what tests do to models and patches."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltapatch.base import Base
from deltapatch.loading import load_base
from deltapatch.patch import Patch


class Unit(nn.Module):
    """``relu(W x + x)`` with a 1x1 convolution W; two of them, and a projected x, where the width changes."""

    def __init__(self, width: int, outputs: int | None = None) -> None:
        super().__init__()
        outputs = outputs or width
        self.branch = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False))
        self.projection = None
        if outputs != width:
            self.branch.append(nn.Conv2d(outputs, outputs, 1, bias=False))
            self.projection = nn.Conv2d(width, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x)
        return functional.relu(self.branch(x) + shortcut)


class NormUnit(nn.Module):
    """A residual unit of two 3x3 convolutions with batch normalisation, as in a user's own code."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.project = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.project = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.project(x)
        return functional.relu(y)


class Net(nn.Module):
    """A stem, one stage of the given units, global average pooling and a classifier."""

    def __init__(self, units: Iterable[nn.Module], width: int, features: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stage = nn.Sequential(*units)
        self.fc = nn.Linear(features or width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


class OwnNet(nn.Module):
    """A network that no library knows: a stem and two stages of `NormUnit`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.narrow = nn.Sequential(NormUnit(16, 16), NormUnit(16, 16))
        self.wide = nn.Sequential(NormUnit(16, 32, stride=2), NormUnit(32, 32), NormUnit(32, 32))
        self.classifier = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.wide(self.narrow(self.stem(x))).mean((2, 3)))


def toy_base(units: Sequence[nn.Module] | None = None, width: int = 4, features: int | None = None) -> Base:
    """A base around `Net`, by default with two units of one width, seeded and with 8x8 inputs."""
    torch.manual_seed(0)
    units = [Unit(width), Unit(width)] if units is None else units
    return load_base(Net(units, width, features).eval(), size=8)


@torch.no_grad()
def enliven(module: nn.Module, seed: int = 0) -> None:
    """Gives normalisation layers the statistics and gains of a trained model instead of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            if layer.weight is not None:
                layer.weight.uniform_(0.5, 1.5, generator=generator)


@torch.no_grad()
def disturb(patch: Patch, seed: int = 0, scale: float = 0.1) -> Patch:
    """Moves every floating tensor of a patch, as a fit would, so that its answers differ from the base's.

    Weights of a layer move little enough that a base of random weights stays well-conditioned.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in patch.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            width = scale if tensor.ndim < 2 else scale / tensor[0].numel() ** 0.5
            tensor.add_(torch.randn(tensor.shape, generator=generator) * width)
    return patch


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, in memory of their own."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_state(module: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether a module has exactly these names, in this order, with bit-identical values."""
    found = module.state_dict()
    return list(found) == list(state) and all(torch.equal(found[name], state[name]) for name in found)
