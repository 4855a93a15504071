"""The demo's base, a small ResNet that reads printed characters, and the new task it is patched to."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from deltapatch.demo.characters import CLASSES, IMAGE_SIZE, render_characters
from deltapatch.preprocessing import Preprocessing

# The stages' outputs have 8, 4, 2 and 2 pixels a side; with timm's usual stride the last would have one.
ARCHITECTURE: Final = "resnet18"
ARCHITECTURE_ARGUMENTS: Final[dict[str, Any]] = {
    "in_chans": 1,
    "num_classes": len(CLASSES),
    "channels": (16, 32, 64, 128),
    "stem_type": "deep",
    "stem_width": 16,
    "output_stride": 16,
}
PREPROCESSING: Final = Preprocessing(
    input_size=(1, IMAGE_SIZE, IMAGE_SIZE), mean=(0.2,), std=(0.23,), crop_pct=1.0
)
WEIGHTS: Final = Path(__file__).with_name("printed_characters.safetensors")

# Training renders with the seeds from 0 up, one per epoch.
OLD_TASK_TEST_SEED: Final = 2_000_000

# A digit fills its 8 x 8 pixels from edge to edge; printed characters leave about this many pixels free.
DIGIT_BORDER: Final = 4
DIGIT_BRIGHTEST: Final = 16


def build_demo_model(weights: Path = WEIGHTS) -> nn.Module:
    """Builds the base with its trained weights in float32, in eval mode.

    It gets 96.9 % of `old_task_test` right, and 98.9 % of new images in the fonts that it was trained on.

    Args:
        weights: what ``benchmarks/train_demo_base.py`` wrote; the file that comes with the package.
    """
    model = timm.create_model(ARCHITECTURE, **ARCHITECTURE_ARGUMENTS)
    model.load_state_dict(load_file(weights), strict=True)
    return model.eval()


def to_input(images: np.ndarray) -> Tensor:
    """Applies `PREPROCESSING` to images that have its size: uint8 (N, 32, 32) to float32 (N, 1, 32, 32)."""
    scaled = torch.from_numpy(images).unsqueeze(1).float() / 255
    return (scaled - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]


def old_task_test(count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Draws the supporting task's test set: printed characters in fonts that the base has never seen.

    Returns:
        Images, uint8 of shape (count, 32, 32), and labels, int64 of shape (count,), that index `CLASSES`.
    """
    return render_characters(count, OLD_TASK_TEST_SEED, "held-out")


def handwritten_digits(seed: int = 0) -> dict[str, np.ndarray]:
    """Reads the patching task: scikit-learn's 1797 handwritten digits, white on black, enlarged to 32 x 32.

    Args:
        seed: decides which images are for training (50 %), validation (20 %) and testing (30 %); each split
            has its share of every digit.

    Returns:
        Arrays under MedMNIST's keys: ``train_images``, uint8 of shape (N, 32, 32), ``train_labels``, int64 of
        shape (N,), the same for ``val`` and ``test``, and ``classes``, the ten names.
    """
    pixels, labels = load_digits(return_X_y=True)
    images = np.stack([_enlarge(image) for image in pixels.reshape(-1, 8, 8)])
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=seed)
    train, val = train_test_split(rest, test_size=0.2 / 0.7, stratify=labels[rest], random_state=seed)
    arrays = {"classes": np.array([str(digit) for digit in range(10)])}
    for split, rows in (("train", train), ("val", val), ("test", test)):
        arrays[f"{split}_images"] = images[rows]
        arrays[f"{split}_labels"] = labels[rows].astype(np.int64)
    return arrays


def write_digits_npz(path: Path, seed: int = 0) -> None:
    """Writes `handwritten_digits` as an ``.npz`` file that deltapatch reads like any other set."""
    arrays: dict[str, Any] = {**handwritten_digits(seed)}
    # An open file, because numpy would add .npz to a path that does not end in it.
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _enlarge(digit: np.ndarray) -> np.ndarray:
    """Brings 8 x 8 values of 0..16 to the size, the margin and the brightness of a printed character."""
    side = IMAGE_SIZE - 2 * DIGIT_BORDER
    grey = Image.fromarray((digit * (255 / DIGIT_BRIGHTEST)).round().astype(np.uint8))
    return np.pad(np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC)), DIGIT_BORDER)
