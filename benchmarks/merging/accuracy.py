"""Accuracy of one network that was merged from copies fine-tuned for different tasks, on each of the tasks.

    python benchmarks/merging/accuracy.py --work /tmp/merging

Copies of a base are fine-tuned for three sets each. Bodies are merged; every task keeps the head that its
own copy was trained with. Scales, shares and weights are chosen by the mean accuracy on validation images,
and the chosen one answers the test images once: as merged, and with the statistics of its batch norms
re-estimated on the training images of all tasks without their labels. ``--work`` keeps the fine-tuned
copies.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import deltapatch as dp
from deltapatch import merging
from deltapatch.base import Base
from deltapatch.data import ImageSet, open_data
from deltapatch.fitting.fit import FitConfig, fit
from deltapatch.merging.gathering.batches import ImageBatches
from deltapatch.merging.gathering.fisher import diagonal_fisher
from deltapatch.merging.gathering.grams import layer_grams
from deltapatch.merging.gathering.norm_statistics import re_estimate_norms
from deltapatch.merging.learning import LearningConfig, learn_coefficients
from deltapatch.merging.patch_weights import PatchedWeights
from deltapatch.patch import Patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accuracy"))

from settings import BASES, arguments, capped_set, load_base, write_table

SETS = ("usps", "pacs_sketch", "bccd_cells")
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """One task and the copy that was fine-tuned for it.

    Attributes:
        name: of the set.
        splits: split -> (images as the base sees them, labels).
        head: of the copy.
        state: of the copy's body.
    """

    name: str
    splits: Mapping[str, tuple[Tensor, Tensor]]
    head: nn.Module
    state: State

    def batches(self, split: str = "train", size: int = 64) -> Iterator[Tensor]:
        """The images of a split."""
        yield from self.splits[split][0].split(size)


class Merged:
    """A body with merged weights that each task asks with its own head."""

    def __init__(self, base: Base, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.path = cast(str, base.anatomy.head.path)
        self.module = copy.deepcopy(base.module).eval()
        self.module.set_submodule(self.path, nn.Identity())
        self.start = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}

    def images(self) -> "Images":
        """The training images of all tasks, any number of times."""
        return Images(self.tasks)

    @torch.no_grad()
    def accuracies(self, state: State, split: str, re_estimated: bool = False) -> list[float]:
        """Of each task, in per cent."""
        self.module.load_state_dict({**self.start, **state})
        if re_estimated:
            re_estimate_norms(self.module, self.images())
        found: list[float] = []
        for task in self.tasks:
            images, labels = task.splits[split]
            answers = [task.head(self.module(batch)).argmax(1) for batch in images.split(64)]
            found.append(100 * float((torch.cat(answers) == labels).float().mean()))
        return found


@dataclass(frozen=True)
class Images:
    """Training images of all tasks, mixed batch by batch."""

    tasks: list[Task]

    def __iter__(self) -> Iterator[Tensor]:
        for batches in zip(*(task.batches(size=22) for task in self.tasks), strict=False):
            yield torch.cat(batches)


def main() -> None:
    parser = arguments("Accuracy of merged networks.", "merging_accuracy.md")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=["ResNet-56", "MobileNetV2"])
    parser.add_argument("--most", type=int, nargs=3, default=(400, 200, 1000), help="train, val, test images")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the fine-tuned copies")
    parser.add_argument("--only-fits", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    most = dict(zip(("train", "val", "test"), options.most, strict=True))
    rows: list[list[str]] = []
    for name in options.bases:
        base = load_base(name, options.size)
        tasks = [
            tuned(base, capped_set(one, options.work / "data", most), options.work / name, options.epochs)
            for one in options.only or SETS
        ]
        if not options.only_fits:
            rows += [[name, *row] for row in table(base, tasks)]
    if not options.only_fits:
        names = options.only or SETS
        title = (
            f"Merged from copies fine-tuned for {', '.join(names)}: test accuracy in %, as merged → with norm"
            f" statistics re-estimated; at most {most['train']} training images a set, {options.epochs}"
            " epochs, one seed"
        )
        write_table(options.out, title, ["base", "merge", "chosen", *names, "mean"], rows)


def tuned(base: Base, path: Path, folder: Path, epochs: int) -> Task:
    """The task with its fine-tuned copy, fitted if it is not there."""
    data = open_data(path)
    file = folder / f"{path.stem}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        fit(base, data, dp.methods.Full(), FitConfig(epochs=epochs, patience=None)).save(file)
        print(f"fine-tuned {base.name} for {path.stem}", flush=True)
    patch = Patch.from_pretrained(file).eval()
    patch.check_base(base)
    weights = PatchedWeights(base, patch, path.stem)
    head_path = cast(str, base.anatomy.head.path)
    state = {
        name: weights.whole(name).clone() for name in weights.specs if not name.startswith(head_path + ".")
    }
    assert patch.head is not None
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return Task(
        path.stem,
        {name: loaded(base, images) for name, images in splits.items() if images},
        patch.head,
        state,
    )


def loaded(base: Base, images: ImageSet) -> tuple[Tensor, Tensor]:
    """All images of a split in memory, with their labels."""
    return torch.cat(list(ImageBatches(images, base))), torch.from_numpy(images.labels)


# --- the table --------------------------------------------------------------------------------------------


def table(base: Base, tasks: list[Task]) -> list[list[str]]:
    """A row for each merge."""
    merged = Merged(base, tasks)
    bodies = [{**merged.start, **task.state} for task in tasks]
    rows = [
        row("the base with each head", "", merged, merged.start),
        alone(merged, tasks, bodies),
    ]
    for name, candidates in merges(base, merged, tasks, bodies).items():
        best, chosen, state = -1.0, "", merged.start
        for label, make in candidates.items():
            found = make()
            # The variant is chosen with the statistics that it is then shown with by default.
            accuracy = sum(merged.accuracies(found, "val", re_estimated=True))
            if accuracy > best:
                best, chosen, state = accuracy, label, found
        rows.append(row(name, chosen, merged, state))
        print(rows[-1], flush=True)
    return rows


def row(name: str, chosen: str, merged: Merged, state: State) -> list[str]:
    """Test accuracies as merged, and with re-estimated statistics."""
    plain, renewed = (merged.accuracies(state, "test", renew) for renew in (False, True))
    cells = [f"{a:.1f} → {b:.1f}" for a, b in zip(plain, renewed, strict=True)]
    return [name, chosen, *cells, f"{sum(plain) / len(plain):.1f} → {sum(renewed) / len(renewed):.1f}"]


def alone(merged: Merged, tasks: list[Task], bodies: list[dict[str, Tensor]]) -> list[str]:
    """Each copy on its own task: what a merge can hope for."""
    found = [merged.accuracies(body, "test")[number] for number, body in enumerate(bodies)]
    return [
        "each copy on its own task",
        "",
        *(f"{value:.1f}" for value in found),
        f"{sum(found) / len(found):.1f}",
    ]


def merges(
    base: Base, merged: Merged, tasks: list[Task], bodies: list[dict[str, Tensor]]
) -> dict[str, dict[str, Callable[[], State]]]:
    """Name -> label of a variant -> what makes it."""
    start = merged.start
    fishers, grams = gathered(merged, tasks, bodies)
    return {
        "average": {"": partial(merging.average, bodies)},
        "task_arithmetic": {
            f"scale {scale}": partial(merging.task_arithmetic, bodies, start, scale=scale) for scale in SCALES
        },
        "ties": {
            f"keep 0.2, scale {scale}": partial(merging.ties, bodies, start, keep=0.2, scale=scale)
            for scale in (*SCALES, 1.5)
        },
        "dare + task arithmetic": {
            f"drop 0.5, scale {scale}": partial(
                merging.dare, bodies, start, drop=0.5, then="task_arithmetic", scale=scale
            )
            for scale in SCALES
        },
        "fisher": {"": partial(merging.fisher, bodies, fishers=fishers)},
        "regmean": {
            f"off-diagonal {share}": partial(merging.regmean, bodies, grams=grams, off_diagonal=share)
            for share in (0.5, 0.9, 1.0)
        },
        "atlas, supervised": {"": partial(learned, merged, tasks, bodies)},
    }


def gathered(
    merged: Merged, tasks: list[Task], bodies: list[dict[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The Fisher information and the Gram matrices of each copy on its own training images."""
    fishers: list[dict[str, Tensor]] = []
    grams: list[dict[str, Tensor]] = []
    for task, body in zip(tasks, bodies, strict=True):
        merged.module.load_state_dict(body)
        whole = nn.Sequential(merged.module, task.head).eval()
        found = diagonal_fisher(whole, list(task.batches(size=32)), samples=1)
        fishers.append({name[2:]: values for name, values in found.items() if name.startswith("0.")})
        grams.append(layer_grams(merged.module, list(task.batches())))
    return fishers, grams


def learned(merged: Merged, tasks: list[Task], bodies: list[dict[str, Tensor]]) -> State:
    """aTLAS: coefficients learned on training images, the epoch chosen on validation images."""

    def loss(features: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(tasks[int(targets[0, 0])].head(features), targets[:, 1])

    def batches(split: str) -> list[tuple[Tensor, Tensor]]:
        mixed: list[tuple[Tensor, Tensor]] = []
        for number, task in enumerate(tasks):
            images, labels = task.splits[split]
            numbered = torch.stack([torch.full_like(labels, number), labels], dim=1)
            mixed += zip(images.split(64), numbered.split(64), strict=True)
        return mixed[::2] + mixed[1::2]

    merged.module.load_state_dict(merged.start)
    found = learn_coefficients(
        merged.module,
        bodies,
        merged.start,
        batches("train"),
        objective=loss,
        validation=batches("val"),
        config=LearningConfig(epochs=5, learning_rate=0.02),
    )
    return merging.atlas(bodies, merged.start, coefficients=found.coefficients)


if __name__ == "__main__":
    main()
