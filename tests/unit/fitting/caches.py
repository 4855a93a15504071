"""Small trunk caches: two activations and five features an image, different for each image and view."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltapatch.fitting.cache import CacheIdentity, RowLayout, TrunkCache

Open = Callable[..., TrunkCache]

IMAGES = 12
VIEWS = 2
IDENTITY: dict[str, Any] = {
    "base": "sha256:" + "ab" * 32,
    "divergence": "layer4",
    "preprocessing": '{"mean":[0.5]}',
    "augment": "flip",
    "views": VIEWS,
    "images": "cd" * 32,
    "count": IMAGES,
    "compute": "float32",
    "stored_as": "fp32",
    "torch": "2.6.0",
}


def identity(**changes: Any) -> CacheIdentity:
    return CacheIdentity(**{**IDENTITY, **changes})


def layout_of(stored_as: str = "fp32") -> RowLayout:
    return RowLayout(((3, 4, 4), (2,)), (torch.float32, torch.int64), 5, stored_as)


def open_cache(root: Path, **changes: Any) -> TrunkCache:
    own = identity(**changes)
    return TrunkCache.open(root, own, layout_of(own.stored_as))


def rows_of(image_rows: Any, view: int) -> tuple[list[Tensor], Tensor]:
    """What the trunk makes of these images: the same values whenever it is asked."""
    noise = torch.randn(IMAGES, VIEWS, 55, generator=torch.Generator().manual_seed(0))
    chosen = noise[torch.as_tensor(np.asarray(image_rows)), view]
    whole = (1000 * chosen[:, :2]).long()
    return [chosen[:, 2:50].reshape(-1, 3, 4, 4), whole], chosen[:, 50:]


def fill(cache: TrunkCache, image_rows: Any, view: int = 0) -> None:
    cache.write(np.asarray(image_rows), view, *rows_of(image_rows, view))


def assert_rows(cache: TrunkCache, image_rows: Any, view: int = 0) -> None:
    """The cache gives back, bit by bit, what the trunk makes of these images."""
    images = np.asarray(image_rows)
    activations, features = cache.read(images, np.full(len(images), view))
    expected, expected_features = rows_of(images, view)
    assert all(map(torch.equal, activations, expected))
    assert torch.equal(features, expected_features)


@contextmanager
def opener(root: Path) -> Iterator[Open]:
    """Opens the cache under a root as a new process would, with the given changes of its identity; closes all
    of them at the end.
    """
    with ExitStack() as opened:
        yield lambda **changes: opened.enter_context(closing(open_cache(root, **changes)))
