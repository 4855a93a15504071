"""The networks whose trained weights are in the shared folder, as far as no library has them.

The names of the modules are those of the weights' authors.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """An image cut into patches of 4 x 4 pixels: (N, 3, 32, 32) -> (N, 64, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class CifarTransformer(nn.Module):
    """A vision transformer of six post-norm layers for 32 x 32 images, built from torch's own layers."""

    def __init__(self, num_classes: int = 10, width: int = 128) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, width))
        layer = nn.TransformerEncoderLayer(width, nhead=8, dim_feedforward=256, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers=6)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.pos_embed
        return self.mlp_head(self.transformer(tokens)[:, 0])


def cifar_transformer(num_classes: int = 10) -> nn.Module:
    return CifarTransformer(num_classes)


def mnist_transformer(num_classes: int = 10) -> nn.Module:
    """timm's vision transformer for 28 x 28 grey images, with a classifier of two layers."""
    model = VisionTransformer(
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=64,
        depth=6,
        num_heads=8,
        mlp_ratio=2,
        qkv_bias=False,
        final_norm=False,
    )
    model.head = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, num_classes))
    return model
