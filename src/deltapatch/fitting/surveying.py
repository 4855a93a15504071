"""One pass of the base over a task's images: features for the head, trunk activations for all epochs."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..base import Base
from ..data import BadImage, Batch, ImageSet, load_batches
from ..errors import CacheError
from ..patch import pooled
from ..split import Split, walk
from .cache import CacheIdentity, RowLayout, TrunkCache, cache_root, sweep
from .config import FitConfig
from .deciding import Costs, Decision, Sample, decide, impossible
from .precision import Precision

logger = logging.getLogger(__name__)

Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar for so many images; the context gives what to call with the number done."""


@dataclass(frozen=True)
class Trunk:
    """The frozen part that all images of a fit run through.

    Attributes:
        base: the base as it is computed with; see `Precision.prepared`.
        split: where the patch begins; None where it touches nothing, or the base cannot be cut there.
        precision: what it computes in.
    """

    base: Base
    split: Split | None
    precision: Precision

    @torch.no_grad()
    def activations(self, images: Tensor) -> list[Tensor]:
        """What the divergence is given, one row an image each, on the base's device."""
        assert self.split is not None
        with self.precision.context():
            return self.split.trunk(self._given(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same (nothing without a split), and the pooled features in fp32, of shape (N, features)."""
        paths = [] if self.split is None else [self.split.divergence]
        with self.precision.context():
            walked = walk(self.base, self._given(images), paths, to_end=True)
        assert walked.features is not None
        activations = [tensor for path in paths for tensor in walked.given[path]]
        return activations, pooled(walked.features, self.base.anatomy.head.layout).float().cpu()

    def _given(self, images: Tensor) -> Tensor:
        return self.precision.arranged(images.to(self.base.device, self.base.dtype))


@dataclass(frozen=True)
class Survey:
    """What one pass of the base over a set of images left behind.

    Attributes:
        images: those that can be read, of which all else has a row.
        features: pooled input of the base's classifier, of shape (N, features).
        labels: shape (N,).
        bad: images that could not be read.
        cache: where the trunk activations are; None if they were not kept.
    """

    images: ImageSet
    features: Tensor
    labels: Tensor
    bad: tuple[BadImage, ...]
    cache: TrunkCache | None


class Surveyor:
    """Runs the base over the splits of a task and keeps what it gives, as a fit's configuration says."""

    def __init__(self, trunk: Trunk, config: FitConfig, watch: Watch) -> None:
        self.trunk = trunk
        self.config = config
        self.watch = watch
        self.decision = Decision(False, "")
        self.caches: dict[str, TrunkCache] = {}
        self._layout: RowLayout | None = None

    def survey(
        self, splits: dict[str, ImageSet], divergence: str | None, sample: Sample, decided: Decision | None
    ) -> dict[str, Survey]:
        """Surveys every split, such as "train" and "val".

        Args:
            splits: name -> images.
            divergence: where the patch begins; None if it touches nothing.
            sample: a few images, to measure on.
            decided: what an earlier part of the same fit decided; None decides now.
        """
        self.decision = decided or self._decide(splits, divergence, sample)
        if not self.decision.keeps:
            return {name: self._in_memory(name, images) for name, images in splits.items()}
        try:
            return {name: self._on_disk(name, images, sample) for name, images in splits.items()}
        except CacheError as error:
            if self.config.cache == "on":
                raise
            # The reason goes into the patch file, where the paths of this machine have no place.
            logger.warning("%s; this fit goes on without a trunk cache.", error)
            self.decision = Decision(False, "its folder cannot be used, or its disk is full")
            return {name: self._in_memory(name, images) for name, images in splits.items()}
        finally:
            for cache in self.caches.values():
                sweep(cache.path.parent, keep=cache.path)

    def _decide(self, splits: dict[str, ImageSet], divergence: str | None, sample: Sample) -> Decision:
        no_choice = impossible(self.config, divergence, self.trunk.split is not None)
        if no_choice is not None:
            return no_choice
        views = self.config.fixed_views or 1
        layout = self._layout_of(sample)
        if self.trunk.split is None:
            return Decision(True, f"features alone, {layout.stride} bytes an image, for later fits")
        started = time.perf_counter()
        self.trunk.activations(sample.images)
        seconds = (time.perf_counter() - started) / len(sample.images) + sample.seconds
        images = sum(map(len, splits.values()))
        rows = sum(len(found) * (views if name == "train" else 1) for name, found in splits.items())
        costs = Costs(seconds, layout.stride, self._missing(splits, layout), rows, images, _free_bytes())
        return decide(self.config, costs)

    def _layout_of(self, sample: Sample) -> RowLayout:
        """How rows are laid out: read off what the trunk gives for a few images."""
        if self._layout is None:
            self._layout = RowLayout.of(*self.trunk.features(sample.images), self.config.cache_dtype)
        return self._layout

    def _missing(self, splits: dict[str, ImageSet], layout: RowLayout) -> int:
        """Rows that no cache has yet; makes none."""
        count = 0
        for name, images in splits.items():
            identity = self._identity(images)
            exists = (cache_root() / identity.digest).is_dir()
            cache = self._opened(images, layout) if exists else None
            for view in self._views(name):
                count += len(images) if cache is None else len(cache.missing(images.rows, view))
        return count

    def _in_memory(self, name: str, images: ImageSet) -> Survey:
        features: list[Tensor] = []
        good: list[Tensor] = []
        bad: list[BadImage] = []
        for batch in self._batches(images, 0, f"base on {name} images"):
            bad.extend(batch.bad)
            if len(batch.labels):
                features.append(self.trunk.features(batch.images)[1])
                good.append(batch.indices)
        empty = torch.zeros(0, self.trunk.base.anatomy.head.features)
        readable = images.subset(torch.cat(good).numpy() if good else [])
        found = torch.cat(features) if features else empty
        return Survey(readable, found, torch.from_numpy(readable.labels), tuple(bad), None)

    def _on_disk(self, name: str, images: ImageSet, sample: Sample) -> Survey:
        cache = self._opened(images, self._layout_of(sample))
        bad: dict[str, BadImage] = {}
        with cache.filling():
            for view in self._views(name):
                damaged = cache.verify(images.rows, np.full(len(images), view))
                if damaged:
                    self.decision = replace(
                        self.decision, why=f"{self.decision.why}; {damaged} damaged rows were made anew"
                    )
                rows = cache.missing(images.rows, view)
                missing = images.subset(np.flatnonzero(np.isin(images.rows, rows)))
                if len(missing):
                    label = f"base on {name} images" + (f", view {view}" if view else "")
                    bad.update(self._fill(cache, missing, view, label))
        is_bad = np.zeros(len(images), bool)
        for view in self._views(name):
            is_bad |= np.isin(images.rows, cache.missing(images.rows, view))
        readable = images.subset(np.flatnonzero(~is_bad))
        found = cache.read_features(readable.rows, np.zeros(len(readable), np.int64))
        return Survey(readable, found, torch.from_numpy(readable.labels), tuple(bad.values()), cache)

    def _fill(self, cache: TrunkCache, images: ImageSet, view: int, label: str) -> dict[str, BadImage]:
        bad: dict[str, BadImage] = {}
        for batch in self._batches(images, view, label):
            bad.update((found.path, found) for found in batch.bad)
            if len(batch.labels):
                activations, features = self.trunk.features(batch.images)
                cache.write(images.rows[batch.indices.numpy()], view, activations, features)
        return bad

    def _batches(self, images: ImageSet, view: int, label: str) -> Iterable[Batch]:
        config, preprocessing = self.config, self.trunk.base.preprocessing
        batches = load_batches(
            images.at_view(preprocessing, config.augment if view else "none", view),
            batch_size=config.batch_size,
            shuffle=False,
            workers=config.workers,
            on_bad=config.on_bad,
        )
        with self.watch(label, len(images)) as advance:
            for batch in batches:
                yield batch
                advance(len(batch.labels) + len(batch.bad))

    def _views(self, name: str) -> range:
        return range((self.config.fixed_views or 1) if name == "train" else 1)

    def _opened(self, images: ImageSet, layout: RowLayout) -> TrunkCache:
        identity = self._identity(images)
        if identity.digest not in self.caches:
            self.caches[identity.digest] = TrunkCache.open(cache_root(), identity, layout)
        return self.caches[identity.digest]

    def _identity(self, images: ImageSet) -> CacheIdentity:
        trunk, config = self.trunk, self.config
        base = trunk.base
        preprocessing = json.dumps(base.preprocessing.model_dump(mode="json"), sort_keys=True)
        return CacheIdentity(
            base=base.fingerprint,
            divergence="" if trunk.split is None else trunk.split.divergence,
            preprocessing=preprocessing,
            augment=config.augment,
            views=config.fixed_views or 1,
            images=images.store.version(),
            count=len(images.store),
            compute=f"{base.device.type} {base.dtype} {trunk.precision.name}",
            stored_as=config.cache_dtype,
            torch=torch.__version__,
        )

    def close(self) -> None:
        """Lets go of the caches' files."""
        for cache in self.caches.values():
            cache.close()


def _free_bytes() -> int:
    """Free bytes on the disk of the cache, whose folder may have to be made yet."""
    folder = cache_root().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(Path(folder)).free
