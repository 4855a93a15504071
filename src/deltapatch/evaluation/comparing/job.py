"""One piece of a comparison's work as plain values: they can be stored, sent to another machine and done
there.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ...base import Base
from ...data import TaskData, open_data
from ...errors import DataError, WrongBaseError
from ...fitting.config import FitConfig
from ...loading import load_base
from ...method import Method, make_method
from ...open_vocabulary import ZeroShotClassifier

ProtocolName = Literal["single", "joint", "sequential", "parallel"]
Selection = Literal["validation", "test"]


@dataclass(frozen=True)
class BaseOptions:
    """What `load_base` needs to make a base again, and the fingerprint that tells that it is the one.

    Attributes:
        source: as `load_base` takes it; empty for a base that was made from a module, which only the process
            that has it can use.
        fingerprint: of all its weights.
        weights: as `load_base` takes them.
        size: height and width of the input in pixels.
        mean: of pixels in 0..1, for each channel.
        std: as ``mean``.
        interpolation: how images are resized.
        crop_pct: share of the resized image that the centre crop keeps.
        classes: names of its classes, which make the head of an open-vocabulary base.
        templates: the prompts of an open-vocabulary base; None for any other.
    """

    source: str
    fingerprint: str
    weights: str | None
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    classes: tuple[str, ...]
    templates: tuple[str, ...] | None

    @classmethod
    def of(cls, base: Base, weights: str | None = None) -> "BaseOptions":
        """The options of a base that is loaded, with the ``weights`` that it was loaded with."""
        found = base.preprocessing
        return cls(
            source=base.source,
            fingerprint=base.fingerprint,
            weights=weights,
            size=found.input_size[1:],
            mean=found.mean,
            std=found.std,
            interpolation=found.interpolation,
            crop_pct=found.crop_pct,
            classes=base.classes,
            templates=base.module.text.templates if isinstance(base.module, ZeroShotClassifier) else None,
        )

    def without_place(self) -> dict[str, Any]:
        """All that a patch depends on: where the weights lie, and what made them, is in their digest; what
        classes are called makes no difference.
        """
        left_out = ("weights", "classes", "templates")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def load(self, device: str | None = None) -> Base:
        """The base.

        Raises:
            WrongBaseError: the source has other weights than it had when the comparison was planned.
        """
        base = load_base(
            self.source,
            weights=self.weights,
            size=self.size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            classes=self.classes or None,
            templates=self.templates,
            device=device,
        )
        if base.fingerprint != self.fingerprint:
            raise WrongBaseError(
                f"{self.source} has the fingerprint {base.fingerprint[:19]}…, but this comparison is on"
                f" {self.fingerprint[:19]}…; load the base with the weights that the comparison began with"
            )
        return base


@dataclass(frozen=True)
class DataSource:
    """Labelled images that are opened where they are needed.

    Attributes:
        source: as `open_data` takes it.
        digest: tells whether they are still the same.
        name: the task's.
    """

    source: str
    digest: str
    name: str

    @classmethod
    def of(cls, source: str | Path, task: TaskData) -> "DataSource":
        """The source of a task that is open."""
        return cls(str(source), task.provenance.digest, task.name)

    def open(self, validation: float) -> TaskData:
        """The task, with the same validation images on every machine and for every seed.

        Raises:
            DataError: the images are not those that the comparison was planned with.
        """
        task = open_data(self.source, validation=validation, seed=0)
        if task.provenance.digest != self.digest:
            raise DataError(
                f"{self.source} has changed since this comparison was planned; compare into another folder"
            )
        return task


@dataclass(frozen=True)
class Job:
    """One method fitted with one seed, on one task or along one protocol of several tasks.

    Attributes:
        base: the frozen model.
        data: the tasks, in the protocol's order; one for the protocol "single".
        method: its registered name.
        options: its configuration, name and value.
        fit: how it is fitted; its seed is the job's.
        protocol: what is done with the tasks.
        selection: which images choose the epoch: "validation", or "test" as in the source papers' protocol.
        share: per cent of the training images that are used, balanced over classes.
        few_shot: this many training images a class instead; None for ``share``.
        supporting: the base's own task, to measure what happens to it; None leaves that out.
    """

    base: BaseOptions
    data: tuple[DataSource, ...]
    method: str
    options: tuple[tuple[str, Any], ...]
    fit: FitConfig
    protocol: ProtocolName = "single"
    selection: Selection = "validation"
    share: int = 100
    few_shot: int | None = None
    supporting: DataSource | None = None

    @property
    def digest(self) -> str:
        """Names the job in its folder: 32 hexadecimal digits that depend on all that its result depends on.

        Where base and images lie does not count, since their digests do; nor does how many processes decode.
        """
        parts = asdict(self)
        del parts["fit"]["workers"]
        parts["base"] = self.base.without_place()
        parts["data"] = [source.digest for source in self.data]
        # The images of the base's own task are matched with its outputs by name.
        parts["supporting"] = self.supporting and [self.supporting.digest, self.base.classes]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def make_method(self) -> Method:
        """The method with its configuration."""
        return make_method(self.method, dict(self.options))

    @property
    def amount(self) -> str:
        """How many of the training images are used, in words."""
        if self.few_shot is not None:
            return f"{self.few_shot} image{'' if self.few_shot == 1 else 's'} a class"
        return f"{self.share} % of the training images" if self.share < 100 else "all training images"
