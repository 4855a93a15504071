"""Robust weight signatures: what a model learns from corrupted images and not from clean ones."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .inputs import Inputs, check_inputs
from .merges._norm_statistics import is_norm_statistic
from .merges.weight_signature import weight_signature
from .sources import MergeError, ModelLike, Source, open_source

_COUNTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def shallow_tensors(module: nn.Module, layers: int) -> tuple[str, ...]:
    """The parameters of a network's first convolutions and linear layers, and of the norms among them.

    Robustness to corrupted images is for the most part a matter of the first layers: 7 of the 13
    convolutions of a VGG-16 (11.8 % of their weights), stem and first blocks of a ResNet-50.

    Args:
        module: the network; its layers are counted in the order in which it lists them.
        layers: how many convolutions and linear layers; norms before the next one come with them.

    Raises:
        MergeError: the network has fewer.
    """
    found: list[str] = []
    count = 0
    for path, layer in module.named_modules():
        count += isinstance(layer, _COUNTED)
        if count > layers:
            break
        if not any(layer.children()):
            found += [f"{path}.{name}".removeprefix(".") for name, _ in layer.named_parameters()]
    if layers < 1 or count < layers:
        raise MergeError(
            f"the first {layers} layers were asked for, and the network has {count} convolutions and linear"
            " layers; give a number from 1 to that"
        )
    return tuple(found)


def extract_signature(
    clean: ModelLike, robust: ModelLike, pretrained: ModelLike, *, tensors: Iterable[str] = ("*",)
) -> dict[str, Tensor]:
    """The part of what robust training learned that clean training did not (Cai et al., "Robust weight
    signatures", ICML 2023).

    For every tensor alone, with u = θ_clean - θ_pretrained and w = θ_robust - θ_pretrained,

        signature = w - u ⟨w, u⟩ / ⟨u, u⟩,

    the part of w that is orthogonal to u. Scales and shifts of batch norms are not projected: their signature
    is θ_robust - θ_clean, so that added at 1 it gives the robust model's, and several at 1/n the robust
    models' mean. Running statistics have none; re-estimate them on corrupted images.

    Args:
        clean: fine-tuned from the pre-trained model on the task's images.
        robust: fine-tuned from it on the same with one kind of corruption.
        pretrained: what both were fine-tuned from.
        tensors: names or shell patterns of the tensors to take; `shallow_tensors` names those of the first
            layers.

    Returns:
        Tensor name -> signature, of the tensor's shape, fp32 (fp64 where the models are).

    Raises:
        MergeError: the models do not fit together, or a pattern fits no floating tensor.

    Example:
        >>> zero, clean, robust = ({"w": torch.tensor(w)} for w in ([0.0, 0.0], [1.0, 0.0], [2.0, 3.0]))
        >>> extract_signature(clean, robust, zero)
        {'w': tensor([0., 3.])}
    """
    sources = [
        open_source(model, label)
        for model, label in (
            (clean, "the clean model"),
            (robust, "the robust model"),
            (pretrained, "the pre-trained model"),
        )
    ]
    names = _chosen(sources[2], tuple(tensors))
    inputs = check_inputs([_Some(sources[0], names), _Some(sources[1], names)], _Some(sources[2], names))
    affine = {
        f"{name.rpartition('.')[0]}.{kind}".removeprefix(".")
        for name in sources[2].specs
        if is_norm_statistic(name)
        for kind in ("weight", "bias")
    }
    return {name: _signature(inputs, name, project=name not in affine) for name in inputs.merged}


def _signature(inputs: Inputs, name: str, project: bool) -> Tensor:
    """One tensor's signature, worked out in fp64, part by part."""
    share = 1.0
    if project:
        across = along = 0.0
        for u, w in inputs.over_chunks(lambda chunk: chunk.deltas, [name]):
            across += float(torch.dot(w.double(), u.double()))
            along += float(torch.dot(u.double(), u.double()))
        share = across / along if along else 0.0
    spec = inputs.merged[name]
    dtype = torch.float64 if spec.dtype == torch.float64 else torch.float32
    parts = [
        (w.double() - u.double() * share).to(dtype)
        for u, w in inputs.over_chunks(lambda chunk: chunk.deltas, [name])
    ]
    return torch.cat(parts or [torch.empty(0, dtype=dtype)]).reshape(spec.shape)


def put_on_signatures(
    target: Mapping[str, Tensor] | nn.Module,
    signatures: Sequence[ModelLike],
    scale: float | Sequence[float] = 1.0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adds signatures to a model in memory, such that they can be taken off again to the last bit.

    Sums are rounded, so that adding and then subtracting the same numbers seldom gives back what was there.
    The second mapping does: it holds the differences between the bits.

    Args:
        target: its tensors; not changed.
        signatures: mappings or files.
        scale: α of all, or of each.

    Returns:
        (the changed tensors, what `take_off_signatures` needs to undo it: the same names -> int tensors).

    Raises:
        MergeError: a signature does not fit the model.

    Example:
        >>> worn, stored = put_on_signatures(module, ["fog.safetensors"])
        >>> module.load_state_dict(worn, strict=False)
        >>> module.load_state_dict(take_off_signatures(module, stored), strict=False)
    """
    state = dict(target.state_dict() if isinstance(target, nn.Module) else target)
    merged = weight_signature([state], signatures=signatures, scale=scale)
    assert isinstance(merged, dict)
    changed = {
        name: tensor.to(state[name].device)
        for name, tensor in merged.items()
        if tensor.is_floating_point() and not torch.equal(tensor, state[name].cpu())
    }
    return changed, {name: _bits(tensor) - _bits(state[name]) for name, tensor in changed.items()}


def take_off_signatures(
    target: Mapping[str, Tensor] | nn.Module, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors as they were before `put_on_signatures`, bit for bit.

    Args:
        target: the model with the signatures on; not changed.
        stored: what `put_on_signatures` returned.

    Raises:
        MergeError: the stored differences are of other tensors.
    """
    state = dict(target.state_dict() if isinstance(target, nn.Module) else target)
    restored: dict[str, Tensor] = {}
    for name, difference in stored.items():
        if name not in state or state[name].shape != difference.shape:
            raise MergeError(
                f"the model has no tensor '{name}' of shape {tuple(difference.shape)} to restore"
            )
        bits = _bits(state[name])
        if bits.dtype != difference.dtype:
            raise MergeError(
                f"tensor '{name}' is {state[name].dtype}, and what is to be taken off was put on another"
                " dtype"
            )
        restored[name] = (bits - difference.to(bits.device)).view(state[name].dtype)
    return restored


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.dtype.itemsize])


class _Some(Source):
    """Some tensors of another source."""

    def __init__(self, source: Source, names: Sequence[str]) -> None:
        self.label = source.label
        self.specs = {name: source.specs[name] for name in names if name in source.specs}
        self._source = source

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._source.read(name, start, stop)


def _chosen(source: Source, patterns: tuple[str, ...]) -> list[str]:
    floating = [
        name for name, spec in source.specs.items() if spec.is_floating and not is_norm_statistic(name)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in floating):
            raise MergeError(f"{source.label} has no floating tensor '{pattern}' to take a signature of")
    return [name for name in floating if any(fnmatchcase(name, pattern) for pattern in patterns)]
