"""The demo: one small base, one new task, three ways to get there, and what each does to the old task."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..base import Base
from ..data import TaskData, open_data
from ..evaluation.worth import measure, with_figures, write_fit_report
from ..fitting.answering import HeadModel
from ..fitting.examples import StoredExamples
from ..fitting.fit import FitConfig, FitResult, fit_task
from ..fitting.loop import train
from ..loading import load_base
from ..method import make_method
from ..patched import PatchedModel
from .base import handwritten_digits, old_task_test, to_input, write_digits_npz

_FINE_TUNING = FitConfig(epochs=20, learning_rate=1e-3, patience=None)


@dataclass(frozen=True)
class Row:
    """One way to solve the new task.

    Attributes:
        way: its name.
        new_task: accuracy on the new task's test images, 0..1; None for the base, which has no answer.
        old_task: accuracy of the old task's answers afterwards, 0..1.
        unchanged: whether the old task's logits are bit for bit what they were.
        parameters: how many train.
        bytes: of the file that has to be kept for the task.
        seconds: wall-clock time of the fit.
    """

    way: str
    new_task: float | None
    old_task: float
    unchanged: bool
    parameters: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Tour:
    """The rows of the table and the files that were written."""

    rows: tuple[Row, ...]
    patch: Path
    report: Path
    digits: Path


@dataclass(frozen=True)
class _OldTask:
    """The old task's test images, prepared, and the base's own answers before anything happened."""

    images: Tensor
    labels: Tensor
    logits: Tensor

    def row(self, answers: Callable[[Tensor], Tensor]) -> tuple[float, bool]:
        """Accuracy on the old task, and whether the logits are those of before."""
        logits = _in_batches(answers, self.images)
        return float((logits.argmax(1) == self.labels).float().mean()), torch.equal(logits, self.logits)


def run_demo(out: Path, note: Callable[[str], None] = lambda line: None) -> Tour:
    """Fits a head, a delta patch and a fine-tuned copy on handwritten digits; writes patches and a report.

    Args:
        out: a folder; made if missing.
        note: told what happens now.
    """
    out.mkdir(parents=True, exist_ok=True)
    digits = out / "digits.npz"
    write_digits_npz(digits)
    task = open_data(digits)
    base = load_base("demo")
    images, labels = old_task_test()
    prepared = to_input(images)
    old = _OldTask(prepared, torch.from_numpy(labels), _in_batches(base.module, prepared))
    rows = [Row("the base itself", None, *old.row(base.module), 0, 0, 0.0)]
    note("fitting a head on the frozen base")
    _, row = _patch_row("head", base, task, old, out / "digits-head.safetensors")
    rows.append(row)
    note("fitting a delta patch on the frozen base")
    patch_file = out / "digits-delta.safetensors"
    delta, row = _patch_row("delta", base, task, old, patch_file)
    rows.append(row)
    note("fine-tuning a copy of the whole base, to compare")
    rows.append(_fine_tuning_row(base, old))
    worth = measure(base, task, delta)
    assert worth is not None
    report = patch_file.with_suffix(".html")
    write_fit_report(report, base, task, delta, worth, patch_file.stat().st_size)
    return Tour(tuple(rows), patch_file, report, digits)


def _patch_row(method: str, base: Base, task: TaskData, old: _OldTask, path: Path) -> tuple[FitResult, Row]:
    started = time.perf_counter()
    result = fit_task(base, task, make_method(method), FitConfig(), progress=False)
    seconds = time.perf_counter() - started
    worth = measure(base, task, result)
    assert worth is not None
    with_figures(result.patch, worth)
    result.patch.save(path)
    model = PatchedModel(base)
    model.add_patch(method, result.patch)
    accuracy = worth.patch.accuracy.value
    row = Row(
        f"{method} patch",
        accuracy,
        *old.row(model),
        result.patch.num_parameters(),
        path.stat().st_size,
        seconds,
    )
    return result, row


def _fine_tuning_row(base: Base, old: _OldTask) -> Row:
    """All weights of a copy train on the new task; the old head is kept, to ask the old task again."""
    started = time.perf_counter()
    arrays = handwritten_digits()
    copy = deepcopy(base.module).requires_grad_(True)
    old_head = copy.get_submodule("fc")
    torch.manual_seed(0)
    copy.fc = nn.Linear(base.anatomy.head.features, len(arrays["classes"]))

    def examples(split: str, seed: int | None) -> StoredExamples:
        labels = torch.from_numpy(arrays[f"{split}_labels"])
        return StoredExamples([to_input(arrays[f"{split}_images"])], labels, _FINE_TUNING.batch_size, seed)

    train(HeadModel(copy), examples("train", 0), examples("val", None), replace(_FINE_TUNING))
    seconds = time.perf_counter() - started
    test_labels = arrays["test_labels"]
    answers = _in_batches(copy, to_input(arrays["test_images"])).argmax(1).numpy()
    size = len(save(copy.state_dict()))
    parameters = sum(parameter.numel() for parameter in copy.parameters())
    copy.fc = old_head
    return Row(
        "full fine-tuning", float(np.mean(answers == test_labels)), *old.row(copy), parameters, size, seconds
    )


@torch.inference_mode()
def _in_batches(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(250)])
