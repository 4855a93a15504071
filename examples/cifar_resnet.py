"""The ResNets for 32 x 32 images of He et al. 2015, section 4.2: a model of one's own, as `load_base` takes
it.

deltapatch anatomy examples/cifar_resnet.py:resnet20 --size 32 --weights random

`random_resnet` is the same network with projected shortcuts and with random weights that a seed gives again,
bit for bit: a base that needs no file of weights, so that seed and patch are the whole model.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: every second pixel, new channels padded
    with zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ProjectedBlock(BasicBlock):
    """The same with a 1x1 convolution and its own normalisation as shortcut where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != channels:
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int, num_classes: int = 10, block: type[BasicBlock] = BasicBlock) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, block)
        self.layer2 = _stage(16, 32, blocks, 2, block)
        self.layer3 = _stage(32, 64, blocks, 2, block)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _stage(
    in_channels: int, channels: int, blocks: int, stride: int, block: type[BasicBlock]
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """20 layers: three blocks a stage."""
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """56 layers: nine blocks a stage."""
    return CifarResNet(9, num_classes)


def random_resnet(depth: int, num_classes: int = 10, seed: int = 0) -> CifarResNet:
    """A network with projected shortcuts and weights N(0, 2 / fan-in) that depend on the seed alone.

    Args:
        depth: 6 D + 2 layers for D blocks a stage: 8, 14, 20, 32, 56, 110, ...
        num_classes: outputs of the classifier.
        seed: from 0 to 2**32 - 1.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6 D + 2 for a whole D of 1 or more (8, 14, 20, ...), not {depth}")
    module = CifarResNet(blocks, num_classes, ProjectedBlock)
    _draw_weights(module, seed)
    return module


def resnet14_random(num_classes: int = 10) -> CifarResNet:
    """14 layers with the random weights of seed 0."""
    return random_resnet(14, num_classes)


def resnet20_random(num_classes: int = 10) -> CifarResNet:
    """20 layers with the random weights of seed 0."""
    return random_resnet(20, num_classes)


@torch.no_grad()
def _draw_weights(module: nn.Module, seed: int) -> None:
    """Every weight matrix has a stream of its own, from the one generator of numpy that is kept as it is for
    good: another version of a library gives the same weights. Biases are 0.
    """
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel()
            drawn = np.random.RandomState([seed, number]).standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn * np.sqrt(2 / fan_in)))
        elif name.endswith("linear.bias"):
            parameter.zero_()
