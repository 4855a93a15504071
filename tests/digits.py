"""Small pieces of scikit-learn's handwritten digits, written the ways in which deltapatch reads images."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deltapatch.demo.base import handwritten_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@cache
def digits() -> dict[str, Any]:
    """The splits of the demo's new task; read once."""
    return handwritten_digits()


def write_digits(path: Path, train: int = 64, val: int = 40, test: int = 40, **replaced: Any) -> Path:
    """Writes the start of each split as ``.npz``; keyword arguments replace arrays; None leaves one out."""
    arrays: dict[str, Any] = {"classes": np.array(NAMES)}
    for split, count in (("train", train), ("val", val), ("test", test)):
        arrays[f"{split}_images"] = digits()[f"{split}_images"][:count]
        arrays[f"{split}_labels"] = digits()[f"{split}_labels"][:count]
    arrays |= replaced
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def write_tree(folder: Path, classes: tuple[int, ...], count: int, split: str = "train") -> Path:
    """Writes ``count`` images of each of the given digits as ``folder/NAME/NUMBER.png``."""
    images, labels = digits()[f"{split}_images"], digits()[f"{split}_labels"]
    for digit in classes:
        (folder / NAMES[digit]).mkdir(parents=True)
        for number, image in enumerate(images[labels == digit][:count]):
            Image.fromarray(image).save(folder / NAMES[digit] / f"{number:03}.png")
    return folder


def write_bad_image(path: Path) -> Path:
    """Writes the first half of a PNG file, as a broken download leaves it."""
    Image.fromarray(digits()["train_images"][0]).save(path, "PNG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
