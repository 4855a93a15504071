"""A base with patches: each call says which one answers, and without one the base answers as it always
did.
"""

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final, cast

from torch import Tensor, nn

from .acting import touches_of
from .base import Base
from .compiling import CompiledAnswers
from .errors import DeltapatchError, DeltapatchWarning
from .file import check_patch_name
from .info import PatchInfo
from .many import JointAnswers
from .patch import Patch
from .residency import Attached, Residency, attach_file, patch_bytes
from .touching import touched


class _Selected:
    """Marks an argument that was left out: the selection of the context or of the model holds."""

    def __repr__(self) -> str:
        return "the selected patch"


SELECTED: Final = _Selected()

PatchChoice = str | _Selected | None

# Which patch the innermost `active` of each model names, in this thread or task.
_selections: ContextVar[Mapping[nn.Module, str | None]] = ContextVar(
    "deltapatch_selections", default=MappingProxyType({})
)


class PatchedModel(nn.Module):
    """One frozen base and any number of patches.

    ``model(x)`` is the base's own answer, bit for bit; ``model(x, patch="birds")`` is the task's. The
    choice is
    made per call and per thread; nothing about it is stored in the base.

    Example:
        >>> model = PatchedModel(base)
        >>> model.add_patch("birds", patch)
        >>> model(x).shape, model(x, patch="birds").shape
        (torch.Size([8, 1000]), torch.Size([8, 25]))
        >>> with model.active("birds"):
        ...     detector(images)            # anything that holds the base's modules
    """

    def __init__(self, base: Base, budget: int | None = None, compile: bool = False) -> None:
        """A base without patches.

        Args:
            base: the frozen model.
            budget: bytes that the tensors of attached files may take in memory; None for no limit. Patches
                that were not used for longest leave it. A call that names more than fit holds them all.
            compile: whether `all` and mixed batches run tails through `torch.compile`: once for all patches
                of a kind, for each number of patches and shape of batch. The base is never compiled.
        """
        super().__init__()
        self.base = base
        self.base_module = base.module
        # Never changed, only exchanged: who reads it sees the patches of one moment.
        self._patches: Mapping[str, Patch | Attached] = {}
        self._default: str | None = None
        self._compile = compile
        self._joint = self._new_joint()
        self._residency = Residency(lambda: self.base.device, budget)
        self.eval()

    # --- the set of patches
    # -----------------------------------------------------------------------------------

    @property
    def patches(self) -> Mapping[str, Patch]:
        """Name -> patch, as they are now; a patch that waits in its file is read when it is looked up."""
        return _Patches(self._patches, self._residency)

    @property
    def patch_info(self) -> dict[str, PatchInfo]:
        """Name -> what the patch says of itself; no patch is read for it."""
        return {name: patch.info for name, patch in self._patches.items()}

    @property
    def resident_bytes(self) -> int:
        """Bytes in memory for all patches: those of attached files, and those that were added."""
        added = (patch for patch in self._patches.values() if isinstance(patch, Patch))
        return self._residency.bytes + sum(map(patch_bytes, added))

    def add_patch(self, name: str, patch: Patch) -> None:
        """Makes a patch available under a name. It is added whole or not at all.

        Warns if the patch was fitted on images that were prepared in another way than this base expects.

        Raises:
            WrongBaseError: the patch belongs to another base.
            DeltapatchError: the name is taken or not allowed.
        """
        self._check_free(name)
        self._put(name, self._admitted(name, patch))

    def load_patch(self, name: str, path: str | os.PathLike[str]) -> Patch:
        """Reads a patch file (or hub repository) and adds it."""
        patch = Patch.from_pretrained(path)
        self.add_patch(name, patch)
        return patch

    def attach_patch(self, name: str, path: str | os.PathLike[str]) -> PatchInfo:
        """Makes a patch file available without reading more than its header.

        Its tensors are read at the first use and may leave memory again, see ``budget``; the file has to
        stay as it is. A patch in a file is for answering: it stays in eval mode and does not train.

        Returns:
            What the patch says of itself.

        Raises:
            WrongBaseError: the patch belongs to another base.
            PatchFileError: the file cannot be read, or is not a patch.
            DeltapatchError: the name is taken or not allowed.
        """
        self._check_free(name)
        attached = self._admitted_file(name, path)
        self._put(name, attached)
        return attached.info

    def replace_patch(self, name: str, patch: Patch | str | os.PathLike[str]) -> None:
        """Puts another patch, or patch file, in a patch's place.

        Each call is answered wholly by the old one or wholly by the new one: calls that run with the old one
        finish with it. If the new one is refused, the old one stays. A file is read before it takes the
        place.

        Raises:
            As `add_patch` and `attach_patch`; DeltapatchError if there is no patch of that name.
        """
        if name not in self._patches:
            self._patch(name)
        if isinstance(patch, Patch):
            new: Patch | Attached = self._admitted(name, patch)
        else:
            new = self._admitted_file(name, patch)
            self._residency.patch(new)
        self._release(self._put(name, new))

    def delete_patch(self, name: str) -> None:
        """Forgets a patch. Calls that run with it finish with it, and its memory is free when they have."""
        if name not in self._patches:
            self._patch(name)
        with self._residency.changing:
            kept = dict(self._patches)
            deleted = kept.pop(name)
            self._patches = kept
        if self._default == name:
            self._default = None
        self._release(deleted)

    def _check_free(self, name: str) -> None:
        check_patch_name(name)
        if name in self._patches:
            raise DeltapatchError(
                f"there is a patch named '{name}' already; delete it first or choose another name"
            )

    def _admitted(self, name: str, patch: Patch) -> Patch:
        """The patch, if it belongs to this base, on the base's device and in this model's mode."""
        self._check_patch(name, patch)
        patch.to(self.base.device)
        return patch.train(self.training)

    def _admitted_file(self, name: str, path: str | os.PathLike[str]) -> Attached:
        attached = attach_file(path)
        self._check_patch(name, Patch.outline(attached.info, attached.path))
        return attached

    def _check_patch(self, name: str, patch: Patch) -> None:
        patch.check_base(self.base)
        for path in patch.touches():
            self.base.submodule(path)
        if patch.info.preprocessing != self.base.preprocessing:
            warnings.warn(
                f"patch '{name}' was fitted on images prepared as {patch.info.preprocessing}, but the base"
                f" expects {self.base.preprocessing}; prepare its images as `patch.info.preprocessing` says",
                DeltapatchWarning,
                stacklevel=4,
            )

    def _put(self, name: str, patch: Patch | Attached) -> Patch | Attached | None:
        """Gives the name to a patch at once; returns the one that had it."""
        with self._residency.changing:
            replaced = self._patches.get(name)
            self._patches = {**self._patches, name: patch}
        return replaced

    def _release(self, patch: Patch | Attached | None) -> None:
        if isinstance(patch, Attached):
            self._residency.release(patch)

    def set_patch(self, name: str | None) -> None:
        """Which patch answers calls that name none; None is the base."""
        if name is not None and name not in self._patches:
            self._patch(name)
        self._default = name

    @property
    def active_patches(self) -> tuple[str, ...]:
        """The patch that would answer ``model(x)`` here and now, if any."""
        name = self._selected()
        return () if name is None else (name,)

    # --- running
    # ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, patch: "PatchChoice | Sequence[str | None]" = SELECTED) -> Any:
        """The answer of the named patch, or of the base; or of one patch for each image.

        Args:
            x: a batch of preprocessed images of shape (N, C, H, W).
            patch: a name; None for the base; left out, the patch selected by `active` or `set_patch`, else
            the base.
                A list names one for each image: the trunk runs once for all, and no gradient flows.

        Returns:
            With a patch, its logits of shape (N, its number of classes); without, whatever the base
            returns. For a list, a list with one image's answer in each place, of shape (number of
            classes,); where it says None, the base's, bit for bit as it answers the whole batch.

        Raises:
            DeltapatchError: there is no patch of that name, or the list has another length than the batch.
        """
        if isinstance(patch, (list, tuple)):
            return self._rows(x, patch)
        name = self._selected() if isinstance(patch, _Selected) else cast(str | None, patch)
        with self._running(name, hold_mode=False):
            return self.base_module(x)

    def all(self, x: Tensor, patches: Iterable[str | None] | None = None) -> dict[str | None, Any]:
        """The answers of many patches for the same images, for little more than one costs.

        The base runs once as far as any patch follows it; from there on, patches of one method and
        configuration run as one batch. No gradient flows.

        Args:
            x: a batch of preprocessed images of shape (N, C, H, W).
            patches: names; None among them is the base. Left out, all patches.

        Returns:
            name -> logits of shape (N, its number of classes), the same as ``model(x, patch=name)`` but for
            rounding, in the order of ``patches``.

        Example:
            >>> answers = model.all(x, ["birds", "planes"])
            >>> answers["planes"].argmax(1)
        """
        names = list(self._patches) if patches is None else list(patches)
        return self._joint.all(x, {name: None if name is None else self._patch(name) for name in names})

    def _rows(self, x: Tensor, names: Sequence[str | None]) -> list[Any]:
        if len(names) != len(x):
            raise DeltapatchError(
                f"the list names {len(names)} patches, but the batch has {len(x)} images; name one for"
                " each image"
            )
        chosen = {name: None if name is None else self._patch(name) for name in names}
        return self._joint.rows(x, [chosen[name] for name in names])

    @contextmanager
    def active(self, name: str | None) -> Generator["PatchedModel"]:
        """While it lasts, and in this thread or task only, the base's modules run with the patch, whoever
        calls them.

        The base stays in eval mode and its buffers stay as they are, even if the caller puts it into train
        mode.
        """
        token = _selections.set({**_selections.get(), self: name})
        try:
            with self._running(name, hold_mode=True):
                yield self
        finally:
            _selections.reset(token)

    def disable_patches(self) -> Any:
        """A context in which the base answers: ``active(None)``."""
        return self.active(None)

    @contextmanager
    def _running(self, name: str | None, hold_mode: bool) -> Generator[None]:
        # Held while it runs: the memory of a patch in a file is free when nobody holds it any more.
        patch = None if name is None else self._patch(name)
        touches = {} if patch is None else touches_of(self.base, patch)
        with self.base.freezer.frozen(hold_mode), touched(touches, instead_of=self.base_module):
            yield

    def _selected(self) -> str | None:
        return _selections.get().get(self, self._default)

    def _patch(self, name: str) -> Patch:
        try:
            found = self._patches[name]
        except KeyError:
            known = ", ".join(sorted(self._patches)) or "none"
            raise DeltapatchError(f"there is no patch named '{name}'; patches here: {known}") from None
        return found if isinstance(found, Patch) else self._residency.patch(found)

    # --- nn.Module
    # --------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "PatchedModel":
        """Sets the mode of the patches that were added; the base and patches in files are in eval mode."""
        self.training = mode
        for patch in self._added():
            patch.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PatchedModel":
        super()._apply(fn, recurse)
        for patch in self._added():
            patch._apply(fn, recurse)
        self._residency.convert(fn)
        # Splits and compiled graphs hold tensors of the old device and type.
        self._joint = self._new_joint()
        return self

    def _new_joint(self) -> JointAnswers:
        return JointAnswers(self.base, CompiledAnswers() if self._compile else None)

    def _added(self) -> list[Patch]:
        return [patch for patch in self._patches.values() if isinstance(patch, Patch)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchedModel":
        copied = PatchedModel(deepcopy(self.base, memo), self._residency.budget, self._compile)
        memo[id(self)] = copied
        copied._residency.conversions += self._residency.conversions
        copied._patches = {
            name: deepcopy(patch, memo) if isinstance(patch, Patch) else replace(patch, patch=None)
            for name, patch in self._patches.items()
        }
        copied._default = self._default
        return copied.train(self.training)


class _Patches(Mapping[str, Patch]):
    """The patches of one moment; those that wait in files are read when they are looked up."""

    def __init__(self, patches: Mapping[str, Patch | Attached], residency: Residency) -> None:
        self._patches = patches
        self._residency = residency

    def __getitem__(self, name: str) -> Patch:
        found = self._patches[name]
        return found if isinstance(found, Patch) else self._residency.patch(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._patches)

    def __len__(self) -> int:
        return len(self._patches)
