"""Many patches in one run: the base is walked once, and patches that act at the same places run as one batch.

A group of patches of one method, configuration and place of divergence is *folded*: its images stand in the
batch axis once for each patch. The base's own layers do not know; the patches' pieces see their own rows
(`joint`). A fold is proved by running it the first time that a kind of patch is seen; where it fails,
patches of that kind run one after the other on the shared trunk.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .acting import head_touches, touches_of
from .base import Base
from .compiling import CompiledAnswers
from .exchange import merged
from .joint import Rows
from .patch import Patch, pooled
from .split import Split, Walk, divergence_of, split_before, walk
from .touching import Touch, touched
from .trees import exchange_tensors, tensors_in

_ROOM_ON_PROCESSOR = 128 * 2**20
"""Bytes that a fold's widest tensors may take on a processor, where a longer batch soon gains nothing."""
_STATES_AT_ONCE = 8
"""How many tensors as wide as the tail's widest are taken to live at once."""


@dataclass(frozen=True)
class _Kind:
    """What patches must have in common to be folded."""

    divergence: str
    method: Hashable
    sites: tuple[Any, ...]
    has_head: bool
    dtype: torch.dtype | None


class JointAnswers:
    """Answers of many patches of one base, each the same as the patch alone gives, within rounding.

    With ``compiled`` the tails run through `torch.compile`; the base itself does not.

    What it remembers are splits and proofs; they depend on the base alone, so any thread may use it.
    """

    def __init__(self, base: Base, compiled: CompiledAnswers | None = None) -> None:
        self.base = base
        self.compiled = compiled
        self._splits: dict[str, Split | None] = {}
        self._folds: dict[_Kind, _Fold | None] = {}

    @torch.no_grad()
    def all(self, images: Tensor, patches: Mapping[str | None, Patch | None]) -> dict[str | None, Any]:
        """Every patch's answer for every image; a patch of None is the base itself."""
        work = _Work(self, patches)
        walked = walk(self.base, images, work.divergences, to_end=work.needs_end)
        answers: dict[str | None, Any] = {}
        for name, patch in patches.items():
            if patch is None:
                answers[name] = walked.output
            elif name in work.heads:
                answers[name] = self._headed(patch, walked, None)
            elif name in work.alone:
                answers[name] = self._whole(patch, images)
        for split, kind, names in work.groups:
            group = [work.patches[name] for name in names]
            found = self._group(kind, split, walked.given[split.divergence], group)
            answers.update(zip(names, found, strict=True))
        return {name: answers[name] for name in patches}

    @torch.no_grad()
    def rows(self, images: Tensor, patches: Sequence[Patch | None]) -> list[Any]:
        """One answer an image, from the patch in its place; None is the base, run on the whole batch."""
        places: dict[int, list[int]] = defaultdict(list)
        for place, patch in enumerate(patches):
            places[id(patch)].append(place)
        distinct = {id(patch): patch for patch in patches}
        work = _Work(self, distinct)
        walked = walk(self.base, images, work.divergences, to_end=work.needs_end)
        answers: list[Any] = [None] * len(patches)

        def put(key: int, output: Any) -> None:
            for position, place in enumerate(places[key]):
                answers[place] = _row(output, position)

        for key, patch in distinct.items():
            here = torch.tensor(places[key], device=images.device)
            if patch is None:
                put(key, exchange_tensors(walked.output, (t[here] for t in tensors_in(walked.output))))
            elif key in work.heads:
                put(key, self._headed(patch, walked, here))
            elif key in work.alone:
                put(key, self._whole(patch, images[here]))
        for split, kind, keys in work.groups:
            order = torch.tensor([place for key in keys for place in places[key]], device=images.device)
            given = [tensor[order] for tensor in walked.given[split.divergence]]
            rows = Rows(tuple(len(places[key]) for key in keys))
            found = self._fold_or_loop(kind, split, given, [work.patches[key] for key in keys], rows)
            for key, output in zip(keys, found, strict=True):
                put(key, output)
        return answers

    def _headed(self, patch: Patch, walked: Walk, here: Tensor | None) -> Tensor:
        """The answer of a patch that is a head and nothing else."""
        assert walked.features is not None
        features = walked.features if here is None else walked.features[here]
        return patch.logits(features, self.base.anatomy.head)

    def _whole(self, patch: Patch, images: Tensor) -> Any:
        """The answer of one patch through the whole model: where there is no split."""
        with self.base.freezer.frozen(), touched(touches_of(self.base, patch), instead_of=self.base.module):
            return self.base.module(images)

    def split(self, divergence: str) -> Split | None:
        """The base cut before a module, as `split_before` gives it; found once."""
        if divergence not in self._splits:
            self._splits[divergence] = split_before(self.base, divergence)
        return self._splits[divergence]

    def _group(self, kind: _Kind, split: Split, given: list[Tensor], patches: list[Patch]) -> list[Any]:
        """Answers of a group of patches for the same images, as many at a time as there is room for."""
        images = len(given[0])
        at_once = _patches_at_once(split, images, given[0])
        found: list[Any] = []
        for first in range(0, len(patches), at_once):
            chunk = patches[first : first + at_once]
            rows = Rows((images,) * len(chunk), shared=True)
            found += self._fold_or_loop(kind, split, given, chunk, rows)
        return found

    def _fold_or_loop(
        self, kind: _Kind, split: Split, given: list[Tensor], patches: list[Patch], rows: Rows
    ) -> list[Any]:
        can_fold = len(patches) > 1 or self.compiled is not None
        fold = self._fold(kind, split, patches) if can_fold else None
        if fold is not None and self.compiled is not None:
            return self.compiled.answers((kind, fold.repeats_first), fold.answers, given, patches, rows)
        if fold is not None:
            return fold.answers(given, patches, rows)
        pieces = zip(*(rows.split(tensor) for tensor in given), strict=True)
        return [split.tail(list(piece), patch) for piece, patch in zip(pieces, patches, strict=True)]

    def _fold(self, kind: _Kind, split: Split, patches: list[Patch]) -> "_Fold | None":
        if kind not in self._folds:
            tried = (_Fold(split, repeats_first=False), _Fold(split, repeats_first=True))
            self._folds[kind] = next((fold for fold in tried if fold.holds(patches[:2])), None)
        return self._folds[kind]


class _Work:
    """Patches in groups that can run together; the keys are whatever the caller names them by."""

    def __init__(self, joint: JointAnswers, patches: Mapping[Any, Patch | None]) -> None:
        self.patches = {key: patch for key, patch in patches.items() if patch is not None}
        self.heads: set[Any] = set()
        self.alone: set[Any] = set()
        splits: dict[str, Split] = {}
        members: dict[_Kind, list[Any]] = defaultdict(list)
        for key, patch in self.patches.items():
            divergence = divergence_of(joint.base, patch)
            split = None if divergence is None else joint.split(divergence)
            if divergence is None and patch.head is not None:
                self.heads.add(key)
            elif split is None or patch.training:
                self.alone.add(key)
            else:
                splits[split.divergence] = split
                members[_kind(split, patch)].append(key)
        self.groups = [(splits[kind.divergence], kind, keys) for kind, keys in members.items()]
        self.divergences = list(splits)
        self.needs_end = bool(self.heads) or any(patch is None for patch in patches.values())


def _kind(split: Split, patch: Patch) -> _Kind:
    dtype = next((parameter.dtype for parameter in patch.parameters()), None)
    return _Kind(split.divergence, patch.method, patch.sites, patch.head is not None, dtype)


@dataclass(frozen=True)
class _Fold:
    """How patches of one kind run as one batch.

    Attributes:
        split: where they diverge.
        repeats_first: whether images are repeated before the first sub-block; otherwise it runs once for all
            patches, and they part at its join.
    """

    split: Split
    repeats_first: bool

    def answers(self, given: list[Tensor], patches: Sequence[Patch], rows: Rows) -> list[Any]:
        """Each patch's output for its rows; the caller has made sure that the fold holds."""
        base, first = self.split.base, patches[0]
        if rows.shared and self.repeats_first:
            given, rows = [rows.fold(tensor) for tensor in given], Rows(rows.counts)
        touches: dict[nn.Module, Touch] = {}
        for index, site in enumerate(first.sites):
            part = first.method.joint_part(site, [patch.parts[index] for patch in patches], rows)
            found = first.method.touches(site, part)
            touches = merged(touches, {base.submodule(path): touch for path, touch in found.items()})
        if first.head is not None:
            answered = head_touches(base, lambda features: _headed(base, patches, features, rows))
            touches = merged(answered, touches)
        output = self.split.run_tail(given, touches, rows.total)
        if first.head is not None:
            return output
        pieces = zip(*(rows.split(tensor) for tensor in tensors_in(output)), strict=True)
        return [exchange_tensors(output, piece) for piece in pieces]

    @torch.no_grad()
    def holds(self, patches: list[Patch]) -> bool:
        """Whether two patches together answer as each does alone, on an example."""
        first, second = patches[0], patches[-1]
        images = self.split.base.example()
        given = self.split.trunk(images)
        rows = Rows((len(images),) * 2, shared=True)
        joint_part = first.method.joint_part
        parts = [
            joint_part(site, [part] * 2, rows) for site, part in zip(first.sites, first.parts, strict=True)
        ]
        if any(part is None for part in parts):
            return False
        try:
            together = self.answers(given, [first, second], rows)
        except Exception:
            # Whatever a model does with a batch that grows on the way, its patches run one by one instead.
            return False
        alone = [self.split.tail(given, patch) for patch in (first, second)]
        return all(
            _is_close(found, expected)
            for found, expected in zip(tensors_in(together), tensors_in(alone), strict=True)
        )


def _headed(base: Base, patches: Sequence[Patch], features: Tensor, rows: Rows) -> list[Tensor]:
    """Each patch's logits for its rows of the features."""
    heads = [patch.head for patch in patches if patch.head is not None]
    vectors = pooled(features, base.anatomy.head.layout).to(heads[0].weight.dtype)
    if len({head.out_features for head in heads}) == 1:
        return list(rows.split(rows.each(heads, vectors)))
    return [head(piece) for head, piece in zip(heads, rows.split(vectors), strict=True)]


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, which sums of other length may do otherwise."""
    if found.shape != expected.shape:
        return False
    tolerance = min(1e4 * torch.finfo(expected.dtype).eps, 0.1)
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return bool((found - expected).abs().max() <= tolerance * scale)


def _patches_at_once(split: Split, images: int, given: Tensor) -> int:
    """How many patches' rows fit into memory together; at least one."""
    if given.device.type == "cuda":
        room = torch.cuda.mem_get_info(given.device)[0] // 2
    else:
        room = _ROOM_ON_PROCESSOR
    return max(1, room // max(images * split.widest * given.element_size() * _STATES_AT_ONCE, 1))


def _row(output: Any, position: int) -> Any:
    """One image's part of what a model returned for several."""
    return exchange_tensors(output, (tensor[position] for tensor in tensors_in(output)))
