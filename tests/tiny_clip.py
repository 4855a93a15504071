"""A CLIP model small enough to be trained by a test: it reads twelve printed digits and letters."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from deltapatch.demo.characters import CLASSES, render_characters

CHARACTERS = 12
NAMES = tuple(f"character {character}" for character in CLASSES[:CHARACTERS])
CAPTION = "a photo of a {}."

TOWERS: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESSING: dict[str, Any] = {"mean": [0.2, 0.2, 0.2], "std": [0.25, 0.25, 0.25]}

_STEPS = 200
_BATCH = 64
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class TinyClip:
    """A model as open_clip has it, and its two files.

    Attributes:
        model: in eval mode.
        config: a ``.json`` file with the towers and the preprocessing.
        weights: its ``.safetensors`` file.
    """

    model: Any
    config: Path
    weights: Path


def read_characters(count: int, seed: int, fonts: Any) -> tuple[Tensor, Tensor]:
    """About ``count`` images of `NAMES` as the model takes them, (N, 3, 32, 32), and their labels (N,)."""
    images, labels = render_characters(count * len(CLASSES) // CHARACTERS, seed, fonts)
    kept = labels < CHARACTERS
    scaled = torch.from_numpy(images[kept]).unsqueeze(1).float() / 255
    mean, std = (PREPROCESSING[name][0] for name in ("mean", "std"))
    return ((scaled - mean) / std).expand(-1, 3, -1, -1), torch.from_numpy(labels[kept])


def new_tiny_clip(open_clip: Any, folder: Path) -> TinyClip:
    """The model with its starting weights, which are the same every time, and its two files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**TOWERS)
    config, weights = folder / "tiny.json", folder / "tiny.safetensors"
    config.write_text(json.dumps({"model_cfg": TOWERS, "preprocess_cfg": PREPROCESSING}))
    save_file(model.state_dict(), weights)
    return TinyClip(model.eval(), config, weights)


def train_tiny_clip(open_clip: Any, folder: Path) -> TinyClip:
    """The same, with both towers trained together for some seconds, images against captions."""
    tiny = new_tiny_clip(open_clip, folder)
    tokens = open_clip.SimpleTokenizer(context_length=16)([CAPTION.format(name) for name in NAMES])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _train(tiny.model.train(), tokens)
    save_file(tiny.model.eval().state_dict(), tiny.weights)
    return tiny


def _train(model: Any, captions: Tensor) -> None:
    images, labels = read_characters(2000, 0, "training")
    # Captions differ in one token. Tokens of length 1 and fixed make that difference large from the start.
    nn.init.normal_(model.token_embedding.weight)
    model.token_embedding.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    for _ in range(_STEPS):
        rows = torch.randint(len(images), (_BATCH,))
        image_features, text_features, scale = model(images[rows], captions)
        loss = functional.cross_entropy(scale * image_features @ text_features.T, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
