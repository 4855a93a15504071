"""Accuracy of one network that was merged from copies fine-tuned for different tasks, on each of the tasks.

    python benchmarks/merging/accuracy.py --work /tmp/merging

Copies of a base are fine-tuned for three sets each. Bodies are merged; every task keeps the head that its
own copy was trained with. Scales and shares are chosen by the mean accuracy on validation images, and the
chosen one answers the test images once, with three kinds of statistics in its batch norms: as the merge
made them; re-estimated on the training images of all tasks together, without their labels; and re-estimated
for each task on its own images, kept beside its head. ``--work`` keeps the fine-tuned copies.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

import deltapatch as dp
from deltapatch import merging
from deltapatch.base import Base
from deltapatch.data import ImageSet, evaluation_transform, load_batches, open_data
from deltapatch.fitting.fit import FitConfig, fit
from deltapatch.merging.gathering.fisher import diagonal_fisher
from deltapatch.merging.gathering.grams import layer_grams
from deltapatch.merging.gathering.norm_statistics import re_estimate_norms
from deltapatch.merging.learning import LearningConfig, learn_coefficients
from deltapatch.merging.patch_weights import PatchedWeights
from deltapatch.patch import Patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accuracy"))

from settings import BASES, arguments, capped_set, load_base, write_table

SETS = ("usps", "pacs_sketch", "bccd_cells")
SCALES = (0.1, 0.3, 0.5, 1.0)
Statistics = Literal["merged", "all tasks", "own task"]
STATISTICS: tuple[Statistics, ...] = get_args(Statistics)
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

    def batches(self, size: int = 64) -> list[Tensor]:
        """The training images."""
        return list(self.splits["train"][0].split(size))


class Merged:
    """A body with merged weights that each task asks with its own head."""

    def __init__(self, base: Base, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.path = cast(str, base.anatomy.head.path)
        self.module = copy.deepcopy(base.module).eval()
        self.module.set_submodule(self.path, nn.Identity())
        self.start = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}

    @torch.no_grad()
    def accuracies(self, state: State, split: str, statistics: Statistics = "merged") -> list[float]:
        """Of each task, in per cent."""
        self.module.load_state_dict({**self.start, **state})
        if statistics == "all tasks":
            re_estimate_norms(self.module, Images(self.tasks))
        found: list[float] = []
        for task in self.tasks:
            if statistics == "own task":
                re_estimate_norms(self.module, Images([task]))
            images, labels = task.splits[split]
            answers = [task.head(self.module(batch)).argmax(1) for batch in images.split(64)]
            found.append(100 * float((torch.cat(answers) == labels).float().mean()))
        return found


@dataclass(frozen=True)
class Images:
    """Training images of tasks, each batch with a share of every one, any number of times."""

    tasks: list[Task]

    def __iter__(self) -> Iterator[Tensor]:
        count = -(-sum(len(task.splits["train"][0]) for task in self.tasks) // 66)
        shares = [task.splits["train"][0].tensor_split(count) for task in self.tasks]
        for together in zip(*shares, strict=True):
            yield torch.cat(together)


def main() -> None:
    parser = arguments("Accuracy of merged networks.", "merging_accuracy.md")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=["ResNet-56", "MobileNetV2"])
    parser.add_argument("--most", type=int, nargs=3, default=(400, 200, 1000), help="train, val, test images")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the fine-tuned copies")
    parser.add_argument("--only-fits", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    most = dict(zip(("train", "val", "test"), options.most, strict=True))
    names = list(options.only or SETS)
    for name in options.bases:
        base = load_base(name, options.size)
        tasks = [
            tuned(base, capped_set(one, options.work / "data", most), options.work / name, options.epochs)
            for one in names
        ]
        if options.only_fits:
            continue
        title = (
            f"{name}, merged from copies fine-tuned for {', '.join(names)}: test accuracy in %; at most"
            f" {most['train']} training images a set, {options.epochs} epochs, one seed"
        )
        out = options.out.with_name(f"merging_accuracy_{name.lower().replace('-', '')}.md")
        write_table(out, title, ["merge", "statistics", "chosen", *names, "mean"], table(base, tasks))


def tuned(base: Base, path: Path, folder: Path, epochs: int) -> Task:
    """The task with its fine-tuned copy, fitted if it is not there."""
    data = open_data(path)
    file = folder / f"{path.stem}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # From the base's own head onwards a fit keeps the start where no epoch is better; a copy that was not
        # tuned would be nothing to merge.
        config = FitConfig(epochs=epochs, patience=None, start_from_head=False)
        fit(base, data, dp.methods.Full(), config).save(file)
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
    ready = images.with_transform(evaluation_transform(base.preprocessing))
    batches = list(load_batches(ready, batch_size=64, shuffle=False))
    return torch.cat([one.images for one in batches]), torch.cat([one.labels for one in batches])


# --- the table --------------------------------------------------------------------------------------------


def table(base: Base, tasks: list[Task]) -> list[list[str]]:
    """Rows for each merge."""
    merged = Merged(base, tasks)
    bodies = [{**merged.start, **task.state} for task in tasks]
    own = [merged.accuracies(body, "test")[number] for number, body in enumerate(bodies)]
    rows = [
        cells("each copy on its own task", "", "", own),
        cells("the base with each head", "", "", merged.accuracies(merged.start, "test")),
    ]
    for name, candidates in merges(merged, tasks, bodies).items():
        made = {label: make() for label, make in candidates.items()}
        for statistics in STATISTICS:
            chosen = max(made, key=lambda label: sum(merged.accuracies(made[label], "val", statistics)))
            found = merged.accuracies(made[chosen], "test", statistics)
            rows.append(cells(name, statistics, chosen, found))
            print(rows[-1], flush=True)
    return rows


def cells(name: str, statistics: str, chosen: str, found: list[float]) -> list[str]:
    return [name, statistics, chosen, *(f"{value:.1f}" for value in found), f"{sum(found) / len(found):.1f}"]


def merges(
    merged: Merged, tasks: list[Task], bodies: list[dict[str, Tensor]]
) -> dict[str, dict[str, Callable[[], State]]]:
    """Name -> label of a variant -> what makes it."""
    start = merged.start
    fishers, grams = gathered(merged, tasks, bodies)
    return {
        "atlas, supervised": {"": partial(learned, merged, tasks, bodies)},
        "average": {"": partial(merging.average, bodies)},
        "task_arithmetic": {
            f"scale {scale}": partial(merging.task_arithmetic, bodies, start, scale=scale) for scale in SCALES
        },
        "ties": {
            f"keep 0.2, scale {scale}": partial(merging.ties, bodies, start, keep=0.2, scale=scale)
            for scale in SCALES
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
        found = diagonal_fisher(whole, task.batches(size=32), samples=1)
        fishers.append({name[2:]: values for name, values in found.items() if name.startswith("0.")})
        grams.append(layer_grams(merged.module, task.batches()))
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
    return merging.merge(found.how, bodies, merged.start)


if __name__ == "__main__":
    main()
