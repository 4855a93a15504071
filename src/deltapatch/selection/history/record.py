"""One known result: how accurate a model was after it was fine-tuned or patched for a target."""

import re
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

from ..score import SelectionError

OWN = "own"
"""The pool of the user's own results."""

# One set of images or one network, as the publications call it.
_OTHER_NAMES = {
    "stanfordcars": "cars",
    "fgvcaircraft": "aircraft",
    "pet": "pets",
    "oxfordpets": "pets",
    "oxfordiiitpet": "pets",
    "oxfordiiitpets": "pets",
    "oxford102flowers": "flowers",
    "flowers102": "flowers",
    "oxfordflowers102": "flowers",
    "food101": "food",
    "cub2011": "cub200",
    "cub2002011": "cub200",
    "mnasnet": "mnasnet10",
}


@dataclass(frozen=True)
class Record:
    """A result that the history prior learns from.

    Attributes:
        pool: where it comes from; accuracies are only compared inside of a pool.
        model: its name.
        target: the name of the task.
        accuracy: larger is better; a unit of its own for each pool and target.
        fingerprint: of the base, where it is known.
        digest: of the images, where it is known.
        measured_on: "test" or "validation", where it is known.
        method: how the model was brought to the target, where it is known.
        seeds: of the fits that the accuracy is the mean of, with spaces between them.
        job: names the fits, so that they are not noted twice; empty where that cannot be told.
        date: of the note, as in 2026-01-31.

    Raises:
        SelectionError: the accuracy is not finite, or model or target has no name.
    """

    pool: str
    model: str
    target: str
    accuracy: float
    fingerprint: str = ""
    digest: str = ""
    measured_on: str = ""
    method: str = ""
    seeds: str = ""
    job: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        if not isfinite(self.accuracy):
            raise SelectionError(
                f"the accuracy {self.accuracy} of {self.model} on {self.target} is no number"
            )
        if not self.model.strip() or not self.target.strip():
            raise SelectionError("a result needs the names of a model and of a target; one of them is empty")

    @property
    def images(self) -> str:
        """What accuracies have to agree in to be compared: the digest, else the plain name of the target."""
        return self.digest or plain(self.target)

    def is_of(self, model: str, fingerprint: str = "") -> bool:
        """Whether it is a result of this model: by fingerprint where both are known, else by name."""
        if self.fingerprint and fingerprint:
            return self.fingerprint == fingerprint
        return plain(self.model) == plain(model)

    def is_on(self, target: str, digest: str = "") -> bool:
        """Whether it is a result on this target, going by its name and by its images.

        Either is enough: images to which a few were added have another digest, and are not another target.
        """
        return plain(self.target) == plain(target) or (bool(digest) and self.digest == digest)


@lru_cache(maxsize=4096)  # a prior compares every candidate with every result
def plain(name: str) -> str:
    """A name without what publications write differently: ``OxfordIIITPets`` and ``pets`` are the same."""
    letters = re.sub(r"[\W_]+", "", name.casefold())
    return _OTHER_NAMES.get(letters, letters)
