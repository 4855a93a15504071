"""What a patch, and the search for it, may cost."""

import time
from dataclasses import dataclass
from statistics import median

import torch

from ...base import Base
from ...errors import DeltapatchError
from ...method import Method
from ...patch import Patch
from ...patched import PatchedModel

_LATENCY_IMAGES = 4
_LATENCY_RUNS = 5
_NAME = "measured"


@dataclass(frozen=True)
class Budget:
    """Limits; None is no limit.

    Attributes:
        parameters: of a patch, without its head, which every method needs.
        minutes: of computing, in all.
        milliseconds: of a forward pass of one image with the patch, in a batch of four on the base's device.
    """

    parameters: int | None = None
    minutes: float | None = None
    milliseconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "minutes", "milliseconds"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise DeltapatchError(f"a budget of {value} {name} cannot be; give a number from 0")

    @property
    def seconds(self) -> float:
        """Of computing, in all; infinite without a limit."""
        return float("inf") if self.minutes is None else 60 * self.minutes

    def refusal(self, base: Base, method: Method, classes: tuple[str, ...]) -> str:
        """Why a patch of this method costs too much; empty where it does not.

        Raises:
            AnatomyError: the method finds no place in the base.
        """
        if self.parameters is None and self.milliseconds is None:
            return ""
        patch = method.build(base, classes, seed=0)
        count = patch.num_parameters(head=False)
        if self.parameters is not None and count > self.parameters:
            return f"{count:,} parameters, and {self.parameters:,} are allowed"
        if self.milliseconds is not None:
            found = milliseconds_an_image(base, patch)
            if found > self.milliseconds:
                return f"{found:.2f} ms an image, and {self.milliseconds:g} are allowed"
        return ""


def milliseconds_an_image(base: Base, patch: Patch) -> float:
    """The time of a forward pass with a patch: the median of five batches of four, divided by four."""
    model = PatchedModel(base)
    model.add_patch(_NAME, patch)
    images = base.example(_LATENCY_IMAGES)
    seconds: list[float] = []
    with torch.inference_mode():
        model(images, patch=_NAME)  # the first pass also prepares what later ones find
        for _ in range(_LATENCY_RUNS):
            _wait(base)
            started = time.perf_counter()
            model(images, patch=_NAME)
            _wait(base)
            seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds) / _LATENCY_IMAGES


def _wait(base: Base) -> None:
    """An accelerator computes on while Python goes ahead; a time is only right once it is done."""
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
