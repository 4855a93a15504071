"""What one task adds to a base: parameters, configuration, head and label names, in one file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from .base import Base
from .classifier import HeadSite
from .errors import DeltapatchError, PatchFileError, WrongBaseError
from .exchange import merged
from .file import read_patch_file, write_patch_file
from .info import BaseReference, HeadReference, MethodReference, PatchInfo
from .method import Method, method_of_file
from .touching import Touch

FILE_NAME = "patch.safetensors"
"""What a patch is called inside a folder or a hub repository."""


class Patch(nn.Module):
    """The parameters of one task: one part for each site that its method touches, and a head.

    Attributes:
        method: what kind of patch it is.
        sites: the places it touches, in the order of ``parts``.
        parts: the method's own parameters.
        head: features -> logits of shape (N, number of classes); None for a patch without classes.
        info: everything else that its file holds.
    """

    def __init__(self, method: Method, sites: Sequence[Any], info: PatchInfo) -> None:
        super().__init__()
        self.method = method
        self.sites = tuple(sites)
        self.info = info
        self.parts = nn.ModuleList(method.part(site) for site in self.sites)
        features = 0 if info.head is None else info.head.in_features
        self.head = nn.Linear(features, len(info.classes)) if features else None
        self.eval()

    @classmethod
    def build(
        cls, method: Method, base: Base, classes: Sequence[str] = (), seed: int | None = None
    ) -> "Patch":
        """A new, unfitted patch on the base's device; see `Method.build`."""
        if isinstance(classes, str):
            raise DeltapatchError(
                f"classes must be a sequence of names, but it is the single text '{classes}'"
            )
        sites = method.sites(base.anatomy)
        try:
            info = PatchInfo(
                task="classification",
                method=MethodReference(
                    name=method.name,
                    config=method.configuration(),
                    sites=tuple(asdict(site) for site in sites),
                ),
                base=BaseReference(name=base.name, fingerprint=base.fingerprint, source=base.source),
                classes=tuple(classes),
                preprocessing=base.preprocessing,
                head=HeadReference(in_features=base.anatomy.head.features) if classes else None,
                figures={},
                versions=library_versions(),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise DeltapatchError(f"{field}: {first['msg']}") from error
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            patch = cls(method, sites, info)
        for site, part in zip(patch.sites, patch.parts, strict=True):
            method.initialise(site, part, base)
        return patch.to(base.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Label names in the order of the head's outputs."""
        return self.info.classes

    def num_parameters(self, head: bool = True) -> int:
        """How many parameters train; with ``head=False`` without those of the head."""
        counted = self if head else self.parts
        # Parameters that trained and are kept as integers are buffers.
        kept = (buffer for buffer in counted.buffers() if buffer.dtype == torch.int8)
        return sum(tensor.numel() for tensor in (*counted.parameters(), *kept))

    def touches(self) -> dict[str, Touch]:
        """Module name -> what it computes, for one use of the patch: keep it for one thread, make it anew
        for each.
        """
        touches: dict[str, Touch] = {}
        for site, part in zip(self.sites, self.parts, strict=True):
            touches = merged(touches, self.method.touches(site, part))
        return touches

    def logits(self, features: Tensor, site: HeadSite) -> Tensor:
        """The head's answer for what the base's classifier is given, of shape (N, number of classes)."""
        assert self.head is not None
        return self.head(pooled(features, site.layout).to(self.head.weight.dtype))

    def check_base(self, base: Base) -> None:
        """Raises WrongBaseError unless ``base`` is the very one that this patch was made for."""
        expected = self.info.base
        if base.fingerprint != expected.fingerprint:
            raise WrongBaseError(
                f"this patch belongs to base {expected.name} with fingerprint"
                f" {expected.fingerprint[:19]}…, but it was"
                f" given base {base.name} with fingerprint {base.fingerprint[:19]}…; load the base it"
                f" was fitted on"
            )
        if tuple(self.method.sites(base.anatomy)) != self.sites:
            raise WrongBaseError(
                f"base {base.name} has the weights this patch belongs to, but another structure than"
                f" {expected.name} had; load it as it was loaded when the patch was fitted"
                f" ({expected.source})"
            )
        if self.head is not None and self.head.in_features != base.anatomy.head.features:
            raise WrongBaseError(
                f"this patch's head takes {self.head.in_features} features, but base {base.name} gives"
                f" {base.anatomy.head.features}"
            )

    def as_method(self, method: Method) -> "Patch":
        """A patch with the same parameters, shared and not copied, and another configuration."""
        reference = self.info.method.model_copy(update={"config": method.configuration()})
        other = Patch.outline(self.info.model_copy(update={"method": reference}), Path(self.info.base.name))
        other.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        return other.train(self.training)

    def without_head(self) -> "Patch":
        """A patch with the same parts, shared and not copied, where the base's own classifier answers."""
        changed = self.info.model_copy(update={"head": None, "classes": ()})
        other = Patch.outline(changed, Path(self.info.base.name))
        other.parts.load_state_dict(self.parts.state_dict(keep_vars=True), assign=True)
        return other.train(self.training)

    # --- files
    # ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the whole patch to one ``.safetensors`` file, at once or not at all.

        Raises:
            PatchFileError: a weight is not finite, or the file cannot be written; what was there is intact.
        """
        path = Path(path)
        write_patch_file(path, self.state_dict(), self.info)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Patch":
        """Reads a patch; nothing in the file is executed, and its tensors are checked against its
        configuration.

        Raises:
            PatchFileError: the file is damaged, hostile, of a newer version, or not a patch.
        """
        path = Path(path)
        info, tensors = read_patch_file(path)
        patch = cls.outline(info, path)
        _check_tensors(path, tensors, patch.state_dict())
        patch.load_state_dict(tensors, assign=True)
        return patch

    @classmethod
    def outline(cls, info: PatchInfo, path: Path) -> "Patch":
        """The patch that a file's header describes, on the meta device: nothing is allocated, whatever
        sizes the file claims.

        Raises:
            PatchFileError: there is no such patch; ``path`` names the file in the message.
        """
        try:
            method = method_of_file(info.method.name, info.method.config)
            sites = _sites_from(method, info)
            with torch.device("meta"):
                return cls(method, sites, info)
        except PatchFileError:
            raise
        except (DeltapatchError, RuntimeError, ValueError, OverflowError) as error:
            raise PatchFileError(f"{path}: its method cannot be built from what it says: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Writes the patch and a model card into a folder (made if missing), as Hugging Face's libraries
        do.
        """
        from .card import model_card

        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = self.save(directory / FILE_NAME)
        (directory / "README.md").write_text(model_card(self.info), encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "Patch":
        """Reads a patch from a file, a folder made by `save_pretrained`, or a Hugging Face hub repository."""
        path = Path(pretrained_model_name_or_path)
        if path.is_file():
            return cls.load(path)
        if path.is_dir():
            return cls.load(path / FILE_NAME)
        if path.suffix == ".safetensors":
            raise PatchFileError(f"{path}: there is no such patch file")
        from huggingface_hub import hf_hub_download

        try:
            downloaded = hf_hub_download(
                str(pretrained_model_name_or_path),
                FILE_NAME,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                token=token,
                local_files_only=local_files_only,
            )
        except Exception as error:
            raise PatchFileError(
                f"'{pretrained_model_name_or_path}' is no file or folder here, and {FILE_NAME} could"
                f" not be had from"
                f" a hub repository of that name: {error}"
            ) from error
        return cls.load(downloaded)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> str:
        """Uploads the patch and its model card to a hub repository (made if missing); returns the
        commit's address.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                revision=revision,
                commit_message="Upload a deltapatch patch",
            )
        return str(commit)


def pooled(features: Tensor, layout: str) -> Tensor:
    """One vector an image, of shape (N, features): the mean over positions where there are any."""
    if layout == "NCHW":
        return features.flatten(2).mean(2)
    if features.ndim > 2:
        return features.flatten(1, -2).mean(1)
    return features


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a patch's numbers depend on."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {name: installed(name) for name in ("deltapatch", "torch", "torchvision", "timm", "safetensors")}


def _sites_from(method: Method, info: PatchInfo) -> tuple[Any, ...]:
    return tuple(method.site_from(site) for site in info.method.sites)


def _check_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes must be exactly those that the configuration asks for."""
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise PatchFileError(f"{path}: the tensor '{min(missing)}' is missing; the file is not a whole patch")
    if unknown:
        raise PatchFileError(f"{path}: the tensor '{min(unknown)}' does not belong to this kind of patch")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise PatchFileError(
                f"{path}: '{name}' has shape {tuple(found[name].shape)}, but its configuration asks for"
                f" {tuple(tensor.shape)}"
            )
        if found[name].is_floating_point() != tensor.is_floating_point():
            raise PatchFileError(
                f"{path}: '{name}' has type {found[name].dtype}, but {tensor.dtype} was expected"
            )
