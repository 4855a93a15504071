"""``deltapatch inspect``: everything that a patch file says, read from its header alone."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

EXAMPLE = "deltapatch inspect birds.safetensors"


def command(
    patch: Annotated[Path, typer.Argument(help="A patch file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = False,
) -> None:
    """Show what is in a patch file. Nothing in it is executed, and only its header is read."""
    from ..file import file_digest, read_patch_header

    header = read_patch_header(patch)
    digest = file_digest(patch)
    if as_json:
        entries = {
            name: {"dtype": _type(t.dtype), "shape": list(t.shape), "bytes": t.bytes}
            for name, t in header.tensors.items()
        }
        document = {
            "digest": digest,
            "bytes": header.file_bytes,
            **header.info.model_dump(),
            "tensors": entries,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    info = header.info
    options = ", ".join(f"{key}={value}" for key, value in info.method.config.items())
    paths = [_path(site) for site in info.method.sites]
    sites = ", ".join(paths[:10]) + (f" and {len(paths) - 10} more" if len(paths) > 10 else "")
    names = ", ".join(info.classes[:10]) + (" ..." if len(info.classes) > 10 else "")
    facts = {
        "digest": digest,
        "size": f"{header.file_bytes / 1e6:.2f} MB, {len(header.tensors)} tensors",
        "task": info.task,
        "method": f"{info.method.name} ({options})" if options else info.method.name,
        "acts on": sites or "nothing inside the base",
        "base": f"{info.base.name} (from {info.base.source or 'a module'})",
        "fingerprint": info.base.fingerprint,
        "classes": f"{len(info.classes)}: {names}",
        "preprocessing": str(info.preprocessing),
        "created": info.created,
        "licence": info.licence,
        "author": info.author,
        "note": info.note,
    }
    if info.fitted_on is not None:
        fitted = info.fitted_on
        facts["fitted on"] = (
            f"{fitted.source}: {fitted.train} training, {fitted.val} validation, {fitted.test} test images,"
            f" {fitted.bad_images} unreadable; seed {fitted.seed}, {fitted.epochs} epochs,"
            f" {fitted.seconds:.0f} s"
        )
        facts["computed"] = "; ".join(line for line in (fitted.precision, fitted.cache) if line)
    for label, value in facts.items():
        if value:
            typer.echo(f"{label:<14} {value}")
    for label, number in info.figures.items():
        typer.echo(f"  {label:<40} {number:.4f}")
    for label, value in info.versions.items():
        typer.echo(f"  {label:<40} {value}")
    if tensors:
        for label, entry in header.tensors.items():
            typer.echo(f"  {label:<60} {_type(entry.dtype):<8} {tuple(entry.shape)}")


def _path(site: dict[str, object]) -> str:
    """The module that a site is at; a composed one holds another method's."""
    inner = site.get("site", site)
    return str(inner.get("path", "?")) if isinstance(inner, dict) else "?"


def _type(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
