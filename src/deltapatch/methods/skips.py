"""Skips with the same weights for all images: the ablations of Δ-Networks (arXiv 2303.14772, table 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..anatomy import Anatomy, Stage, SubBlock
from ..errors import AnatomyError, DeltapatchError
from ..method import Method, check_modules, register_method
from ..skipping import DeltaModule, skip_touches, sum_norm, weighted_sum
from ..touching import Touch

Weights = Literal["learned", "one", "random", "redrawn", "untrained-module"]


@register_method("skips")
@dataclass(frozen=True)
class Skips(Method):
    """Skip connections of a stage, each with one weight λ for all images, where Δ-Networks have a_ij(x)::

        f_i = act( F_i(f_{i-1}) + N_i( Σ_j λ_ij f_j ) )

    The sum stands in the place of the base's own skip; a sum without any skip is 0. The rows of table 8 are:
    "learnable skip connections", ``which="existing"``; "all skips (learnable)", the default; "all skips",
    ``weights="one"``; "+ BN", ``norm=True``. What "+ Random" means is not said in the paper; "random",
    "redrawn" and "untrained-module" are three readings of it.

    Attributes:
        modules: how many stages get the skips, counted from the last; or "all".
        which: "existing": the base's own skips, n a stage; "all": those from every earlier state too,
            n (n + 1) / 2 a stage.
        weights: "learned": every λ trains; "one": all are 1; "random": drawn once from U(0, 1), never
            trained, in the file; "redrawn": drawn from U(0, 1) for each batch in train mode, and their mean
            1/2 in eval mode, so that a patch answers the same twice (without ``norm`` nothing trains beside
            the head, which is then solved in eval mode, so that nothing is redrawn); "untrained-module":
            what a light Δ-module with random weights gives for each image, which are in the file and never
            train.
        start: where learned weights begin: "base": 1 for the base's own skips and 0 for the new ones, which
            is the base itself; "one": all at 1.
        norm: whether each sum is normalised, by a layer with a scale and a shift that train.
    """

    modules: int | Literal["all"] = "all"
    which: Literal["existing", "all"] = "all"
    weights: Weights = "learned"
    start: Literal["base", "one"] = "base"
    norm: bool = False

    site_type: ClassVar[type] = Stage

    def __post_init__(self) -> None:
        check_modules(self.modules)
        if self.weights != "learned" and self.start != "base":
            raise DeltapatchError(
                f"start says where learned weights begin, and weights={self.weights!r} are not learned;"
                " leave it out"
            )
        if self.which == "existing" and self.weights == "one" and not self.norm:
            raise DeltapatchError(
                "the existing skips with weight 1 are the base itself; choose which='all', other weights or"
                " norm=True"
            )

    @classmethod
    def sizes(cls) -> tuple[Method, ...]:
        # For ablations; delta has weights that depend on the image.
        return ()

    def sites(self, anatomy: Anatomy) -> tuple[Stage, ...]:
        stages = anatomy.last_stages(self.modules)
        found = tuple(stage for stage in stages if any(self.entering(stage)))
        if not found:
            raise AnatomyError(
                "this base has no skips of its own there, so which='existing' has nothing to weigh;"
                " which='all' introduces new ones"
            )
        return found

    def entering(self, stage: Stage) -> list[int]:
        """How many skips enter each sub-block, always from the latest states."""
        if self.which == "all":
            return list(range(1, len(stage.sub_blocks) + 1))
        return [int(sub_block.join.has_shortcut) for sub_block in stage.sub_blocks]

    def part(self, site: Stage) -> nn.Module:
        return SkipsPart(site, self)

    def touches(self, site: Stage, part: nn.Module) -> Mapping[str, Touch]:
        return skip_touches(site, cast(SkipsPart, part), keeps_join=False)


class SkipsPart(nn.Module):
    """What a patch owns for one stage: weights of its skips, a module that gives them, or neither, and norms.

    Attributes:
        entering: how many skips enter each sub-block.
        weights: λ of those skips, sub-block after sub-block, each from the earliest state on: a parameter if
            they are learned, a buffer if they are random; None otherwise.
        delta: the untrained Δ-module, whose tensors are buffers; None otherwise.
        sum_norms: one for each sub-block that skips enter; empty without normalisation.
    """

    weights: Tensor | None

    def __init__(self, stage: Stage, method: Skips) -> None:
        super().__init__()
        self.kind: Weights = method.weights
        self.entering = method.entering(stage)
        count = sum(self.entering)
        if self.kind == "learned":
            self.weights = nn.Parameter(_start(stage.sub_blocks, self.entering, method.start))
        else:
            self.register_buffer("weights", torch.rand(count) if self.kind == "random" else None)
        self.delta = _untrained_module(stage, count) if self.kind == "untrained-module" else None
        self.sum_norms = nn.ModuleList()
        if method.norm:
            self.sum_norms.extend(
                sum_norm(stage.channels, stage.layout) if skips else nn.Identity() for skips in self.entering
            )

    def skip_weights(self, x: Tensor) -> Tensor:
        """λ of all possible skips of the stage, 0 for those that are left out.

        Returns:
            shape (1, skips), or (N, skips) from the untrained Δ-module.
        """
        pieces = self._present(x).split(self.entering, dim=1)
        rows = [functional.pad(piece, (index + 1 - piece.shape[1], 0)) for index, piece in enumerate(pieces)]
        return torch.cat(rows, 1)

    def summed(self, index: int, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """N_i( Σ_j λ_ij f_j ) for sub-block ``index``, from 0.

        Args:
            index: of the sub-block.
            weights: λ_ij, of shape (1 or N, len(states)).
            states: f_0 ... f_{i-1}.
        """
        skips = self.entering[index]
        if not skips:
            return torch.zeros_like(states[-1])
        total = weighted_sum(weights[:, -skips:], states[-skips:])
        if not self.sum_norms:
            return total
        norm = self.sum_norms[index]
        return norm(total.to(cast(Tensor, norm.weight).dtype)).to(total.dtype)

    def fold(self, tensor: Tensor) -> Tensor:
        """The tensor itself: one patch has the rows that the base has."""
        return tensor

    def _present(self, x: Tensor) -> Tensor:
        """λ of the skips that are there, of shape (1 or N, their number)."""
        count = sum(self.entering)
        if self.delta is not None:
            return torch.sigmoid(self.delta(x))
        if self.weights is not None:
            return self.weights[None]
        if self.kind == "redrawn":
            return torch.rand(1, count, device=x.device) if self.training else x.new_full((1, count), 0.5)
        return x.new_ones(1, count)


def _start(sub_blocks: Sequence[SubBlock], entering: Sequence[int], start: Literal["base", "one"]) -> Tensor:
    """Where learned weights begin, shape (number of skips,)."""
    if start == "one":
        return torch.ones(sum(entering))
    rows = zip(sub_blocks, entering, strict=True)
    values = [
        float(sub_block.join.has_shortcut and source == skips - 1)
        for sub_block, skips in rows
        for source in range(skips)
    ]
    return torch.tensor(values)


def _untrained_module(stage: Stage, skips: int) -> DeltaModule:
    """A Δ-module without norms, which do nothing before they are trained, and with buffers for parameters."""
    module = DeltaModule(stage.in_channels, skips, stage.layout, normalise=False, light=True)
    # A Δ-module that is to be trained starts with weights near 1/2; here they shall be random.
    module.fc.reset_parameters()
    for inner in module.modules():
        for name, parameter in list(inner.named_parameters(recurse=False)):
            delattr(inner, name)
            inner.register_buffer(name, parameter.detach())
    return module
