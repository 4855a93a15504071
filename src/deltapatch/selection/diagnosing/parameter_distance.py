"""How much closer to where fine-tuning ended the pre-trained weights are than random ones, layer by layer.

It needs the fine-tuned weights: it says after the fact which layers pre-training helped, and chooses nothing
beforehand. Source: "Rethinking Two Consensuses of the Transferability in Deep Learning", arXiv 2212.00399.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from ..score import SelectionError

Weights = nn.Module | Mapping[str, Tensor]
Select = Literal["type", "name"]

ESTIMATED = (
    "the random start is estimated by a fresh draw, and is not the one that this pre-training began from"
)


@dataclass(frozen=True)
class LayerDistance:
    """Distances of one layer, or of a block whose layers are averaged with equal weight.

    Attributes:
        name: of the layer or block.
        tensors: the weights it was computed from.
        from_random: D(r, B), the mean of |θ_r - θ_B| over all entries.
        from_pretrained: D(A, B), the mean of |θ_A - θ_B|; 0 for a layer that was frozen.
    """

    name: str
    tensors: tuple[str, ...]
    from_random: float
    from_pretrained: float

    @property
    def transferability(self) -> float:
        """T = D(r, B) / D(A, B): 1 for no help from pre-training, more is better; infinite when frozen."""
        return self.from_random / self.from_pretrained if self.from_pretrained else math.inf


@dataclass(frozen=True)
class ParameterDistance:
    """Transferability by parameter distance.

    Attributes:
        layers: the layers that fine-tuning moved, in the order of the model.
        frozen: those that it did not move, which have no finite T.
        classifier: the last linear layer, which is in no mean since it is made anew for each task; None
            where there is none, or its weights in the three models have different shapes.
        transferability: T, the mean over ``layers``.
        is_estimate: whether the random start was drawn here and is not that of the pre-training.
        warnings: one sentence each.
    """

    layers: tuple[LayerDistance, ...]
    frozen: tuple[LayerDistance, ...]
    classifier: LayerDistance | None
    transferability: float
    is_estimate: bool
    warnings: tuple[str, ...]


def parameter_distance(
    random: Weights | None,
    pretrained: Weights,
    fine_tuned: Weights,
    *,
    select: Select = "type",
    classifier: str | None = None,
    seed: int = 0,
) -> ParameterDistance:
    """T_l = D(r, B) / D(A, B) for each layer l, with D the mean absolute difference, and T their mean.

    Both distances grow with the length of the fine-tuning, and weight decay lowers T, whatever the task is:
    compare tasks and bases only at one recipe. In wide layers |θ_r - θ_B| hardly depends on the draw, so that
    an estimated random start is of use where its scale is that of the real one.

    Args:
        random: θ_r, the very weights that the pre-training began from; None estimates them by `random_start`.
        pretrained: θ_A.
        fine_tuned: θ_B, fine-tuned from θ_A.
        select: "type" takes the weight of every convolution and linear layer, each for itself. "name" is the
            source's filter: convolutions whose name holds "conv" and the last linear layer, averaged with
            equal weight within each block (so without shortcuts of torchvision's ResNets, which it calls
            downsample; 18 groups for a ResNet-50).
        classifier: name of the classifier, "" for a model without one; left out, the last of the layers,
            which must be linear.
        seed: of an estimated random start.

    Raises:
        SelectionError: the three are not of one architecture, no layer was moved, or the classifier cannot be
            found.

    Example:
        >>> found = parameter_distance(start, base.module, tuned, classifier="fc")
        >>> max(found.layers, key=lambda layer: layer.transferability).name
        'layer4.2.conv3'
    """
    start = _estimated(pretrained, seed) if random is None else random
    states = [_tensors(weights) for weights in (start, pretrained, fine_tuned)]
    names, warnings = _selected(select, (pretrained, fine_tuned, start), states[1])
    last = _classifier(names, states[1], classifier)
    body = [name for name in names if _layer(name) != last]
    if random is None:
        lacking = [name for name in body if name not in states[0]]
        body = [name for name in body if name in states[0]]
        warnings += (ESTIMATED, *_warn_lacking(lacking))
    found = [_distances(group, tensors, states) for group, tensors in _grouped(body, select).items()]
    moved = tuple(layer for layer in found if layer.from_pretrained > 0)
    if not moved:
        raise SelectionError(
            "fine-tuned and pre-trained weights are equal in every convolution and linear layer, so there is"
            " no distance to compare; give weights that were fine-tuned"
        )
    overall = math.fsum(layer.transferability for layer in moved) / len(moved)
    if not overall > 0:
        raise SelectionError("the fine-tuned weights are the random ones; check the order of the arguments")
    own = [name for name in names if _layer(name) == last]
    comparable = all(_is_comparable(name, states) for name in own)
    if not comparable:
        warnings += (f"the classifier '{last}' is not of one shape in the three models and is not compared",)
    return ParameterDistance(
        layers=moved,
        frozen=tuple(layer for layer in found if layer.from_pretrained == 0),
        classifier=_distances(last, own, states) if last is not None and comparable else None,
        transferability=overall,
        is_estimate=random is None,
        warnings=warnings,
    )


def random_start(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """An estimate of a random start: what the ``reset_parameters`` of each layer draws, by parameter name.

    An architecture that initialises its layers in another way, as most ResNets do, has another scale; a
    second model of it, made without weights, is then the better estimate. The module is not changed, nor is
    the caller's random state; parameters of modules without ``reset_parameters`` are missing.

    Args:
        module: whose layers are copied, one at a time.
        seed: the same one gives the same numbers.
    """
    start: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, layer in module.named_modules():
            # torch's attention keeps its own private.
            names = ("reset_parameters", "_reset_parameters")
            reset = next((name for name in names if callable(getattr(layer, name, None))), None)
            if reset is None or next(layer.parameters(recurse=False), None) is None:
                continue
            fresh = deepcopy(layer).to("cpu", torch.float32)
            getattr(fresh, reset)()
            prefix = f"{path}." if path else ""
            drawn = fresh.named_parameters(recurse=False)
            start |= {prefix + name: parameter.detach() for name, parameter in drawn}
    return start


def _estimated(pretrained: Weights, seed: int) -> Mapping[str, Tensor]:
    if not isinstance(pretrained, nn.Module):
        raise SelectionError("a random start can be estimated for a module only; give random= or a module")
    return random_start(pretrained, seed)


def _warn_lacking(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    example = _layer(names[0])
    return (f"weights that no random start can be drawn for are left out: {len(names)}, such as '{example}'",)


def _tensors(weights: Weights) -> Mapping[str, Tensor]:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _selected(
    select: Select, given: Sequence[Weights], state: Mapping[str, Tensor]
) -> tuple[list[str], tuple[str, ...]]:
    """Names of the weights that are compared, in the order of the model, and what is to be said about it."""
    matrices = [name for name, tensor in state.items() if name.endswith("weight") and tensor.ndim >= 2]
    warnings: tuple[str, ...] = ()
    if select == "name":
        linear = [name for name in matrices if state[name].ndim == 2]
        names = [name for name in matrices if "conv" in name or name in linear[-1:]]
    else:
        module = next((weights for weights in given if isinstance(weights, nn.Module)), None)
        names = matrices if module is None else list(weights_by_type(module))
        if module is None:
            warnings = (
                "no module was given, so every weight of two or more dimensions counts, embeddings too",
            )
    if not names:
        raise SelectionError("these weights hold no convolution or linear layer to compare")
    return names, warnings


def weights_by_type(module: nn.Module) -> Iterator[str]:
    """Names of the weights of convolutions and linear layers, in the order of the module."""
    for path, layer in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(layer, (_ConvNd, nn.Linear)):
            yield f"{prefix}weight"
        elif isinstance(layer, nn.MultiheadAttention):
            # Its projections of queries, keys and values are parameters without a layer.
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            yield from (prefix + name for name in names if getattr(layer, name) is not None)


def _classifier(names: Sequence[str], state: Mapping[str, Tensor], given: str | None) -> str | None:
    """The classifier's name among the layers; None where it is said that there is none."""
    if given == "":
        return None
    layers = [_layer(name) for name in names]
    if given is not None:
        wanted = given.removesuffix(".weight")
        if wanted not in layers:
            raise SelectionError(
                f"there is no layer '{given}' to leave out as the classifier; the last is '{layers[-1]}'"
            )
        return wanted
    if names[-1] in state and state[names[-1]].ndim != 2:
        raise SelectionError(
            f"the last layer, '{layers[-1]}', is not linear, so the classifier cannot be found; give"
            " classifier=NAME, or '' where there is none"
        )
    return layers[-1]


def _layer(tensor: str) -> str:
    """The layer of a weight; projections inside torch's attention are layers of their own."""
    return tensor.removesuffix(".weight").removesuffix("_weight")


def _grouped(names: Sequence[str], select: Select) -> dict[str, list[str]]:
    """Layers by themselves, or by the block that they are in."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = _layer(name)
        block = layer.rpartition(".")[0] if select == "name" else ""
        groups.setdefault(block or layer, []).append(name)
    return groups


def _is_comparable(name: str, states: Sequence[Mapping[str, Tensor]]) -> bool:
    return len({state[name].shape if name in state else None for state in states}) == 1


def _distances(group: str, names: Sequence[str], states: Sequence[Mapping[str, Tensor]]) -> LayerDistance:
    random, pretrained, fine_tuned = states
    for name in names:
        for called, state in zip(("random", "pre-trained", "fine-tuned"), states, strict=True):
            if name not in state:
                raise SelectionError(
                    f"the {called} weights have no tensor '{name}'; give three models of one kind"
                )
            if state[name].shape != pretrained[name].shape:
                raise SelectionError(
                    f"'{name}' has shape {tuple(state[name].shape)} in the {called} weights, but"
                    f" {tuple(pretrained[name].shape)} in the pre-trained ones; give three models of one kind"
                )
    return LayerDistance(
        group,
        tuple(names),
        math.fsum(_distance(name, random, fine_tuned) for name in names) / len(names),
        math.fsum(_distance(name, pretrained, fine_tuned) for name in names) / len(names),
    )


@torch.no_grad()
def _distance(name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Mean over entries of |θ - θ'|, in float64."""
    one, other = (state[name].detach().cpu().double() for state in (first, second))
    distance = float((one - other).abs().mean())
    if not math.isfinite(distance):
        raise SelectionError(
            f"'{name}' holds NaN or infinite numbers; the fine-tuning diverged, fit it again"
        )
    return distance
