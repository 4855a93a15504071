"""Bases whose classes are texts: CLIP's image tower with a zero-shot head made by its text tower.

The class embedding e_c is the mean of the normalised embeddings of the prompts that name the class,
normalised again (CLIP, arXiv 2103.00020). For image features v the logits are

    logit_c = s · ⟨e_c, v / ‖v‖⟩,     s = exp(the model's logit scale)

PAINT (arXiv 2208.05592) patches such a base with its heads held at the text embeddings: `zero_shot_head` is
the head of a task, `zero_shot_base` the same base asked about other classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from .base import Base
from .errors import DeltapatchError
from .trees import tensors_in

DEFAULT_TEMPLATES: Final = ("a photo of a {}.",)
"""The one prompt of the CLIP paper that fits any class; sets of their own do better with their own."""

_PROMPTS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class TextEmbedder:
    """A text tower with its tokenizer and prompts. It stays on its device and is never changed.

    Attributes:
        tower: an open_clip model without its image tower, frozen and in eval mode.
        tokenizer: texts -> token numbers, int64 of shape (texts, context).
        templates: the prompts, with ``{}`` where the class name goes.
    """

    tower: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    @torch.no_grad()
    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """One vector of length 1 a class, float32 of shape (classes, features), on the tower's device.

        Raises:
            DeltapatchError: there is no class name, or a template has no place for it.
        """
        names = checked_class_names(class_names)
        templates = self.templates if templates is None else checked_templates(templates)
        prompts = [template.replace("{}", name) for name in names for template in templates]
        tokens = self.tokenizer(prompts).to(next(self.tower.parameters()).device)
        encode = cast(Callable[[Tensor], Tensor], self.tower.encode_text)
        embeddings = torch.cat([encode(part) for part in tokens.split(_PROMPTS_AT_ONCE)]).float()
        of_prompts = functional.normalize(embeddings, dim=-1).unflatten(0, (len(names), len(templates)))
        return functional.normalize(of_prompts.mean(1), dim=-1)

    @torch.no_grad()
    def class_weights(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """s · e_c: weights of a linear layer that gives zero-shot logits, of shape (classes, features)."""
        scale = cast(Tensor, self.tower.logit_scale).float().exp()
        return scale * self.class_embeddings(class_names, templates)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextEmbedder":
        # It never changes, so the copy of a model can share it.
        return self


class ZeroShotClassifier(nn.Module):
    """Images of shape (N, 3, H, W) -> zero-shot logits of shape (N, classes).

    The text tower is no submodule: the logits depend on it only through the classifier's weights, and so do
    `state_dict()` and the base's fingerprint.

    Attributes:
        visual: the image tower.
        classifier: a linear layer without bias whose rows are s · e_c; it is given normalised features.
        text: what made the rows, and makes those of other classes.
    """

    def __init__(self, visual: nn.Module, classifier: nn.Linear, text: TextEmbedder) -> None:
        super().__init__()
        self.visual = visual
        self.classifier = classifier
        self.text = text

    def forward(self, images: Tensor) -> Tensor:
        # Towers that also return their tokens return them behind the pooled features.
        features = tensors_in(self.visual(images))[0]
        return self.classifier(functional.normalize(features, dim=-1))


def zero_shot_classifier(
    visual: nn.Module, text: TextEmbedder, class_names: Sequence[str]
) -> ZeroShotClassifier:
    """The frozen classifier for the classes, in eval mode, where the image tower is and in its number format.

    Raises:
        DeltapatchError: there is no class name.
    """
    like = next(visual.parameters())
    classifier = _linear(text.class_weights(class_names).to(like), bias=False)
    return ZeroShotClassifier(visual, classifier, text).eval().requires_grad_(False)


def zero_shot_base(base: Base, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Base:
    """The same base asked about other classes, to measure another task zero-shot.

    It shares the image tower. So it answers as a patch of ``base`` makes the tower answer wherever it is
    called inside `PatchedModel.active`; its own fingerprint is another, as its classes are.

    Args:
        base: one from ``load_base("open_clip/...")``.
        class_names: the classes in the order of the logits.
        templates: prompts with ``{}`` where the class name goes; those of ``base`` where left out, and of the
            new base in either case.

    Raises:
        DeltapatchError: the base has no text tower, there is no class name, or a template has no ``{}``.

    Example:
        >>> base = deltapatch.load_base("open_clip/ViT-B-32/openai", classes=["cat", "dog"])
        >>> cars = zero_shot_base(base, ["red car", "blue car"], ["a photo of a {} in the street."])
    """
    module = _zero_shot_module(base)
    text = module.text
    if templates is not None:
        text = TextEmbedder(text.tower, text.tokenizer, checked_templates(templates))
    return Base(
        module=zero_shot_classifier(module.visual, text, class_names),
        name=base.name,
        source=base.source,
        preprocessing=base.preprocessing,
        classes=tuple(class_names),
    )


def zero_shot_head(
    base: Base, class_names: Sequence[str], templates: Sequence[str] | None = None
) -> nn.Linear:
    """A patch's head that answers as the base does zero-shot: weights s · e_c, bias 0, in float32.

    Args:
        base: one from ``load_base("open_clip/...")``.
        class_names: the task's classes in the order of the logits.
        templates: prompts with ``{}`` where the class name goes; those of ``base`` where left out.

    Returns:
        A layer from features to classes on the base's device.

    Raises:
        DeltapatchError: the base has no text tower, there is no class name, or a template has no ``{}``.

    Example:
        >>> patch = method.build(base, names)
        >>> patch.head.load_state_dict(zero_shot_head(base, names).state_dict())
    """
    weight = _zero_shot_module(base).text.class_weights(class_names, templates)
    return _linear(weight.to(base.device), bias=True)


def checked_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The prompts, each with a place for the class name.

    Raises:
        DeltapatchError: there are none, or one has no ``{}``.
    """
    if isinstance(templates, str):
        raise DeltapatchError(
            f"templates must be a sequence of texts, but it is the single text '{templates}'"
        )
    if not templates:
        raise DeltapatchError(f"templates is empty; give at least one text such as '{DEFAULT_TEMPLATES[0]}'")
    bad = next((template for template in templates if "{}" not in template), None)
    if bad is not None:
        raise DeltapatchError(
            f"template '{bad}' has no place for the class name; put {{}} there, as in"
            f" '{DEFAULT_TEMPLATES[0]}'"
        )
    return tuple(templates)


def checked_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names, at least one.

    Raises:
        DeltapatchError: there are none, or it is a single text.
    """
    if isinstance(class_names, str):
        raise DeltapatchError(
            f"classes must be a sequence of names, but it is the single text '{class_names}'"
        )
    if not class_names:
        raise DeltapatchError(
            "an open-vocabulary base needs the names of its classes; give classes= (--classes)"
        )
    return tuple(class_names)


def _zero_shot_module(base: Base) -> ZeroShotClassifier:
    if not isinstance(base.module, ZeroShotClassifier):
        raise DeltapatchError(
            f"base {base.name} has no text tower to name classes with; load one with"
            " load_base('open_clip/ARCHITECTURE/TAG', classes=...)"
        )
    return base.module


def _linear(weight: Tensor, bias: bool) -> nn.Linear:
    """A layer with these weights and a bias of zeros; no random number is drawn."""
    classes, features = weight.shape
    options: Any = {"bias": bias, "device": weight.device, "dtype": weight.dtype}
    layer = cast(nn.Linear, skip_init(nn.Linear, features, classes, **options))
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.zero_()
    return layer
