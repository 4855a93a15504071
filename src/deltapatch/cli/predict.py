"""``deltapatch predict``: a patch's answers for images, as CSV or JSON lines."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from .options import BaseClasses, Device, OptionalBaseSource, PatchFile, Weights, Workers, open_base_of

EXAMPLE = "deltapatch predict new_photos/ --patch birds.safetensors --format jsonl --top-k 3"


def command(
    images: Annotated[list[Path], typer.Argument(help="Image files and folders of them.")],
    patch: PatchFile,
    base: OptionalBaseSource = None,
    weights: Weights = None,
    classes: BaseClasses = None,
    device: Device = None,
    format: Annotated[str, typer.Option(help="csv or jsonl.")] = "csv",
    out: Annotated[
        Path | None, typer.Option(help="A file instead of standard output.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many classes for each image.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Workers = 0,
) -> None:
    """Answer images with a patch. An image that cannot be read gets a row with the reason."""
    from ..data import list_images, open_images
    from ..errors import DeltapatchError
    from ..evaluation.answers import answer
    from ..patch import Patch

    if format not in ("csv", "jsonl"):
        raise DeltapatchError(f"--format is csv or jsonl, not '{format}'")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise DeltapatchError(
            f"{out}: the answers cannot be written there; give a file in a folder that exists"
        )
    loaded = Patch.from_pretrained(patch)
    opened = open_base_of(loaded, base, weights, classes, device)
    paths = list_images(images)
    if not paths:
        raise DeltapatchError(f"there are no images in {', '.join(map(str, images))}")
    answers = answer(opened, open_images(paths), loaded, batch_size=batch_size, workers=workers)
    rows = dict(zip(answers.indices.tolist(), answers.probabilities, strict=True))
    reasons = {bad.path: bad.reason for bad in answers.bad}
    count = min(top_k, len(loaded.classes))

    def results() -> Iterator[dict[str, Any]]:
        for index, path in enumerate(paths):
            if index not in rows:
                yield {
                    "image": str(path),
                    "error": reasons.get(str(path), "could not be read"),
                    "answers": [],
                }
                continue
            order = rows[index].argsort()[::-1][:count]
            best = [(loaded.classes[int(k)], round(float(rows[index][k]), 6)) for k in order]
            yield {"image": str(path), "error": "", "answers": best}

    if out is None:
        _write(sys.stdout, results(), format, count)
    else:
        with out.open("w", newline="", encoding="utf-8") as file:
            _write(file, results(), format, count)


def _write(file: IO[str], results: Iterator[dict[str, Any]], format: str, count: int) -> None:
    if format == "jsonl":
        for result in results:
            answers = [{"class": name, "probability": probability} for name, probability in result["answers"]]
            file.write(json.dumps({**result, "answers": answers, "error": result["error"] or None}) + "\n")
        return
    columns = [f"{kind}{'' if k == 0 else k + 1}" for k in range(count) for kind in ("class", "probability")]
    writer = csv.writer(file)
    writer.writerow(["image", *columns, "error"])
    for result in results:
        cells = [cell for pair in result["answers"] for cell in pair]
        writer.writerow([result["image"], *cells, *[""] * (len(columns) - len(cells)), result["error"]])
