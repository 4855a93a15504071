"""Tasks of a few coloured pictures and a toy base: a fit takes a tenth of a second."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from toys import toy_base

from deltapatch.base import Base
from deltapatch.data import ImageLimits, ImageSet, Provenance, TaskData
from deltapatch.data.sources.npz import ArrayStore
from deltapatch.evaluation.protocols import Supporting
from deltapatch.fitting import interpolating
from deltapatch.fitting.config import FitConfig

ShareWeights = Callable[..., list[tuple[Any, ...]]]
MakeTask = Callable[..., TaskData]


def coloured(labels: np.ndarray, seed: int, title: str) -> ImageSet:
    """Noise of 8x8 pixels, a little brighter in the colour channel of the label."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 180, (len(labels), 8, 8, 3), np.uint8)
    images[np.arange(len(labels)), :, :, labels % 3] += 60
    return ImageSet.of(ArrayStore(images, title), labels, ImageLimits())


@pytest.fixture(scope="session")
def make_task() -> MakeTask:
    """A task with so many images in each split; 0 leaves a split out."""

    def make(
        name: str, seed: int = 0, classes: int = 3, train: int = 24, val: int = 12, test: int = 15
    ) -> TaskData:
        counts = {"train": train, "val": val, "test": test}
        splits = {
            split: coloured(np.arange(count) % classes, 10 * seed + place, f"{name}[{split}]")
            if count
            else None
            for place, (split, count) in enumerate(counts.items())
        }
        validation = "given" if val else "none"
        return TaskData(
            name=name,
            classes=tuple(f"class {label}" for label in range(classes)),
            provenance=Provenance(
                source=f"{name}.npz", kind="npz", digest=f"{name} {seed}", validation=validation, **counts
            ),
            **splits,
        )

    return make


@pytest.fixture
def shared_weights(monkeypatch: pytest.MonkeyPatch) -> ShareWeights:
    """Has methods that share weights take the given steps, or what gives them, and notes their arguments."""

    def share(*steps: Any) -> list[tuple[Any, ...]]:
        given: list[tuple[Any, ...]] = []

        def take(order: str) -> Callable[..., Iterator[Any]]:
            def taken(*arguments: Any) -> Iterator[Any]:
                given.append((order, *arguments))
                yield from (step() if callable(step) else step for step in steps)

            return taken

        for order in ("sequential", "parallel"):
            monkeypatch.setattr(interpolating, f"{order}_steps", take(order))
        return given

    return share


@pytest.fixture(scope="session")
def base() -> Base:
    """Shared by all tests, since none may change it."""
    return toy_base()


@pytest.fixture(scope="session")
def config() -> FitConfig:
    """Two short epochs."""
    return FitConfig(epochs=2, batch_size=8, precision="fp32", cache="off", seed=3)


@pytest.fixture(scope="session")
def supporting(base: Base) -> Supporting:
    """The base's own task of five classes; by chance it is right on some of the images."""
    images, validation = (coloured(np.arange(20) % 5, seed, "colours") for seed in (99, 100))
    return Supporting("colours", images, validation)
