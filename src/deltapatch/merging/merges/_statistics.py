"""What merges know of each model besides its tensors, read part by part as the models are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import Inputs
from ..sources import MergeError, ModelLike, Source, open_source


def open_statistics(given: Sequence[ModelLike], what: str) -> tuple[Source, ...]:
    """Opens what was gathered of each model, called "``what`` 1", "``what`` 2", … where it is not a file."""
    return tuple(open_source(one, f"{what} {number}") for number, one in enumerate(given, 1))


def check_numbers(inputs: Inputs, statistics: Sequence[Source], what: str) -> None:
    """Raises a MergeError unless there is one for each model."""
    if len(statistics) != len(inputs.models):
        raise MergeError(
            f"{len(statistics)} {what} were given for {len(inputs.models)} models; give as many, in the"
            " order of the models"
        )


def read_statistic(source: Source, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Elements of a statistic in fp64, shape (stop - start,); never to be written to.

    Raises:
        MergeError: there are NaN or infinite values among them.
    """
    values = source.read(name, start, stop).to(torch.float64)
    if not bool(torch.isfinite(values).all()):
        raise MergeError(f"{source.label}: tensor '{name}' holds NaN or infinite values; gather it again")
    return values


def weighted_mean(models: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ w_t θ_t in fp64, shape (n,)."""
    mean = torch.zeros(models[0].shape, dtype=torch.float64)
    for share, model in zip(shares, models, strict=True):
        mean += model.to(torch.float64) * share
    return mean
