"""``deltapatch verify``: the invariants, checked on this machine, now."""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import BaseClasses, Device, OptionalBaseSource, Weights, open_base_of

if TYPE_CHECKING:
    from ..base import Base
    from ..patch import Patch

EXAMPLE = "deltapatch verify birds.safetensors --base timm/resnet50.a1_in1k"


def command(
    patch: Annotated[Path, typer.Argument(help="A patch file.")],
    base: OptionalBaseSource = None,
    weights: Weights = None,
    classes: BaseClasses = None,
    device: Device = None,
    digest: Annotated[bool, typer.Option("--digest", hidden=True)] = False,
) -> None:
    """Check that the patch belongs to the base, that the base is untouched by it, and that the file is
    the patch.
    """
    from ..errors import DeltapatchError
    from ..patch import Patch

    loaded = Patch.from_pretrained(patch)
    opened = open_base_of(loaded, base, weights, classes, device)
    if digest:
        typer.echo(_answers_digest(opened, loaded))
        return
    typer.echo(f"ok  the file is whole and valid, and belongs to this base ({opened.fingerprint})")
    before, during, after = _base_digests(opened, loaded)
    if not before == during == after:
        raise DeltapatchError(
            f"base {opened.name} changed its weights, buffers or answers while {patch} was active"
        )
    typer.echo(
        "ok  the base's weights, buffers and answers are bit-identical before, with and after the patch"
    )
    here = _answers_digest(opened, loaded)
    with tempfile.TemporaryDirectory() as directory:
        again = loaded.save(Path(directory) / "again.safetensors")
        there = _digest_in_new_process(again, base, weights, classes, device)
    if here != there:
        raise DeltapatchError(f"{patch} saved and loaded in a new process gives other answers than here")
    typer.echo("ok  saved and loaded in a new process, it gives bit-identical answers")


def _base_digests(base: "Base", patch: "Patch") -> tuple[str, str, str]:
    """Digest of the base's weights and answers: untouched, while a patch is at work, and once it is gone."""
    import torch

    from ..base import fingerprint
    from ..patched import PatchedModel

    images = base.example(4)

    def state(model: PatchedModel) -> str:
        with torch.inference_mode():
            return fingerprint(base.module) + _digest(model(images))

    model = PatchedModel(base)
    before = state(model)
    model.add_patch("verified", patch)
    model(images, patch="verified").sum().backward()
    during = state(model)
    model.delete_patch("verified")
    return before, during, state(model)


def _answers_digest(base: "Base", patch: "Patch") -> str:
    import torch

    from ..patched import PatchedModel

    model = PatchedModel(base)
    model.add_patch("verified", patch)
    with torch.inference_mode():
        if patch.head is not None:
            return _digest(model(base.example(4), patch="verified"))
        with model.active("verified"):
            return _digest(base.module(base.example(4)))


def _digest(output: object) -> str:
    from ..trees import tensors_in

    digest = hashlib.sha256()
    for tensor in tensors_in(output):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest_in_new_process(
    patch: Path, base: str | None, weights: str | None, classes: str | None, device: str | None
) -> str:
    from ..errors import DeltapatchError

    arguments = [sys.executable, "-m", "deltapatch", "verify", str(patch), "--digest"]
    given = {"--base": base, "--weights": weights, "--classes": classes, "--device": device}
    for name, value in given.items():
        arguments += [] if value is None else [name, value]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DeltapatchError(f"{patch} could not be loaded in a new process: {done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1]
