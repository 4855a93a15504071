"""The accelerator that a fit runs on: the base's device, and the trackers that get the figures."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers

from ..base import Base
from ..errors import DeltapatchError
from ..method import Method
from .config import FitConfig


def make_accelerator(
    base: Base, method: Method, config: FitConfig, track: Sequence[str], folder: Path
) -> Accelerator:
    """The accelerator for the device that the base is on, with its trackers started in ``folder``.

    Raises:
        DeltapatchError: a tracker is not installed.
    """
    _check_trackers(track)
    on_cpu = base.device.type == "cpu"
    # Accelerate settles on a device once in a process; an earlier fit may have been on another one.
    settled = PartialState(cpu=on_cpu).device
    if settled is not None and settled.type != base.device.type:
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
    accelerator = Accelerator(cpu=on_cpu, log_with=list(track) or None, project_dir=str(folder))
    if track:
        accelerator.init_trackers("deltapatch", config=_flat(method, config))
    return accelerator


def _check_trackers(names: Sequence[str]) -> None:
    """Accelerate would go on without a tracker that is not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    missing = next((name for name in names if name not in installed), None)
    if missing is not None:
        raise DeltapatchError(
            f"the tracker '{missing}' is not installed; install it, or track with one of those that are:"
            f" {', '.join(installed) or 'none'}"
        )


def _flat(method: Method, config: FitConfig) -> dict[str, Any]:
    values = {"method": method.name, **method.configuration(), **asdict(config)}
    return {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in values.items()
    }
