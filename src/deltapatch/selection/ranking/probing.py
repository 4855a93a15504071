"""What a ranking knows of a base: its features, answers and costs on the images of a probe."""

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ...anatomy import Stage
from ...base import Base
from ...data import ImageSet
from ...errors import AnatomyError, DataError
from ...fitting.config import FitConfig
from ...fitting.deciding import Sample, sample
from ...fitting.precision import LARGEST_ERROR, choose_precision
from ...fitting.surveying import Survey, Surveyor, Trunk, Watch
from ...open_vocabulary import ZeroShotClassifier
from ...patch import pooled
from ...touching import Touch, touched
from ...trees import tensors_in
from ..subject import read_samples

# How far logits of the pooled features may be off those of the whole base, relative to their length.
_SAME_LOGITS = 1e-4
# How far outputs of a base that gives probabilities may sum to something else than 1, in bf16 too.
_SUM_OF_ONE = 1e-2
_TIMED_PASSES = 3

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Probe:
    """A base on the images of a probe.

    Attributes:
        base: its name.
        fingerprint: of its weights.
        features: pooled input of its classifier, as fits read it, float32 of shape (N, d).
        labels: of the images that could be read, int64 of shape (N,).
        kept: which images of the probe these are, bool; N of them are True.
        probabilities: answers of its own head, float32 of shape (N, S); None if it gives none.
        no_probabilities: why it gives none; empty if it does.
        layers: name of a stage -> pooled output of the stage, float32 of shape (N, channels); empty unless
            asked for, or if it has no stages.
        parameters: how many numbers its weights are.
        seconds_per_image: of a forward pass, measured on a few images on this machine.
        forward_seconds: of the pass over the probe, decoding included; next to nothing where its rows were
            in the cache already.
        load_seconds: until the base and its anatomy were there.
    """

    base: str
    fingerprint: str
    features: Array
    labels: NDArray[np.int64]
    kept: NDArray[np.bool_]
    probabilities: Array | None
    no_probabilities: str
    layers: Mapping[str, Array]
    parameters: int
    seconds_per_image: float
    forward_seconds: float
    load_seconds: float


def probe_base(
    base: Base,
    images: ImageSet,
    probe: NDArray[np.int64],
    watch: Watch,
    *,
    layers: bool = False,
    batch_size: int = 32,
    workers: int = 0,
    load_seconds: float = 0.0,
) -> Probe:
    """Runs a base over a probe once. Features go through the cache that fits of a head use, both ways.

    Args:
        base: the base; it stays as it is, and where it is.
        images: all training images, since precision is chosen by the first of them, as a fit does.
        probe: indices of those to look at.
        watch: opens progress bars.
        layers: whether to keep the pooled output of each stage too.
        batch_size: images of a forward pass.
        workers: processes that decode images.
        load_seconds: what loading the base took.

    Raises:
        AnatomyError: the base cannot be run on images of its own size, or gives NaN.
        DataError: no image of the probe can be read.
        SelectionError: features are not finite, or all constant.
    """
    started = time.perf_counter()
    _check_finite(base)
    stages = base.anatomy.stages if layers else ()
    load_seconds += time.perf_counter() - started
    few = sample(images, base.preprocessing)
    precision = choose_precision("auto", base, few.images.to(base.device))
    plan = _Trunk(precision.prepared(base), None, precision, stages)
    reason, from_features = _answers_of(base, plan.listen(few.images), precision.mixed)
    seconds_per_image = _forward_seconds(plan, few.images)
    trunk = _Trunk(plan.base, None, precision, stages, not reason and not from_features)
    chosen = images.subset(probe)
    started = time.perf_counter()
    with closing(Surveyor(trunk, FitConfig(batch_size=batch_size, workers=workers), watch)) as surveyor:
        survey = surveyor.survey({"train": chosen}, None, few, None)["train"]
        if not len(survey.labels):
            why = f": {survey.bad[0].path}: {survey.bad[0].reason}" if survey.bad else ""
            raise DataError(f"none of the {len(chosen)} images of the probe could be read{why}")
        # Whatever is wrong with them is wrong for every score.
        read_samples(survey.features.numpy(), survey.labels.numpy())
        heard = _heard_of(trunk, surveyor, survey, few)
    forward_seconds = time.perf_counter() - started
    probabilities: Array | None = None
    if not reason:
        logits = _logits(base, survey.features) if from_features else heard.output
        probabilities = _probabilities(logits)
    return Probe(
        base=base.name,
        fingerprint=base.fingerprint,
        features=survey.features.numpy(),
        labels=survey.labels.numpy(),
        kept=np.isin(chosen.rows, survey.images.rows),
        probabilities=probabilities,
        no_probabilities=reason,
        layers={stage.path: rows.numpy() for stage, rows in zip(stages, heard.layers, strict=True)},
        parameters=sum(parameter.numel() for parameter in base.module.parameters()),
        seconds_per_image=seconds_per_image,
        forward_seconds=forward_seconds,
        load_seconds=load_seconds,
    )


@torch.no_grad()
def _check_finite(base: Base) -> None:
    """NaN is equal to nothing, so that the anatomy would say of such a base that it is not deterministic."""
    try:
        with base.freezer.frozen():
            outputs = tensors_in(base.module(base.example()))
    except Exception:
        return  # the anatomy says why
    if outputs and any(bool(tensor.isnan().any()) for tensor in outputs if tensor.is_floating_point()):
        raise AnatomyError(f"{base.name} gives NaN on images of noise; check its weights")


@dataclass(frozen=True)
class _Heard:
    """What a forward pass gave, as float32 in main memory.

    Attributes:
        features: shape (N, features).
        output: what the base returned, shape (N, S); of no columns where that is no matrix or not wanted.
        layers: the pooled output of each stage, shape (N, channels).
    """

    features: Tensor
    output: Tensor
    layers: tuple[Tensor, ...]

    @classmethod
    def joined(cls, parts: "list[_Heard]") -> "_Heard":
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.output for part in parts]),
            tuple(torch.cat(rows) for rows in zip(*(part.layers for part in parts), strict=True)),
        )


@dataclass(frozen=True)
class _Trunk(Trunk):
    """A trunk that keeps what else is heard of the images whose features it is asked for.

    Attributes:
        stages: whose outputs are kept. They are pooled at once: memory grows with channels, not with maps.
        with_output: whether to keep the base's output.
        heard: one entry for each batch.
    """

    stages: tuple[Stage, ...] = ()
    with_output: bool = True
    heard: list[_Heard] = field(default_factory=list[_Heard])

    @property
    def hears_more(self) -> bool:
        """Whether anything but features is kept."""
        return self.with_output or bool(self.stages)

    def features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        heard = self.listen(images)
        if self.hears_more:
            self.heard.append(heard)
        return [], heard.features

    @torch.no_grad()
    def listen(self, images: Tensor) -> _Heard:
        """One forward pass."""
        base, site = self.base, self.base.anatomy.head
        given: list[Tensor] = []
        layers: dict[str, Tensor] = {}

        def note_features(forward: Any, *args: Any, **kwargs: Any) -> Any:
            given.append(tensors_in((args, kwargs))[0])
            return forward(*args, **kwargs)

        touches: dict[nn.Module, Touch] = {
            base.submodule(stage.sub_blocks[-1].path): _noting(stage, layers) for stage in self.stages
        }
        if site.path is not None:
            touches[base.submodule(site.path)] = note_features
        with self.precision.context(), base.freezer.frozen(), touched(touches, instead_of=base.module):
            outputs = tensors_in(base.module(self._given(images)))
        is_matrix = len(outputs) == 1 and outputs[0].ndim == 2
        return _Heard(
            pooled(given[0] if given else outputs[-1], site.layout).float().cpu(),
            outputs[0].float().cpu() if is_matrix and self.with_output else torch.zeros(len(images), 0),
            tuple(layers[stage.path] for stage in self.stages),
        )


def _noting(stage: Stage, layers: dict[str, Tensor]) -> Touch:
    def touch(forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        state = tensors_in(output)[stage.sub_blocks[-1].output_position]
        layers[stage.path] = pooled(state, stage.layout).float().cpu()
        return output

    return touch


def _heard_of(trunk: _Trunk, surveyor: Surveyor, survey: Survey, few: Sample) -> _Heard:
    """What was heard of the surveyed images; they run again where only their features were in the cache."""
    if not trunk.hears_more:
        return _Heard(survey.features, survey.features[:, :0], ())
    count = len(survey.labels)
    heard = _Heard.joined(trunk.heard)
    # The few images that the survey looks at before it begins are heard as well.
    if len(heard.features) < count or not torch.equal(heard.features[-count:], survey.features):
        trunk.heard.clear()
        config = FitConfig(
            cache="off", batch_size=surveyor.config.batch_size, workers=surveyor.config.workers
        )
        Surveyor(trunk, config, surveyor.watch).survey({"train": survey.images}, None, few, None)
        heard = _Heard.joined(trunk.heard)
    return _Heard(
        heard.features[-count:], heard.output[-count:], tuple(rows[-count:] for rows in heard.layers)
    )


def _answers_of(base: Base, heard: _Heard, mixed: bool) -> tuple[str, bool]:
    """Why the base gives no probabilities, if so; and whether they follow from its pooled features."""
    site = base.anatomy.head
    if isinstance(base.module, ZeroShotClassifier):
        return "its classes are texts that it was given, not classes that it was trained on", False
    if site.path is None:
        return "it has no classifier of its own", False
    if heard.output.shape[1] < 2:
        return "its output is not one number for each of two or more classes", False
    if not isinstance(base.submodule(site.path), nn.Linear):
        return "", False
    error = (_logits(base, heard.features) - heard.output).norm()
    return "", bool(error <= (LARGEST_ERROR if mixed else _SAME_LOGITS) * heard.output.norm())


@torch.no_grad()
def _logits(base: Base, features: Tensor) -> Tensor:
    """The classifier on pooled features, float32 of shape (N, S)."""
    assert base.anatomy.head.path is not None
    layer = base.submodule(base.anatomy.head.path)
    assert isinstance(layer, nn.Linear)
    given = features.to(layer.weight.device)
    tensors = [
        tensor.float() for tensor in layer.parameters(recurse=False)
    ]  # the weight, and the bias if any
    return functional.linear(given, *tensors).cpu()


def _probabilities(outputs: Tensor) -> Array:
    """Softmax of logits; outputs that are probabilities already stay so."""
    exact = outputs.double()
    sums = exact.sum(1, keepdim=True)
    if bool((exact >= 0).all()) and bool(((sums - 1).abs() <= _SUM_OF_ONE).all()):
        return (exact / sums).float().numpy()
    return torch.softmax(exact, 1).float().numpy()


def _forward_seconds(trunk: _Trunk, images: Tensor) -> float:
    """Of one image, in a batch of these: the shortest of a few passes, least disturbed by others' work."""
    seconds: list[float] = []
    for _ in range(_TIMED_PASSES):
        started = time.perf_counter()
        trunk.listen(images)  # ends with a copy into main memory, and so after all that a device has to do
        seconds.append(time.perf_counter() - started)
    return min(seconds) / len(images)
