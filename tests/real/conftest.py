"""Trained networks from the shared folder, and small pieces of real image sets."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from trained import NETWORKS

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.loading import load_base

LoadNetwork = Callable[..., Base]
OpenSmall = Callable[[str], TaskData]


@pytest.fixture(scope="session")
def load_network(shared: Path) -> LoadNetwork:
    """Loads a network with its trained weights; one object for all tests, since none may change it."""

    @cache
    def load(name: str, size: int | None = None) -> Base:
        network = NETWORKS[name]
        folder = shared / "weights"
        options = network.options | ({} if size is None else {"size": size})
        if name == "birds":
            options |= {"classes": folder / "inat_bird_labels.txt"}
        return load_base(network.source, weights=folder / f"{network.weights}.safetensors", **options)

    return load


@pytest.fixture(scope="session")
def open_small(shared: Path) -> OpenSmall:
    """Opens a real set cut to 32 training, 32 validation and 16 test images."""

    def open_cut(name: str) -> TaskData:
        task = open_data(shared / "data" / f"{name}.npz")
        assert task.train is not None
        assert task.val is not None
        assert task.test is not None
        return replace(
            task,
            train=task.train.subset(range(32)),
            val=task.val.subset(range(32)),
            test=task.test.subset(range(16)),
        )

    return open_cut
