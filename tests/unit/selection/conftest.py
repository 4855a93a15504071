"""Small images, small bases, and a trunk cache of each test's own."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from digits import write_digits
from torch import Tensor, nn
from toys import Net, Unit

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.fitting import precision
from deltapatch.loading import load_base

MakeBase = Callable[..., Base]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAPATCH_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is computed in fp32, whatever the machine has."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    """120 training images of the ten digits."""
    return open_data(write_digits(tmp_path_factory.mktemp("data") / "digits.npz", train=120))


@pytest.fixture
def make_base() -> MakeBase:
    """A base of random weights with features of the given width, and 8x8 inputs."""

    def make(width: int = 4, seed: int = 0, name: str = "", module: nn.Module | None = None) -> Base:
        torch.manual_seed(seed)
        network = Net([Unit(width), Unit(width)], width).eval() if module is None else module
        return load_base(network, size=8, name=name or f"width {width}")

    return make


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each batch that a toy network is given from now on."""
    seen: list[int] = []
    forward = Net.forward

    def counted(self: Net, x: Tensor) -> Tensor:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Net, "forward", counted)
    return seen


@pytest.fixture
def no_watch() -> Callable[..., object]:
    @contextmanager
    def watch(label: str, images: int) -> Generator[Callable[[int], None]]:
        yield lambda done: None

    return watch
