"""What every test runs under: one thread, and the shared folder of real weights and images where there is
one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, however slow the machine is just then.
settings.register_profile("deltapatch", deadline=None, derandomize=True)
settings.load_profile("deltapatch")

# Two results are only compared bit by bit where the same kernels ran, and those depend on the number of
# threads.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights and image sets; a test that asks for it is skipped where it is absent."""
    beside_the_repository = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("DELTAPATCH_SHARED", beside_the_repository))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set DELTAPATCH_SHARED to the folder of real weights and image sets")
    return folder


@pytest.fixture(autouse=True, scope="session")
def own_history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Comparisons note their results in a file of the tests' own."""
    path = tmp_path_factory.mktemp("history") / "history.csv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAPATCH_HISTORY", str(path))
        yield path


@pytest.fixture(autouse=True, scope="session")
def trunk_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Fits keep their trunk activations in a folder of the tests' own."""
    folder = tmp_path_factory.mktemp("trunk_caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAPATCH_CACHE", str(folder))
        yield folder
