"""Makes zero-shot classifiers from open_clip's architectures, pre-trained tags, weights files and configs."""

import json
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import DeltapatchError
from .open_vocabulary import (
    DEFAULT_TEMPLATES,
    TextEmbedder,
    ZeroShotClassifier,
    checked_class_names,
    checked_templates,
    zero_shot_classifier,
)

_CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def load_zero_shot(
    name: str,
    *,
    weights: str | os.PathLike[str] | None,
    classes: Sequence[str],
    templates: Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> tuple[ZeroShotClassifier, dict[str, Any]]:
    """The frozen zero-shot classifier of a CLIP model, and what open_clip knows of its preprocessing.

    Args:
        name: ``ARCHITECTURE/TAG``, ``ARCHITECTURE``, or a model config of open_clip's as a ``.json`` file.
        weights: a checkpoint of both towers in any form that open_clip reads without executing it;
            ``"random"``; None for the tag's own.
        classes: names of the classes.
        templates: prompts with ``{}`` where the class name goes; `DEFAULT_TEMPLATES` where left out.
        device: where the towers go; left where they are otherwise.

    Raises:
        DeltapatchError: open_clip is not installed or does not know the name, or the weights do not fit it.
    """
    open_clip = _open_clip_library(name)
    classes = checked_class_names(classes)
    templates = DEFAULT_TEMPLATES if templates is None else checked_templates(templates)
    file = None if weights is None or str(weights) == "random" else Path(weights)
    if file is not None and not file.is_file():
        raise DeltapatchError(f"{file}: there is no such weights file")
    try:
        if name.endswith(".json"):
            _check_weights_are_named(name, weights, ())
            model, tokenizer, known = _from_config(open_clip, Path(name), file)
        else:
            model, tokenizer, known = _from_library(open_clip, name, weights, file)
    except DeltapatchError:
        raise
    except Exception as error:  # the library has no common error for network, files and missing packages
        subject = f"open_clip/{name}" if file is None else f"{file} as weights of open_clip/{name}"
        raise DeltapatchError(f"could not load {subject}: {_first_words(error)}") from error
    model.eval().requires_grad_(False)
    if device is not None:
        model.to(device)
    visual: nn.Module = model.visual
    # What is left is the text tower: it can be moved and copied without the images' one.
    del model.visual
    module = zero_shot_classifier(visual, TextEmbedder(model, tokenizer, templates), classes)
    return module, _preprocessing(visual, known)


def _open_clip_library(name: str) -> Any:
    try:
        import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DeltapatchError(
            f"open_clip/{name} needs the library open_clip; run pip install deltapatch[clip]"
        ) from error
    return open_clip


def _from_library(
    open_clip: Any, name: str, weights: str | os.PathLike[str] | None, file: Path | None
) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer and its preprocessing.

    With a tag, weights of one's own are taken to need the tag's preprocessing and activation.
    """
    architecture, _, tag = name.partition("/")
    _check_known(open_clip, architecture, tag)
    if not tag:
        _check_weights_are_named(name, weights, open_clip.list_pretrained_tags_by_model(architecture))
    published: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    model = open_clip.create_model(
        architecture,
        pretrained=tag if weights is None else file and str(file),
        # open_clip only warns where a tag was trained with another activation than the architecture's, and
        # such a model answers a few per cent worse.
        force_quick_gelu=bool(published.get("quick_gelu", False)),
        force_preprocess_cfg={key: published[key] for key in _PREPROCESSING if key in published},
        pretrained_hf=False,
    )
    return model, open_clip.get_tokenizer(architecture), model.visual.preprocess_cfg


def _check_known(open_clip: Any, architecture: str, tag: str) -> None:
    known: list[str] = open_clip.list_models()
    if architecture not in known:
        close = get_close_matches(architecture, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give one of its names or a .json config"
        raise DeltapatchError(f"open_clip has no architecture '{architecture}'; {hint}")
    if tag and not open_clip.is_pretrained_cfg(architecture, tag):
        tags: list[str] = open_clip.list_pretrained_tags_by_model(architecture)
        raise DeltapatchError(
            f"open_clip has no weights '{tag}' for {architecture}; it has: {', '.join(tags) or 'none'}"
        )


def _check_weights_are_named(name: str, weights: str | os.PathLike[str] | None, tags: Sequence[str]) -> None:
    if weights is None:
        known = f", one of {', '.join(tags)}" if tags else ""
        raise DeltapatchError(
            f"open_clip/{name} names no weights: give weights=FILE, 'random' for none, or"
            f" open_clip/ARCHITECTURE/TAG{known}"
        )


def _from_config(open_clip: Any, path: Path, file: Path | None) -> tuple[Any, Any, dict[str, Any]]:
    """The same from a config file, bare or as ``open_clip_config.json`` holds it beside the preprocessing.

    The library's own register of configs is left alone, where a file's name could hide another model.
    """
    if not path.is_file():
        raise DeltapatchError(f"{path}: there is no such model config")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        config = dict(content.get("model_cfg", content))
        text = dict(config["text_cfg"])
        vision = dict(config["vision_cfg"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DeltapatchError(
            f"{path}: not a model config of open_clip's, with embed_dim, vision_cfg and text_cfg"
        ) from error
    own_text = bool(config.pop("custom_text", False)) or "hf_model_name" in text
    towers = {"vision_cfg": vision, "text_cfg": text}
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    kind = open_clip.CLIP
    if own_text:
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    model = kind(**config | towers)
    if file is not None:
        open_clip.load_checkpoint(model, str(file), strict=True)
    context = {"context_length": text.get("context_length", model.context_length)}
    options = context | (text.get("tokenizer_kwargs") or {})
    if text.get("hf_tokenizer_name"):
        tokenizer = open_clip.tokenizer.HFTokenizer(text["hf_tokenizer_name"], **options)
    else:
        tokenizer = open_clip.SimpleTokenizer(**options)
    published = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return model, tokenizer, published | dict(content.get("preprocess_cfg", {}))


def _preprocessing(visual: Any, known: dict[str, Any]) -> dict[str, Any]:
    """What open_clip knows, in `load_base`'s words; its evaluation resizes to the very size of the crop."""
    return {
        "size": visual.image_size if isinstance(visual.image_size, int) else tuple(visual.image_size),
        "mean": tuple(known["mean"]),
        "std": tuple(known["std"]),
        "interpolation": known.get("interpolation", "bicubic"),
        "crop_mode": _CROP_MODES[known.get("resize_mode", "shortest")],
        "crop_pct": 1.0,
    }


def _first_words(error: Exception) -> str:
    """The start of a message that may run over many lines, as one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:200]}…"
