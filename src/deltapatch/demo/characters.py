"""Printed characters: white ink on black, drawn from matplotlib's own fonts and distorted at random.

No download is needed and nothing is stored: an image is a function of its seed.
"""

from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional

FontSet = Literal["training", "held-out"]

# The 47 classes of EMNIST's "balanced" set, which leaves out small letters that are taken for their capitals.
CLASSES: tuple[str, ...] = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")

IMAGE_SIZE = 32

# cmmi10 and cmsy10 are left out of both: their digits are old-style figures and symbols.
# The test holds out whole designs, because the styles of one family share their shapes.
FONT_FILES: dict[FontSet, tuple[str, ...]] = {
    "training": (
        "DejaVuSans.ttf",
        "DejaVuSans-Bold.ttf",
        "DejaVuSans-Oblique.ttf",
        "DejaVuSans-BoldOblique.ttf",
        "DejaVuSansMono.ttf",
        "DejaVuSansMono-Bold.ttf",
        "DejaVuSansMono-Oblique.ttf",
        "DejaVuSansMono-BoldOblique.ttf",
        "DejaVuSerif.ttf",
        "DejaVuSerif-Bold.ttf",
        "DejaVuSerif-Italic.ttf",
        "DejaVuSerif-BoldItalic.ttf",
        "cmb10.ttf",
        "cmr10.ttf",
        "cmti10.ttf",
    ),
    "held-out": (
        "STIXGeneral.ttf",
        "STIXGeneralBol.ttf",
        "STIXGeneralItalic.ttf",
        "STIXGeneralBolIta.ttf",
        "cmss10.ttf",
        "cmtt10.ttf",
    ),
}

# Glyphs are drawn at twice the size of the images, so that strokes can change by half a pixel.
GLYPH_SIZE = 2 * IMAGE_SIZE
GLYPH_EXTENT = 44
IMAGES_AT_ONCE = 1000


def render_characters(count: int, seed: int, fonts: FontSet) -> tuple[np.ndarray, np.ndarray]:
    """Draws characters in random order, each class as often as every other (give or take one).

    Args:
        count: number of images.
        seed: the same seed gives the same images.
        fonts: ``training`` for the fonts that the demo's base has seen, ``held-out`` for other designs.

    Returns:
        Images, uint8 of shape (count, 32, 32), and labels, int64 of shape (count,), that index `CLASSES`.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(CLASSES))
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for start in range(0, count, IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        images[part] = _render(labels[part], fonts, rng)
    return images, labels


def _render(labels: np.ndarray, fonts: FontSet, rng: Generator) -> np.ndarray:
    glyphs = _glyphs(fonts)
    font = rng.integers(len(glyphs), size=len(labels))
    ink = torch.from_numpy(glyphs[font, labels]).unsqueeze(1).float() / 255
    ink = _change_thickness(ink, rng)
    ink = _warp(ink, rng)
    ink = _blur(ink, rng)
    picture = _expose(ink, rng)
    return (picture.squeeze(1) * 255).round().to(torch.uint8).numpy()


@cache
def _glyphs(fonts: FontSet) -> np.ndarray:
    """Every class in every font, undistorted: uint8 of shape (fonts, classes, 64, 64)."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    loaded = [ImageFont.truetype(folder / file, 2 * GLYPH_SIZE) for file in FONT_FILES[fonts]]
    return np.stack([np.stack([_draw(character, font) for character in CLASSES]) for font in loaded])


def _draw(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One character in the middle, its longer side always as long: size tells nothing about the class."""
    left, top, right, bottom = font.getbbox(character)
    drawn = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(drawn).text((-left, -top), character, fill=255, font=font)
    square = ImageOps.pad(drawn, (GLYPH_EXTENT, GLYPH_EXTENT), Image.Resampling.LANCZOS)
    return np.pad(np.asarray(square), (GLYPH_SIZE - GLYPH_EXTENT) // 2)


def _change_thickness(ink: Tensor, rng: Generator) -> Tensor:
    """Blends each glyph of (N, 1, 64, 64) with its dilation or, less far, with its erosion."""
    amount = _uniform(rng, -0.4, 1.0, (len(ink), 1, 1, 1))
    dilated = functional.max_pool2d(ink, kernel_size=5, stride=1, padding=2)
    eroded = -functional.max_pool2d(-ink, kernel_size=3, stride=1, padding=1)
    return ink + amount.clamp(min=0) * (dilated - ink) + (-amount).clamp(min=0) * (eroded - ink)


def _warp(ink: Tensor, rng: Generator) -> Tensor:
    """Rotates, shears, scales, moves and bends glyphs of (N, 1, 64, 64) into images of (N, 1, 32, 32)."""
    grid = functional.affine_grid(_affine(len(ink), rng), [len(ink), 1, IMAGE_SIZE, IMAGE_SIZE], False)
    bends = torch.from_numpy(rng.normal(0, 0.05, (len(ink), 2, 5, 5))).float()
    bends = functional.interpolate(bends, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=True)
    return functional.grid_sample(ink, grid + bends.permute(0, 2, 3, 1), align_corners=False)


def _affine(count: int, rng: Generator) -> Tensor:
    """Random maps from image to glyph coordinates, both -1..1, of shape (count, 2, 3)."""
    angle = torch.deg2rad(_uniform(rng, -12, 12, (count,)))
    shear = _uniform(rng, -0.2, 0.2, (count,))
    width, height = _uniform(rng, 0.8, 1.15, (2, count))
    right, down = _uniform(rng, -0.12, 0.12, (2, count))
    cosine, sine = angle.cos(), angle.sin()
    rows = [
        torch.stack([cosine / width, (shear * cosine - sine) / height, right], dim=1),
        torch.stack([sine / width, (shear * sine + cosine) / height, down], dim=1),
    ]
    return torch.stack(rows, dim=1)


def _blur(ink: Tensor, rng: Generator) -> Tensor:
    amount = _uniform(rng, 0, 1, (len(ink), 1, 1, 1))
    return ink.lerp(functional.avg_pool2d(ink, kernel_size=3, stride=1, padding=1), amount)


def _expose(ink: Tensor, rng: Generator) -> Tensor:
    """Gives ink and background their brightness and adds noise; the result is 0..1."""
    background, brightness, noise = (
        _uniform(rng, low, high, (len(ink), 1, 1, 1)) for low, high in ((0, 0.15), (0.5, 1), (0, 0.08))
    )
    grain = torch.from_numpy(rng.standard_normal(ink.shape, dtype=np.float32))
    return (background + (brightness - background) * ink + noise * grain).clamp(0, 1)


def _uniform(rng: Generator, low: float, high: float, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape)).float()
