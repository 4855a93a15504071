"""The model families that every patch method is held to, as bases with random weights and small inputs."""

from collections.abc import Callable, Mapping
from typing import Final

import timm
import torch
from torch import nn
from toys import OwnNet, enliven

from deltapatch.base import Base
from deltapatch.loading import load_base

SIZE: Final = 64


def _timm(name: str, **options: int) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **options)


FAMILIES: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "resnet18": _timm("resnet18"),
    "resnet50": _timm("resnet50"),
    "convnext_atto": _timm("convnext_atto"),
    "mobilenetv2": _timm("mobilenetv2_100"),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "regnetx_002": _timm("regnetx_002"),
    "densenet121": _timm("densenet121"),
    "vit_tiny": _timm("vit_tiny_patch16_224", img_size=SIZE),
    "own": OwnNet,
}

# Convolutions that other libraries drop the dilation of, or whose weights they standardise twice or not at
# all.
UNUSUAL_CONVOLUTIONS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "dilated": _timm("resnet18", output_stride=8),
    "weight-standardised": _timm("resnetv2_50x1_bit", num_classes=10),
}


def make_base(build: Callable[[], nn.Module], seed: int = 0) -> Base:
    """A base whose random weights and lively norm statistics depend on the seed alone."""
    torch.manual_seed(seed)
    module = build().eval()
    enliven(module, seed)
    return load_base(module, size=SIZE, name=type(module).__name__)
