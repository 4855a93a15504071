"""Head against delta on the test images of six tasks of two real bases; the base's answers before and after.

    python benchmarks/accuracy/first.py --size 96 --most-train 600

The patches are chosen on validation images (best epoch); test images are used once, for the table.
"""

import argparse
import csv
import io
import statistics
import time
import zipfile
from dataclasses import dataclass, field

import torch
from PIL import Image
from settings import SETTINGS, SHARED, Setting, arguments, load_base, load_task, write_table

import deltapatch as dp
from deltapatch.data import evaluation_transform
from deltapatch.evaluation.answers import evaluate
from deltapatch.evaluation.metrics import Evaluation, paired_difference
from deltapatch.fitting.fit import FitConfig, FitResult, fit_task


@dataclass
class Found:
    """Test accuracies in percent, one a seed, and how often each patch was better or worse than the head."""

    head: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    every: list[float] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@torch.inference_mode()
def imagenet_answers(base: dp.Base) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's logits for the 1000 sample images at 224 pixels, and the labels."""
    transform = evaluation_transform(base.preprocessing.model_copy(update={"input_size": (3, 224, 224)}))
    with zipfile.ZipFile(SHARED / "data" / "imagenet1k_sample.zip") as archive:
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("labels.csv"))))
        labels = torch.tensor([int(row["index"]) for row in rows])
        model = dp.PatchedModel(base)
        logits = []
        for start in range(0, len(rows), 50):
            files = [archive.open(_member(row["file"])) for row in rows[start : start + 50]]
            pictures = [Image.open(file).convert("RGB") for file in files]
            logits.append(model(torch.stack([transform(picture) for picture in pictures])))
    return torch.cat(logits), labels


def _member(file: str) -> str:
    return file if file.startswith("images/") else f"images/{file}"


def fit_and_test(
    base: dp.Base, setting: Setting, seed: int, options: argparse.Namespace, found: Found
) -> None:
    """Fits delta on one and on all stages, and tests both and the head that they started from."""
    task = load_task(setting.task, options.most_train, options.most_test)
    assert task.test is not None
    config = FitConfig(epochs=options.epochs, seed=seed)
    for modules, into in ((1, found.one), ("all", found.every)):
        started = time.perf_counter()
        result: FitResult = fit_task(base, task, dp.methods.Delta(modules), config, progress=False)
        found.seconds.append(time.perf_counter() - started)
        patch = evaluate(base, task.test, result.patch)
        head: Evaluation = evaluate(base, task.test, result.head_only)
        into.append(100 * patch.accuracy.value)
        found.verdicts.append(paired_difference(patch, head).verdict)
        if modules == 1:
            found.head.append(100 * head.accuracy.value)
        figures = f"head {found.head[-1]:.1f}, patch {into[-1]:.1f}, best epoch {result.best_epoch}"
        print(
            f"{setting.task} seed {seed} delta({modules}): {figures}, {found.seconds[-1]:.0f} s", flush=True
        )


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def main() -> None:
    parser = arguments(__doc__ or "", "first.md")
    parser.add_argument("--most-train", type=int, default=None)
    parser.add_argument("--most-test", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    imagenet = load_base("MobileNetV2", options.size)
    before, labels = imagenet_answers(imagenet)
    rows: list[list[str]] = []
    for setting in SETTINGS:
        if options.only is not None and setting.task not in options.only:
            continue
        base = imagenet if setting.base == "MobileNetV2" else load_base(setting.base, options.size)
        found = Found()
        for seed in range(options.seeds):
            fit_and_test(base, setting, seed, options, found)
        one, every = found.verdicts[::2], found.verdicts[1::2]
        figures = [cell(found.head), cell(found.one), tally(one), cell(found.every), tally(every)]
        rows.append([setting.base, setting.task, *figures])
        after, _ = imagenet_answers(imagenet)
        assert torch.equal(before, after), "the base has changed"
        accuracy = f"{(before.argmax(1) == labels).float().mean():.1%}"
        title = (
            f"Test accuracy in %, mean ± sd of {options.seeds} seeds ({options.epochs} epochs, MobileNetV2 at"
            f" {options.size} px, at most {options.most_train or 'all'} training images). Accuracy of"
            f" the base on 1000 ImageNet images at 224 px: {accuracy} before and after, bit-identical logits"
        )
        columns = ["base", "task", "head", "delta(1)", "against head", "delta(all)", "against head"]
        write_table(options.out, title, columns, rows)


def tally(verdicts: list[str]) -> str:
    """How many seeds are better, a tie or worse, by a paired test on the same images."""
    return ", ".join(
        f"{verdicts.count(name)} {name}" for name in ("better", "tie", "worse") if name in verdicts
    )


if __name__ == "__main__":
    main()
