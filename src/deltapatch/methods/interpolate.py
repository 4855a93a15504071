"""PAINT: patching by interpolation between the base's weights and those of a fine-tuned copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import harmonic_mean, mean
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..base import Base
from ..differences import DifferencePart, Storage, difference_part, stored_as
from ..errors import DeltapatchError
from ..layers import Layer
from ..method import Bench, Judgement, Method, check_modules, register_method
from ..normalising import Gathering, NormPart
from ..patch import Patch
from ..touching import Touch

_WITHOUT_JUDGE = 0.5
"""The source's own default, for a task without validation images."""


@register_method("interpolate")
@dataclass(frozen=True)
class Interpolate(Method):
    """θ(α) = θ_0 + α (θ_1 - θ_0), with θ_1 fine-tuned on the task and α chosen on validation images.

    While such a patch is active the base answers its *own* task with θ(α) as well: what it loses there is
    what α weighs against the gain on the new task, so a fit should be given images of the supporting task.
    Without any patch the base is what it always was.

    Sources: PAINT (Ilharco et al., NeurIPS 2022), with the adaptation to networks with a new head per task of
    arXiv 2303.14772, appendix 7; WiSE-FT (Wortsman et al., CVPR 2022), which interpolates the head too.

    Attributes:
        alpha: α from 0 to 1; None chooses the best of ``steps`` values on validation images, the smallest of
            equals.
        steps: values that are tried, evenly from 0 to 1.
        search: what is best: the "harmonic" mean of the task's and the supporting task's accuracy, or their
            "mean". Without supporting images it is the task's accuracy alone.
        statistics: of batch normalisation: "interpolated" as the source does, although they are then not the
            statistics of θ(α); "re-estimated" for each α on the training and the supporting images, which
            mends that; or "kept".
        modules: from which of the last stages on weights change; "all" changes the whole base.
        head: whether the head is interpolated too, from the base's own classifier (WiSE-FT): for a task with
            the base's classes.
        storage: as in the full method.
    """

    alpha: float | None = None
    steps: int = 11
    search: Literal["harmonic", "mean"] = "harmonic"
    statistics: Literal["interpolated", "re-estimated", "kept"] = "interpolated"
    modules: int | Literal["all"] = "all"
    head: bool = False
    storage: Storage = "fp32"

    site_type: ClassVar[type] = Layer
    learning_rate: ClassVar[float] = 1e-3
    shares_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_modules(self.modules)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise DeltapatchError(f"alpha must be between 0 (the base) and 1 (fine-tuned), not {self.alpha}")
        if self.steps < 2:
            raise DeltapatchError(f"steps must be 2 or more values of alpha, not {self.steps}")

    def sites(self, anatomy: Anatomy) -> tuple[Layer, ...]:
        return anatomy.layers_from(self.modules)

    def part(self, site: Layer) -> nn.Module:
        return difference_part(site, "kept" if self.statistics == "kept" else "own", self.storage)

    def initialise(self, site: Layer, part: nn.Module, base: Base) -> None:
        if isinstance(part, NormPart):
            part.start_from(base.submodule(site.path))

    def touches(self, site: Layer, part: nn.Module) -> Mapping[str, Touch]:
        alpha = 1.0 if self.alpha is None else self.alpha
        if isinstance(part, NormPart):
            return {site.path: part.touch(alpha, alpha if self.statistics == "interpolated" else 1.0)}
        return {site.path: cast(DifferencePart, part).touch(alpha)}

    def starting_head(self, base: Base, classes: Sequence[str]) -> nn.Linear | None:
        return classifier_of(base, classes) if self.head else None

    def fitted_as(self) -> "Interpolate":
        return replace(self, alpha=1.0, storage="fp32")

    def finished(self, patch: Patch, base: Base, bench: Bench) -> Patch:
        if self.alpha is not None:
            alpha, figures = self.alpha, dict[str, float]()
        else:
            alpha, figures = self._searched(patch, base, bench)
        chosen = self._at(alpha, patch, base, bench)
        figures["interpolation/alpha"] = alpha
        chosen.info = chosen.info.model_copy(update={"figures": {**chosen.info.figures, **figures}})
        if self.storage == "fp32":
            return chosen
        return stored_as(chosen, replace(self, alpha=alpha), base)

    def _searched(self, patch: Patch, base: Base, bench: Bench) -> tuple[float, dict[str, float]]:
        """The best α of the grid, and what each one reached."""
        alphas = [step / (self.steps - 1) for step in range(self.steps)]
        figures: dict[str, float] = {}
        judgements: list[Judgement] = []
        for alpha in alphas:
            judgement = bench.judge(self._at(alpha, patch, base, bench))
            if judgement is None:
                return _WITHOUT_JUDGE, figures
            judgements.append(judgement)
            figures[f"interpolation/{alpha:.2f}/task"] = judgement.task
            if judgement.supporting is not None:
                figures[f"interpolation/{alpha:.2f}/supporting"] = judgement.supporting
        return alphas[best_of(judgements, self.search)], figures

    def _at(self, alpha: float, patch: Patch, base: Base, bench: Bench) -> Patch:
        """The fitted patch on the way to the base; it shares all tensors that need not differ."""
        found = patch.as_method(replace(self, alpha=alpha, storage="fp32"))
        if self.head and patch.head is not None:
            start = classifier_of(base, patch.classes).to(patch.head.weight)
            found.head = interpolated_linear(start, patch.head, alpha)
        if self.statistics == "re-estimated":
            bench.gather(found, Gathering())
        return found


def best_of(judgements: Sequence[Judgement], search: Literal["harmonic", "mean"]) -> int:
    """Which judgement is best; the first of equals."""
    average = harmonic_mean if search == "harmonic" else mean
    scores = [
        judgement.task if judgement.supporting is None else average([judgement.supporting, judgement.task])
        for judgement in judgements
    ]
    return scores.index(max(scores))


def classifier_of(base: Base, classes: Sequence[str]) -> nn.Linear:
    """A copy of the base's own classifier, as a head for as many classes.

    Raises:
        DeltapatchError: the classifier is no linear layer, or has another number of outputs.
    """
    path = base.anatomy.head.path
    layer = None if path is None else base.submodule(path)
    if not isinstance(layer, nn.Linear) or layer.out_features != len(classes):
        outputs = layer.out_features if isinstance(layer, nn.Linear) else "no"
        raise DeltapatchError(
            f"head=True starts from the classifier of {base.name}, which must be a linear layer with the"
            f" task's {len(classes)} outputs, but it has {outputs}; leave head=True out for other classes"
        )
    copy = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        copy.weight.copy_(layer.weight)
        own_bias = cast(Tensor | None, layer.bias)
        copy.bias.copy_(torch.zeros_like(copy.bias) if own_bias is None else own_bias)
    return copy


@torch.no_grad()
def interpolated_linear(start: nn.Linear, end: nn.Linear, alpha: float) -> nn.Linear:
    """A linear layer on the way from one to another: bit for bit the first at 0 and the second at 1."""
    between = nn.Linear(start.in_features, start.out_features).to(end.weight)
    between.weight.copy_(torch.lerp(start.weight, end.weight, alpha))
    between.bias.copy_(torch.lerp(start.bias, end.bias, alpha))
    return between
