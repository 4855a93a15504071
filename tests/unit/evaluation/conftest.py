"""Evaluations and a report that the tests of the evaluation room share."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from deltapatch.evaluation.metrics import Evaluation
from deltapatch.evaluation.report import Epoch, Example, Report, SkipWeights


@pytest.fixture
def answers() -> Callable[..., Evaluation]:
    """An evaluation from labels and predictions, each prediction with the same confidence."""

    def evaluate(
        labels: Sequence[int], predictions: Sequence[int], classes: str = "abc", confidence: float = 0.8
    ) -> Evaluation:
        rest = (1 - confidence) / (len(classes) - 1)
        probabilities = np.full((len(labels), len(classes)), rest, np.float32)
        probabilities[np.arange(len(labels)), predictions] = confidence
        return Evaluation(tuple(classes), np.asarray(labels, np.int64), probabilities)

    return evaluate


@pytest.fixture
def skip_weights() -> Callable[..., SkipWeights]:
    """Random weights of a stage; the base has the skips from one state to the next."""

    def make(sub_blocks: int, classes: int = 3) -> SkipWeights:
        random = np.random.default_rng(0)
        none = np.triu(np.full((sub_blocks, sub_blocks), np.nan), 1)
        return SkipWeights(
            stage="layer4",
            sub_blocks=sub_blocks,
            mean=none + random.random((sub_blocks, sub_blocks)),
            spread=none + random.random((sub_blocks, sub_blocks)) / 10,
            existing=np.eye(sub_blocks, dtype=bool),
            per_class=none + random.random((classes, sub_blocks, sub_blocks)),
        )

    return make


@pytest.fixture
def make_report(answers: Callable[..., Evaluation]) -> Callable[..., Report]:
    """A report without drawings, which take long; keyword arguments replace fields."""

    def make(**fields: object) -> Report:
        patch = answers([0, 0, 1, 1, 2], [0, 0, 1, 1, 1])
        defaults: dict[str, object] = {
            "title": "Letters",
            "base": "resnet18",
            "fingerprint": "sha256:0123",
            "method": "delta, modules=1",
            "classes": patch.classes,
            "data": {"training images": 40, "seed": 7},
            "patch": patch,
            "head_only": answers([0, 0, 1, 1, 2], [0, 1, 1, 1, 1]),
            "base_unchanged": "The base is as it was.",
            "history": (),
            "examples": (Example("c", "b", 0.8, "test/c/1.png", Image.new("RGB", (200, 100), "red")),),
            "skips": (),
            "parameters": 1234,
            "file_bytes": 5000,
            "seconds": 65.0,
            "versions": {"torch": "2.15"},
        }
        return Report(**(defaults | fields))

    return make


@pytest.fixture
def drawn(skip_weights: Callable[..., SkipWeights]) -> dict[str, object]:
    """The fields that are drawn: two learning curves, a stage as arcs and heat map, and its three classes."""
    history = (Epoch(1, 1.5, 0.4, 1.6, 0.3, 0.01, 2.0), Epoch(2, 0.9, 0.7, None, None, 0.005, 2.0))
    return {"history": history, "skips": (skip_weights(3),)}
