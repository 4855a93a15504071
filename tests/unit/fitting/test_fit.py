"""A fit leaves the base and its caller as they were, and gives the same patch every time."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import write_digits
from torch import Tensor, nn
from toys import copied_state, same_state

import deltapatch
from deltapatch.base import Base, fingerprint
from deltapatch.data import TaskData, open_data
from deltapatch.demo.base import PREPROCESSING, build_demo_model
from deltapatch.errors import DataError, ImageError
from deltapatch.evaluation.answers import evaluate
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.watching import FitWatch
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patch import Patch


@torch.no_grad()
def _logits(base: Base) -> Tensor:
    return base.module(base.example(4))


def _same_parameters(first: nn.Module, second: nn.Module) -> bool:
    return same_state(first, copied_state(second))


# --- the base ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cache": "off"}, {"augment": "crop"}, {"precision": "bf16"}])
def test_the_base_is_bit_identical_before_during_and_after_a_fit(
    base: Base, task: TaskData, fit: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    before, logits, seen = fingerprint(base.module), _logits(base), []

    def look(self: FitWatch, *figures: float) -> None:
        seen.append(fingerprint(base.module) == before and torch.equal(_logits(base), logits))

    monkeypatch.setattr(FitWatch, "step", look)
    fit(task, Delta(), **options)
    assert seen == [True] * 4
    assert fingerprint(base.module) == before
    assert torch.equal(_logits(base), logits)


def test_the_base_is_bit_identical_after_ctrl_c_within_an_epoch(
    base: Base, task: TaskData, fit: Any, at_step: Any
) -> None:
    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    before, logits = fingerprint(base.module), _logits(base)
    at_step(2, 1, press_ctrl_c)
    result = fit(task)
    assert result.interrupted
    assert len(result.history) == 1
    assert fingerprint(base.module) == before
    assert torch.equal(_logits(base), logits)


def test_the_base_is_bit_identical_after_a_fit_that_failed_at_a_bad_image(
    base: Base, task_with_bad_images: TaskData, fit: Any
) -> None:
    before, logits = fingerprint(base.module), _logits(base)
    with pytest.raises(ImageError, match=r"two/bad1\.png: cannot be decoded"):
        fit(task_with_bad_images, on_bad="fail")
    assert fingerprint(base.module) == before
    assert torch.equal(_logits(base), logits)


def _own_module() -> nn.Module:
    module = build_demo_model().train()
    module.get_submodule("layer1").eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    return module


@pytest.mark.parametrize("end", ["finished", "interrupted", "failed"])
@pytest.mark.parametrize("cache", ["off", "on"])
def test_the_callers_module_keeps_its_modes_gradient_flags_and_values(
    task: TaskData, fit: Any, at_step: Any, end: str, cache: str
) -> None:
    module = _own_module()
    values, modes = copied_state(module), [part.training for part in module.modules()]
    flags = [parameter.requires_grad for parameter in module.parameters()]

    def act() -> None:
        if end != "finished":
            raise KeyboardInterrupt if end == "interrupted" else ZeroDivisionError

    at_step(2, 1, act)
    on = load_base(module, size=32, mean=PREPROCESSING.mean, std=PREPROCESSING.std)
    if end == "failed":
        with pytest.raises(ZeroDivisionError):
            fit(task, on=on, cache=cache)
    else:
        assert fit(task, on=on, cache=cache).interrupted == (end == "interrupted")
    assert same_state(module, values)
    assert [part.training for part in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert all(parameter.grad is None for parameter in module.parameters())


# --- the caller -------------------------------------------------------------------------------------------


def test_the_callers_random_numbers_go_on_as_if_there_had_been_no_fit(task: TaskData, fit: Any) -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    expected = draw()
    seed()
    fit(task, augment="standard")
    assert draw() == expected


def test_ctrl_c_before_the_patch_itself_has_begun_ends_the_fit(
    task: TaskData, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is solved first; were its interruption only noted, the longer part would just go on."""

    def press_ctrl_c(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deltapatch.fitting.solver.cross_entropy", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        fit(task)


# --- one fit, one patch -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_patch_and_another_seed_another(task: TaskData, fit: Any) -> None:
    first = fit(task, seed=3).patch
    torch.manual_seed(99)
    assert _same_parameters(first, fit(task, seed=3).patch)
    assert not _same_parameters(first, fit(task, seed=4).patch)


@pytest.mark.parametrize("options", [{"augment": "crop"}, {"precision": "bf16"}, {"label_smoothing": 0.2}])
def test_an_option_changes_the_patch_and_it_stays_finite_in_full_precision(
    task: TaskData, fit: Any, options: dict[str, Any]
) -> None:
    plain, changed = fit(task, cache="off"), fit(task, cache="off", **options)
    assert not _same_parameters(plain.patch, changed.patch)
    for parameter in changed.patch.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()


def test_augmented_images_run_through_the_trunk_in_every_epoch(task: TaskData, fit: Any) -> None:
    assert not fit(task, augment="crop").trunk_kept


def test_validation_labels_have_no_part_in_training(tmp_path: Path, task: TaskData, fit: Any) -> None:
    assert task.val is not None
    other = open_data(write_digits(tmp_path / "other.npz", val_labels=(task.val.labels + 1) % 10))
    # Which head the patch starts from is chosen on validation images, so it starts from none.
    here, there = (fit(data, start_from_head=False, epochs=3).history for data in (task, other))
    assert [epoch.training_loss for epoch in here] == [epoch.training_loss for epoch in there]
    assert [epoch.validation_loss for epoch in here] != [epoch.validation_loss for epoch in there]


# --- what is learned --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger_task(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    path = tmp_path_factory.mktemp("larger") / "digits.npz"
    return open_data(write_digits(path, train=200, val=80, test=200))


def test_delta_reads_nine_of_ten_new_digits_after_five_epochs_and_no_fewer_than_a_head(
    base: Base, larger_task: TaskData, fit: Any
) -> None:
    assert larger_task.test is not None
    result = fit(larger_task, Delta(), epochs=5)
    patch, head_only = (
        evaluate(base, larger_task.test, fitted).accuracy.value for fitted in (result.patch, result.head_only)
    )
    assert patch >= 0.9
    assert patch >= head_only - 0.01


@pytest.mark.parametrize("start", ["plain", "identity"])
def test_the_published_starts_learn_too(larger_task: TaskData, fit: Any, start: Any) -> None:
    result = fit(larger_task, Delta(start=start), epochs=5)
    assert result.patch.info.figures["validation/accuracy"] >= 0.9


@pytest.mark.parametrize("learning_rate", [1e-3, 0.3])
def test_a_fit_never_ends_worse_on_validation_images_than_the_head_it_starts_from(
    task: TaskData, fit: Any, learning_rate: float
) -> None:
    result = fit(task, epochs=3, learning_rate=learning_rate)
    key = "validation/accuracy"
    assert result.patch.info.figures[key] >= result.head_only.info.figures[key]
    assert (
        result.best_epoch == 0
        or result.history[result.best_epoch - 1].validation_accuracy == (result.patch.info.figures[key])
    )


def test_the_figures_are_those_that_an_evaluation_of_the_patch_gives(
    base: Base, task: TaskData, fit: Any
) -> None:
    assert task.val is not None
    result = fit(task, epochs=4)
    for fitted in (result.patch, result.head_only):
        evaluation = evaluate(base, task.val, fitted)
        assert fitted.info.figures["validation/accuracy"] == pytest.approx(evaluation.accuracy.value)
        assert fitted.info.figures["validation/loss"] == pytest.approx(evaluation.log_loss, rel=1e-4)


def test_the_head_method_gives_the_head_that_every_fit_starts_from(task: TaskData, fit: Any) -> None:
    result = fit(task, Head())
    assert _same_parameters(result.patch, result.head_only)
    assert _same_parameters(result.patch, fit(task, Delta(modules=1)).head_only)


# --- what the patch says ----------------------------------------------------------------------------------


def test_the_patch_says_what_it_was_fitted_on(task: TaskData, fit: Any) -> None:
    info = fit(task, seed=7).patch.info
    fitted = info.fitted_on
    assert fitted is not None
    assert (fitted.source, fitted.digest) == ("digits.npz", task.provenance.digest)
    assert (fitted.train, fitted.val, fitted.test, fitted.bad_images) == (64, 40, 40, 0)
    assert (fitted.seed, fitted.epochs, fitted.validation) == (7, 2, "given")
    assert fitted.seconds > 0
    assert info.classes == task.classes
    assert set(info.figures) == {"validation/accuracy", "validation/loss"}


def test_fit_opens_data_by_its_path_and_returns_a_patch_that_survives_its_file(
    base: Base, tmp_path: Path
) -> None:
    path = write_digits(tmp_path / "digits.npz")
    patch = deltapatch.fit(base, path, Delta(modules=1), FitConfig(epochs=1), progress=False)
    assert not any(part.training for part in patch.modules())
    assert _same_parameters(patch, Patch.load(patch.save(tmp_path / "digits.safetensors")))


def test_data_without_training_images_is_an_error_with_its_name(tmp_path: Path, fit: Any) -> None:
    path = write_digits(tmp_path / "rest.npz", train_images=None, train_labels=None)
    with pytest.raises(DataError, match="rest"):
        fit(open_data(path))
