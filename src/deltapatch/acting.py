"""What the base's modules compute while a patch is active."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base
from .exchange import merged
from .patch import Patch, pooled
from .touching import Touch
from .trees import tensors_in


def touches_of(base: Base, patch: Patch, headless: bool = False) -> dict[nn.Module, Touch]:
    """What the base's modules compute while the patch is active, for one use in one thread.

    With ``headless`` the base's own classifier answers, whether the patch has a head or not.
    """
    touches = {base.submodule(path): touch for path, touch in patch.touches().items()}
    if patch.head is None or headless:
        return touches
    site = base.anatomy.head
    return merged(head_touches(base, lambda features: patch.logits(features, site)), touches)


def feature_touches(base: Base, patch: Patch) -> dict[nn.Module, Touch]:
    """As `touches_of`, but the model returns the pooled features that the patch's head is given."""
    touches = {base.submodule(path): touch for path, touch in patch.touches().items()}
    layout = base.anatomy.head.layout
    return merged(head_touches(base, lambda features: pooled(features, layout)), touches)


def head_touches(base: Base, answer: Callable[[Tensor], Any]) -> dict[nn.Module, Touch]:
    """The model returns ``answer(features)``, where features are what the base's classifier is given."""
    site = base.anatomy.head
    features: list[Tensor] = []

    def note_features(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        features.append(tensors_in((args, kwargs))[0])
        # What follows in the base may need an output of this shape; nobody looks at the numbers.
        with torch.no_grad():
            return forward(*args, **kwargs)

    def answered(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        features.clear()
        output = forward(*args, **kwargs)
        return answer(tensors_in(output)[-1] if site.path is None else features[0])

    if site.path is None:
        return {base.module: answered}
    return {base.submodule(site.path): note_features, base.module: answered}
