"""Means and variances of batch normalisation, found anew for a model whose weights have changed."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.overrides import TorchFunctionMode

from ...layers import STATISTICS
from ...touching import Freezer
from ..safetensors_files import read_metadata, writing
from ..sources import MergeError, Source, open_source


@torch.no_grad()
def re_estimate_norms(module: nn.Module, images: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gives every batch norm of a model the mean and variance that its inputs have over the given images.

    Merged weights make other activations than those that the merged models' statistics describe, and a mean
    of statistics describes neither; convolutional networks lose much of their accuracy by it.

    One pass in eval mode. Mean and (unbiased) variance are those of all values together, whatever the sizes
    of the batches, and each batch is normalised with what has been found up to and with it. With all images
    in one batch the result is exact: in eval mode each norm's inputs have the statistics that it holds. In
    several batches this is so for the first norm, and nearly for those behind it as far as each batch is like
    the whole: mix classes and tasks, as `ImageBatches` does. (``torch.optim.swa_utils.update_bn`` gives a
    small last batch the weight of a whole one, leaves out how much the means of batches differ, refuses a
    batch of one value, runs dropout in train mode, and leaves a model in train mode without statistics when
    it is interrupted.)

    Args:
        module: the model. Only ``running_mean`` and ``running_var`` of its batch norms change, and they are
            put back if anything fails.
        images: batches of shape (B, C, H, W), on the module's device, without labels. A few hundred images
            are usual.

    Returns:
        The new statistics by their names in the state dict; empty if the model has no batch norm that keeps
        statistics. Those of norms that do not run stay as they are.

    Raises:
        MergeError: there is no image, or only one value of a channel.
    """
    norms = {
        name: norm
        for name, norm in module.named_modules()
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None
    }
    if not norms:
        return {}
    before = {norm: [tensor.clone() for tensor in _statistics(norm)] for norm in norms.values()}
    observer = _Observer(norms.values())
    try:
        with Freezer(module).frozen(hold_mode=True):
            for batch in images:
                with observer:
                    module(batch)
        _check_counts(norms, observer)
    except BaseException:
        for norm, tensors in before.items():
            _set(norm, *tensors)
        raise
    return {
        f"{name}.{which}" if name else which: tensor.clone()
        for name, norm in norms.items()
        for which, tensor in zip(STATISTICS, _statistics(norm), strict=True)
    }


def re_estimate_file(
    path: str | PathLike[str],
    module: nn.Module,
    images: Iterable[Tensor],
    *,
    out: str | PathLike[str] | None = None,
) -> Path:
    """The same for a merged model in a file, which is replaced as a whole or not at all.

    Args:
        path: a ``.safetensors`` file. Its recipe stays, with a note that the statistics are not the merge's.
        module: a model of its architecture; it stays as it is. Tensors that the merge has skipped and left
            out are taken from it.
        images: see `re_estimate_norms`.
        out: another file to write; left out, the file itself is replaced.

    Returns:
        The file that was written.

    Raises:
        MergeError: the module is of another architecture, or the images are not enough.
    """
    path = Path(path)
    source = open_source(path)
    metadata = read_metadata(path)
    statistics = re_estimate_norms(_loaded(source, module, metadata), images)
    layout = {name: (spec.shape, spec.dtype) for name, spec in source.specs.items()}
    target = path if out is None else Path(out)
    with writing(target, layout, metadata | {"deltapatch_norm_statistics": "re-estimated"}) as file:
        for name in source.specs:
            found = statistics.get(name)
            file.write(name, 0, source.read(name) if found is None else found.cpu())
    return target


@torch.no_grad()
def _loaded(source: Source, module: nn.Module, metadata: Mapping[str, str]) -> nn.Module:
    """A copy of the module with the tensors of a file."""
    skipped = json.loads(metadata.get("deltapatch_merge", "{}")).get("skip", ())
    copy = deepcopy(module)
    own = copy.state_dict()
    unknown = next((name for name in source.specs if name not in own), None)
    if unknown is not None:
        raise MergeError(f"{source.label} has tensor '{unknown}', which the model has not; {_OTHER}")
    for name, tensor in own.items():
        if name in source.specs:
            if source.specs[name].shape != tuple(tensor.shape):
                raise MergeError(
                    f"tensor '{name}' has shape {source.specs[name].shape} in {source.label} and"
                    f" {tuple(tensor.shape)} in the model; {_OTHER}"
                )
            tensor.copy_(source.whole(name))
        elif not name.endswith("num_batches_tracked") and not any(fnmatchcase(name, one) for one in skipped):
            raise MergeError(f"{source.label} has no tensor '{name}', which the model has; {_OTHER}")
    return copy


_OTHER = "give a model of the same architecture"


@dataclass
class _Moments:
    """Count, mean and sum of squared differences from it, of every channel and over any number of batches."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, values: Tensor) -> None:
        """Takes in values of shape (N, C) or (N, C, …)."""
        axes = [axis for axis in range(values.ndim) if axis != 1]
        values = values if values.dtype == torch.float64 else values.float()
        variance, mean = (found.double() for found in torch.var_mean(values, axes, correction=0))
        count = values.numel() // values.shape[1]
        total = self.count + count
        step = mean - self.mean.to(mean)
        between = step.square() * (self.count * count / total)
        self.squares = self.squares.to(mean) + variance * count + between
        self.mean = self.mean.to(mean) + step * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased, as batch norms keep it; 0 for a single value."""
        return self.squares / max(self.count - 1, 1)


class _Observer(TorchFunctionMode):
    """Adds up what enters batch norms while a module runs, and sets their statistics to it.

    It is read where the norm is computed, so that norms over other axes or with an activation inside are
    right.
    """

    def __init__(self, norms: Iterable[_BatchNorm]) -> None:
        super().__init__()
        self.moments = {norm: _Moments() for norm in norms}
        self._owners = {id(norm.running_mean): norm for norm in self.moments}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            norm = self._owners.get(id(kwargs.get("running_mean", args[1] if len(args) > 1 else None)))
            values = kwargs.get("input", args[0] if args else None)
            if norm is not None and values.numel():
                moments = self.moments[norm]
                moments.add(values)
                _set(norm, moments.mean, moments.variance)
        return func(*args, **kwargs)


def _check_counts(norms: Mapping[str, _BatchNorm], observer: _Observer) -> None:
    counts = {name: observer.moments[norm].count for name, norm in norms.items()}
    if not any(counts.values()):
        raise MergeError("no image went through a batch norm; give one or more images")
    single = next((name for name, count in counts.items() if count == 1), None)
    if single is not None:
        raise MergeError(
            f"norm '{single}' got one value of each channel, which has no variance; give more images"
        )


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)


def _set(norm: _BatchNorm, *tensors: Tensor) -> None:
    for own, found in zip(_statistics(norm), tensors, strict=True):
        own.copy_(found)
