"""The demo's base and a few digits: a fit of two epochs takes about half a second."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from caches import Open, opener
from digits import write_bad_image, write_digits, write_tree

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.fit import FitResult, fit_task
from deltapatch.fitting.watching import FitWatch
from deltapatch.loading import load_base
from deltapatch.method import Method
from deltapatch.methods.delta import Delta

Fit = Callable[..., FitResult]
AtStep = Callable[[int, int, Callable[[], None]], None]


@pytest.fixture(scope="session")
def base() -> Base:
    """Shared by all tests, since none may change it."""
    return load_base("demo")


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return open_data(write_digits(tmp_path_factory.mktemp("digits") / "digits.npz"))


@pytest.fixture
def task_with_bad_images(tmp_path: Path) -> TaskData:
    """Three digits; two training images and one validation image are cut short."""
    for split in ("train", "val"):
        write_tree(tmp_path / "tree" / split, (0, 1, 2), 8, split)
    for name in ("train/zero/bad0.png", "train/two/bad1.png", "val/one/bad2.png"):
        write_bad_image(tmp_path / "tree" / name)
    return open_data(tmp_path / "tree")


@pytest.fixture
def fit(base: Base) -> Fit:
    """A short fit without a progress bar; in fp32; keyword arguments go into its `FitConfig`."""

    def run(
        task: TaskData,
        method: Method | None = None,
        *,
        on: Base | None = None,
        checkpoint: Path | None = None,
        resume: bool = False,
        **options: Any,
    ) -> FitResult:
        return fit_task(
            on or base,
            task,
            method or Delta(modules=1),
            FitConfig(**{"epochs": 2, "precision": "fp32", **options}),
            checkpoint=checkpoint,
            resume=resume,
            progress=False,
        )

    return run


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> AtStep:
    """Has something happen in the middle of a fit, just after the given step of the given epoch."""

    def plan(epoch: int, step: int, action: Callable[[], None]) -> None:
        def watch(self: FitWatch, at_epoch: int, at_step: int, *figures: float) -> None:
            if (at_epoch, at_step) == (epoch, step):
                action()

        monkeypatch.setattr(FitWatch, "step", watch)

    return plan


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """Opens a small trunk cache again and again, as new processes would."""
    with opener(tmp_path) as make:
        yield make
