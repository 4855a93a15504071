"""LoRA adapters as PEFT stores them: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``.

Read and written without PEFT. What its layers compute is y = layer(x) + s · B(A(x)), with a layer A of the
base layer's own class and kernel and a 1x1 layer B; where that is not what a changed weight computes,
`difference` says why.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]

from ..errors import DeltapatchError, PatchFileError
from ..exchange import stand_in
from ..info import MAX_JSON_DEPTH, parse_json, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAX_VALUES = 100_000

# Each changes what the file's factors mean, or comes with tensors that are no factors.
_VARIANTS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
# Starts that change the base's weights too.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftLayer:
    """One layer's factors.

    Attributes:
        a: shape (rank, inputs), or (rank, channels, kernel...) for a convolution; never grouped.
        b: shape (outputs, rank), or (outputs, rank / groups, 1...) for a convolution.
        scaling: s.
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder holds.

    Attributes:
        layers: name of a module in the base -> its factors.
        saved: name of a module -> name of a tensor -> the tensor; modules that are replaced as a whole.
        names: the ends of module names that the configuration lists; empty where it has a pattern.
        base: what the base is called.
    """

    layers: Mapping[str, PeftLayer]
    saved: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])
    names: tuple[str, ...] = ()
    base: str = ""


# --- files ------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> PeftAdapter:
    """Reads a folder that PEFT wrote.

    Raises:
        PatchFileError: a file is missing or damaged, or holds something other than LoRA factors and
            replaced modules; the message names it.
    """
    config, tensors = _read_config(folder / CONFIG), _read_tensors(folder / WEIGHTS)
    saved_names = cast(list[str], config.get("modules_to_save") or [])
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        module, _, name = key.removeprefix(_PREFIX).rpartition(".")
        if kind in ("lora_A", "lora_B") and key == f"{_PREFIX}{path}.{kind}.weight":
            factors.setdefault(path, {})[kind] = tensor
        elif any(f".{module}".endswith(f".{end}") for end in saved_names):
            saved.setdefault(module, {})[name] = tensor
        else:
            raise PatchFileError(
                f"{folder / WEIGHTS}: {shown(key)} is no LoRA factor, so it cannot be imported"
            )
    layers: dict[str, PeftLayer] = {}
    for path, pair in factors.items():
        if len(pair) < 2 or not len(pair["lora_A"]):
            raise PatchFileError(f"{folder / WEIGHTS}: one of the two factors of {shown(path)} is missing")
        scaling = _scaling(config, path, len(pair["lora_A"]))
        layers[path] = PeftLayer(pair["lora_A"], pair["lora_B"], scaling)
    if not layers:
        raise PatchFileError(f"{folder / WEIGHTS} holds no LoRA factors, so there is nothing to import")
    names = config.get("target_modules")
    listed = tuple(str(name) for name in cast(list[object], names)) if isinstance(names, list) else ()
    return PeftAdapter(layers, saved, listed, str(config.get("base_model_name_or_path") or ""))


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise PatchFileError(
            f"{path} cannot be read ({error.strerror}); give a folder that PEFT wrote"
        ) from error
    config = parse_json(text, str(path), MAX_JSON_DEPTH, _MAX_VALUES)
    if config.get("peft_type") != "LORA":
        kind = shown(str(config.get("peft_type")))
        raise PatchFileError(f"{path} describes an adapter of type {kind}, but only LORA can be imported")
    for option in _VARIANTS:
        if config.get(option):
            raise PatchFileError(
                f"{path}: a LoRA with {option} computes something else and cannot be imported"
            )
    if config.get("bias", "none") != "none":
        raise PatchFileError(
            f"{path}: bias={config['bias']!r} cannot be imported: a lora patch has no biases"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise PatchFileError(
            f"{path}: init_lora_weights={shown(start)} changed the base's weights too, so its factors do not"
            " fit the base; convert it to a plain LoRA with PEFT first"
        )
    return config


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PatchFileError(f"{path} cannot be read: {error}; save the adapter as safetensors") from error


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in cast(dict[str, object], config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    if not isinstance(alpha, (int, float)):
        raise PatchFileError(
            f"{CONFIG}: the alpha of {shown(path)} should be a number, not {shown(str(alpha))}"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def write_adapter(adapter: PeftAdapter, folder: Path, modules: Iterable[str]) -> None:
    """Writes a folder that PEFT reads; each file is the old one or the new one, whatever happens.

    Args:
        adapter: what to write.
        folder: made if missing.
        modules: the names of all modules of the base, to choose from them.

    Raises:
        PatchFileError: a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.a
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.b
    for path, members in adapter.saved.items():
        tensors |= {f"{_PREFIX}{path}.{name}": tensor for name, tensor in members.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(_config(adapter, modules), indent=2, sort_keys=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = {name: folder / f".{name}.unfinished" for name in (WEIGHTS, CONFIG)}
        save_file(plain, unfinished[WEIGHTS], {"format": "pt"})
        unfinished[CONFIG].write_text(text + "\n", encoding="utf-8")
        for name, path in unfinished.items():
            os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        raise PatchFileError(f"{folder} cannot be written: {error}") from error


def _config(adapter: PeftAdapter, modules: Iterable[str]) -> Mapping[str, Any]:
    ranks = {path: len(layer.a) for path, layer in adapter.layers.items()}
    alphas = {path: layer.scaling * ranks[path] for path, layer in adapter.layers.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    # As a list, names also stand for the ends of longer names.
    is_exact = {name for name in modules if any(f".{name}".endswith(f".{path}") for path in ranks)} == set(
        ranks
    )
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": alpha,
        # Anchored, because PEFT reads these as patterns for the ends of names.
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks) if is_exact else "|".join(map(re.escape, sorted(ranks))),
        "modules_to_save": sorted(adapter.saved) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


# --- layers -----------------------------------------------------------------------------------------------


def is_supported(module: nn.Module) -> bool:
    """Whether PEFT has a LoRA for this kind of layer."""
    return not isinstance(module, _ConvTransposeNd)


@torch.no_grad()
def difference(module: nn.Module) -> str | None:
    """Why PEFT computes something else for a layer than the layer with a changed weight; None if it does
    not.
    """
    if isinstance(module, _ConvNd):
        if any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)):
            return "PEFT (up to version 0.21) runs its factors without the dilation"
        if module.padding_mode != "zeros":
            return (
                f"PEFT pads with zeros for its factors, where the layer has padding '{module.padding_mode}'"
            )
    if not _uses_weight_as_it_is(module):
        return f"{type(module).__name__} transforms its weight, and in PEFT each factor on its own instead"
    return None


def _uses_weight_as_it_is(module: nn.Module) -> bool:
    """Whether the output is linear in the weight, tried out on an input of a few positions."""
    if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return True
    weight = cast(Tensor, module.weight)
    shape = (1, weight.shape[-1])
    if isinstance(module, _ConvNd):
        shape = (1, module.in_channels, *(2 * size for size in module.kernel_size))
    x = torch.arange(math.prod(shape), device=weight.device).cos().view(shape).to(weight.dtype)
    nothing, once, twice = (stand_in(module, {"weight": factor * weight})(x) for factor in (0, 1, 2))
    return torch.allclose(
        twice - nothing, 2 * (once - nothing), rtol=1e-2, atol=1e-2 * float(once.abs().max())
    )


def to_peft_factors(module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The change B A of a layer's weight as PEFT's two tensors.

    In PEFT, A reads the channels of all groups of a grouped convolution. So each group gets rows of its own,
    which are zero for the other groups' channels: exact, and larger by a factor of groups².

    Args:
        module: a linear layer or a convolution.
        a: A, shape (rank, inputs).
        b: B, shape (outputs, rank).
    """
    if not isinstance(module, _ConvNd):
        return a, b
    groups, kernel = module.groups, module.kernel_size
    if groups > 1:
        per_group = len(b) // groups
        if len(a) > per_group:
            rows = (b @ a).view(groups, per_group, -1)
            b = torch.eye(per_group).to(b).repeat(groups, 1)
        else:
            rows = a.expand(groups, *a.shape)
        rank, width = rows.shape[1], module.in_channels // groups
        spread = a.new_zeros(groups, rank, groups, width, *kernel)
        for group in range(groups):
            spread[group, :, group] = rows[group].view(rank, width, *kernel)
        a = spread.flatten(0, 1).flatten(1, 2)
    ones = (1,) * len(kernel)
    return a.reshape(len(a), module.in_channels, *kernel), b.reshape(*b.shape, *ones)


def from_peft_factors(module: nn.Module, path: str, layer: PeftLayer) -> tuple[Tensor, Tensor]:
    """PEFT's two tensors as A, shape (rank, inputs), and B, shape (outputs, rank); the inverse of
    `to_peft_factors`.

    Raises:
        DeltapatchError: the shapes are not this layer's, or A mixes the channels of different groups.
    """
    a, b = layer.a.float(), layer.b.float()
    weight = cast(Tensor, module.weight)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    inputs = (weight.shape[1] * groups, *weight.shape[2:])
    ones = (1,) * (weight.ndim - 2)
    if tuple(a.shape[1:]) != inputs or tuple(b.shape) != (len(weight), len(a) // groups, *ones):
        raise DeltapatchError(
            f"the factors of {path} have shapes {tuple(a.shape)} and {tuple(b.shape)}, which do not fit its"
            f" weight of shape {tuple(weight.shape)}; import the adapter with the base it was trained on"
        )
    if groups == 1:
        a, b = a.flatten(1), b.flatten(1)
        return (a, b) if len(a) <= min(len(b), a.shape[1]) else _factored(b.double() @ a.double())
    blocks = a.view(groups, len(a) // groups, groups, weight.shape[1], *weight.shape[2:])
    own = torch.stack([blocks[group, :, group] for group in range(groups)]).flatten(2)
    if own.count_nonzero() != a.count_nonzero():
        raise DeltapatchError(
            f"the adapter mixes the channels of different groups of {path}, which no weight of this grouped"
            " convolution does; train it without that layer"
        )
    return _factored((b.view(groups, len(b) // groups, -1).double() @ own.double()).flatten(0, 1))


def _factored(change: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of the smallest rank with B A = change, to within rounding."""
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    rank = max(int((sizes > 1e-7 * sizes[0]).sum()), 1)
    root = sizes[:rank].sqrt()
    return (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float()
