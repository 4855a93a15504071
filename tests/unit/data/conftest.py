"""Small images and trees that the tests of the data room share."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encodes an image, or a noisy 12 x 8 one, in any of Pillow's formats."""

    def encode_image(image: Image.Image | None = None, format: str = "PNG", **options: object) -> bytes:
        noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
        buffer = io.BytesIO()
        (image or Image.fromarray(noise)).save(buffer, format, **options)
        return buffer.getvalue()

    return encode_image


@pytest.fixture
def grow_tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tree from ``{"train/cat": 3}``: so many one-colour 6 x 6 images in each folder."""

    def write(counts: dict[str, int], name: str = "photos") -> Path:
        root = tmp_path / name
        for number, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (6, 6), (40 * number % 256, 10 * index % 256, 0)).save(
                    root / folder / f"{index}.png"
                )
        return root

    return write
