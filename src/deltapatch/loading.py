"""Makes a `Base` from a timm or torchvision name, a function in a Python file, or a module."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from .base import Base
from .errors import DeltapatchError
from .preprocessing import Preprocessing

Builder = Callable[[int | None], nn.Module]
"""Makes the module, with the given number of classes or its own."""

_OPEN_CLIP = "open_clip/"
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")


@dataclass(frozen=True)
class _Recipe:
    """How to make a model, and what its library knows about it."""

    name: str
    build: Builder
    preprocessing: dict[str, Any]
    classes: tuple[str, ...]


def load_base(
    source: str | nn.Module,
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    num_classes: int | None = None,
    size: int | tuple[int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    templates: Sequence[str] | None = None,
    name: str | None = None,
    device: str | torch.device | None = None,
) -> Base:
    """Loads the frozen model that patches are learned for.

    Args:
        source: ``timm/NAME``, ``torchvision/NAME``, ``FILE.py:FUNCTION`` (the function is called without
        arguments
            and returns the module; the file is executed), ``demo`` (the small base that ships with
            deltapatch), ``open_clip/ARCHITECTURE/TAG`` or ``open_clip/FILE.json`` (zero-shot, its head made
            from the names of ``classes``; see `deltapatch.open_vocabulary`), or a module.
        weights: a ``.safetensors`` file or one that ``torch.load(weights_only=True)`` reads; ``"random"``
        for the
            random starting weights. Left out: the library's own pre-trained weights (a file's function or a
            module
            keeps the weights it comes with).
        classes: names of the base's classes: a sequence, a text file with one a line, or ``"imagenet1k"``.
        num_classes: for weights with another number of classes; found from the weights where it is left out.
        size: height and width of the input in pixels. Needed for a module or a file that does not tell.
        mean: per-channel mean of pixels in 0..1; one value means a grey input.
        std: per-channel standard deviation.
        interpolation: how images are resized.
        crop_pct: share of the resized image that the centre crop keeps.
        templates: for open_clip: prompts with ``{}`` where a class name goes; "a photo of a {}." where left
        out.
        name: what to call the base; made from the source where left out.
        device: where to put the model; left where it is otherwise.

    Raises:
        DeltapatchError: the source is not known, or the weights do not fit it.
    """
    names = None if classes is None else _class_names(classes)
    if isinstance(source, str) and source.startswith(_OPEN_CLIP):
        recipe = _open_clip(source.removeprefix(_OPEN_CLIP), weights, names or (), templates, device)
        # Both towers' weights are read there: the classifier's are made from them.
        weights = None
    elif templates is not None:
        raise DeltapatchError("templates= makes the heads of open_clip bases; leave it out for any other")
    else:
        recipe = _recipe(source, pretrained=weights is None)
    if weights is None or str(weights) == "random":
        module = recipe.build(num_classes)
    else:
        module = _with_weights(recipe, Path(weights), num_classes)
    if not isinstance(source, nn.Module):
        module.eval().requires_grad_(False)
    if device is not None:
        module.to(device)
    given = {"size": size, "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    known = _known_preprocessing(module, recipe) | {
        key: value for key, value in given.items() if value is not None
    }
    return Base(
        module=module,
        name=name or recipe.name,
        source=source if isinstance(source, str) else "",
        preprocessing=_preprocessing(recipe.name, known),
        classes=recipe.classes if names is None else names,
    )


# --- sources ----------------------------------------------------------------------------------------------


def _recipe(source: str | nn.Module, pretrained: bool) -> _Recipe:
    if isinstance(source, nn.Module):
        module = source
        return _Recipe(type(module).__name__, lambda _: module, {}, ())
    library, _, rest = source.partition("/")
    if library == "timm" and rest:
        return _timm(rest, pretrained)
    if library == "torchvision" and rest:
        return _torchvision(rest, pretrained)
    if source == "demo":
        return _demo()
    path, _, function = source.rpartition(":")
    if path.endswith(".py") and function:
        return _from_file(Path(path), function)
    raise DeltapatchError(
        f"'{source}' is not a base: expected timm/NAME, torchvision/NAME, FILE.py:FUNCTION or demo,"
        " or open_clip/ARCHITECTURE/TAG"
    )


def _timm(name: str, pretrained: bool) -> _Recipe:
    import timm

    if not timm.is_model(name):
        close = _close(name.partition(".")[0], timm.list_models())
        raise DeltapatchError(f"timm has no model '{name}'{close}")
    if pretrained and not timm.is_model_pretrained(name):
        raise DeltapatchError(f"timm has no weights for '{name}'; give weights=FILE, or 'random' for none")

    def build(num_classes: int | None) -> nn.Module:
        extra: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
        try:
            return timm.create_model(name, pretrained=pretrained, **extra)
        except Exception as error:
            raise DeltapatchError(
                f"timm could not make '{name}': {error}; give weights=FILE to use your own"
            ) from error

    config = timm.get_pretrained_cfg(name)
    is_imagenet = config is not None and config.num_classes == 1000
    return _Recipe(name, build, {}, imagenet_classes() if is_imagenet else ())


def _torchvision(name: str, pretrained: bool) -> _Recipe:
    import torchvision.models as zoo

    if name not in zoo.list_models():
        raise DeltapatchError(f"torchvision has no model '{name}'{_close(name, zoo.list_models())}")
    choices = list(zoo.get_model_weights(name))
    # Own weights are taken to be prepared as the first published ones were; the newest are the library's
    # default.
    chosen = (
        getattr(zoo.get_model_weights(name), "DEFAULT", None) if pretrained else next(iter(choices), None)
    )

    def build(num_classes: int | None) -> nn.Module:
        extra = {} if num_classes is None else {"num_classes": num_classes}
        try:
            return zoo.get_model(name, weights=chosen if pretrained else None, **extra)
        except Exception as error:
            raise DeltapatchError(
                f"torchvision could not make '{name}': {error}; give weights=FILE to use your own"
            ) from error

    if chosen is None:
        return _Recipe(name, build, {}, ())
    steps: Any = chosen.transforms()
    known = {
        "size": int(steps.crop_size[0]),
        "mean": tuple(steps.mean),
        "std": tuple(steps.std),
        "interpolation": steps.interpolation.value,
        "crop_pct": min(steps.crop_size[0] / steps.resize_size[0], 1.0),
    }
    return _Recipe(name, build, known, tuple(chosen.meta.get("categories", ())))


def _demo() -> _Recipe:
    from .demo.base import PREPROCESSING, build_demo_model
    from .demo.characters import CLASSES

    known = PREPROCESSING.model_dump()
    size = known.pop("input_size")[1:]
    return _Recipe(
        "demo (printed characters)", lambda _: build_demo_model(), {"size": size, **known}, CLASSES
    )


def _open_clip(
    name: str,
    weights: str | os.PathLike[str] | None,
    classes: Sequence[str],
    templates: Sequence[str] | None,
    device: str | torch.device | None,
) -> _Recipe:
    from .clip_loading import load_zero_shot

    module, known = load_zero_shot(name, weights=weights, classes=classes, templates=templates, device=device)

    def build(num_classes: int | None) -> nn.Module:
        if num_classes not in (None, len(classes)):
            raise DeltapatchError(f"open_clip/{name} has one class a name, {len(classes)}, not {num_classes}")
        return module

    return _Recipe(Path(name).stem if name.endswith(".json") else name, build, known, ())


def _from_file(path: Path, function: str) -> _Recipe:
    if not path.is_file():
        raise DeltapatchError(f"{path}: there is no such file; expected FILE.py:FUNCTION")
    specification = spec_from_file_location(f"deltapatch_base_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    namespace = module_from_spec(specification)
    try:
        specification.loader.exec_module(namespace)
    except Exception as error:
        raise DeltapatchError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    make = getattr(namespace, function, None)
    if not callable(make):
        raise DeltapatchError(f"{path} has no function '{function}'")

    def build(num_classes: int | None) -> nn.Module:
        module = make() if num_classes is None else make(num_classes=num_classes)
        if not isinstance(module, nn.Module):
            raise DeltapatchError(
                f"{path}:{function} returned a {type(module).__name__}; it must return an nn.Module"
            )
        return module

    return _Recipe(function, build, {}, ())


def _close(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# --- weights ----------------------------------------------------------------------------------------------


def _with_weights(recipe: _Recipe, path: Path, num_classes: int | None) -> nn.Module:
    """The recipe's model with the file's weights, every one of them and no other."""
    state = read_state_dict(path)
    module = recipe.build(num_classes)
    if num_classes is None:
        found = _other_number_of_classes(module, state)
        module = module if found is None else recipe.build(found)
    own = module.state_dict()
    ignorable = {key for key in own if key.endswith("num_batches_tracked")}
    missing, unknown = own.keys() - state.keys() - ignorable, state.keys() - own.keys()
    if missing or unknown:
        parts = [f"lack {len(missing)} of its tensors (such as '{min(missing)}')"] if missing else []
        parts += [f"hold {len(unknown)} that it has not (such as '{min(unknown)}')"] if unknown else []
        raise DeltapatchError(f"{path}: these weights are not of {recipe.name}: they {' and '.join(parts)}")
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise DeltapatchError(
                f"{path}: '{key}' has shape {tuple(tensor.shape)}, but {recipe.name} needs"
                f" {tuple(own[key].shape)}"
            )
    module.load_state_dict(state, strict=False)
    return module


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, in memory of their own; nothing in the file is executed.

    Raises:
        DeltapatchError: the file is missing, or neither safetensors nor a plain torch checkpoint.
    """
    if not path.is_file():
        raise DeltapatchError(f"{path}: there is no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            state: Any = load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DeltapatchError(
            f"{path}: not a safetensors file or plain torch checkpoint ({str(error).splitlines()[0]})"
        ) from error
    return plain_state_dict(state, path)


def plain_state_dict(state: Any, path: Path) -> dict[str, Tensor]:
    """Names and tensors of what a checkpoint held, freed of what training scripts wrap around them.

    Raises:
        DeltapatchError: it does not hold a state dict.
    """
    wrapped = next(
        (key for key in _WRAPPINGS if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)),
        None,
    )
    state = state if wrapped is None else state[wrapped]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DeltapatchError(f"{path}: does not hold a state dict, that is names and tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _other_number_of_classes(module: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes of the weights, where that alone sets them apart from the module."""
    own = module.state_dict()
    differing = [
        (own[key].shape, state[key].shape)
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if not differing or any(a[1:] != b[1:] for a, b in differing):
        return None
    numbers = {found[0] for _, found in differing if found}
    return numbers.pop() if len(numbers) == 1 else None


# --- preprocessing and classes ----------------------------------------------------------------------------


def _known_preprocessing(module: nn.Module, recipe: _Recipe) -> dict[str, Any]:
    if recipe.preprocessing or not hasattr(module, "pretrained_cfg"):
        return dict(recipe.preprocessing)
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(module)
    known = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    return {"size": tuple(config["input_size"][1:]), **known}


def _preprocessing(name: str, known: dict[str, Any]) -> Preprocessing:
    """The preprocessing from what is known; the number of channels is that of ``mean``.

    Raises:
        DeltapatchError: the input size is not known, or a value is not allowed.
    """
    size = known.pop("size", None)
    if size is None:
        raise DeltapatchError(f"the input size of {name} is not known; give size= (--size), for example 224")
    mean, std = known.pop("mean", (0.485, 0.456, 0.406)), known.pop("std", (0.229, 0.224, 0.225))
    mean = (float(mean),) if isinstance(mean, (int, float)) else tuple(float(v) for v in mean)
    std = (float(std),) * len(mean) if isinstance(std, (int, float)) else tuple(float(v) for v in std)
    height, width = (size, size) if isinstance(size, int) else size
    if len(mean) not in (1, 3) or len(std) != len(mean):
        raise DeltapatchError(
            f"mean has {len(mean)} values and std has {len(std)}; both need 3 values for colour or 1"
            f" for grey input"
        )
    try:
        return Preprocessing(input_size=(len(mean), height, width), mean=mean, std=std, **known)
    except ValidationError as error:
        first = error.errors()[0]
        raise DeltapatchError(f"preprocessing of {name}: {first['loc'][0]}: {first['msg']}") from error


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 class names in ILSVRC-2012 order, as torchvision has them."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _class_names(classes: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str) and classes == "imagenet1k":
        return imagenet_classes()
    if isinstance(classes, (str, os.PathLike)):
        path = Path(classes)
        if not path.is_file():
            raise DeltapatchError(
                f"{path}: there is no such file of class names (one a line), nor a set of that name"
            )
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(classes)
