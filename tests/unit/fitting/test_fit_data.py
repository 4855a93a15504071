"""What a fit makes of data that is not as one would wish: unreadable, unbalanced, missing."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import digits, write_bad_image, write_digits

from deltapatch.base import Base
from deltapatch.data import TaskData, open_data
from deltapatch.errors import DataError
from deltapatch.evaluation.answers import answer
from deltapatch.fitting import job as fitting


@pytest.mark.parametrize("options", [{"cache": "on"}, {"cache": "off"}], ids=["cached", "anew"])
def test_unreadable_images_are_left_out_counted_and_each_reported_once(
    task_with_bad_images: TaskData, fit: Any, caplog: pytest.LogCaptureFixture, options: dict[str, str]
) -> None:
    with caplog.at_level(logging.WARNING):
        result = fit(task_with_bad_images, **options)
    assert [Path(bad.path).name for bad in result.bad_images] == ["bad1.png", "bad0.png", "bad2.png"]
    assert all("truncated" in bad.reason for bad in result.bad_images)
    assert result.patch.info.fitted_on.bad_images == 3
    for name in ("bad0.png", "bad1.png", "bad2.png"):
        assert any(name in record.message for record in caplog.records)


def test_unreadable_images_change_nothing_of_what_is_learned_from_the_others(
    task_with_bad_images: TaskData, fit: Any
) -> None:
    task = task_with_bad_images
    assert task.train is not None
    assert task.val is not None
    readable = replace(
        task,
        train=task.train.subset([i for i in range(len(task.train)) if "bad" not in task.train.names(i)]),
        val=task.val.subset([i for i in range(len(task.val)) if "bad" not in task.val.names(i)]),
    )
    with_bad, without = fit(task).patch.state_dict(), fit(readable).patch.state_dict()
    for name, tensor in with_bad.items():
        torch.testing.assert_close(tensor, without[name], atol=1e-4, rtol=1e-4)


def test_a_fit_without_any_readable_training_image_is_an_error(tmp_path: Path, fit: Any) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        for number in range(3):
            write_bad_image(tmp_path / "broken" / name / f"{number}.png")
    with pytest.raises(DataError, match="broken: none of its training images could be read"):
        fit(open_data(tmp_path / "broken"))


def _weights_given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The class weights that head and patch of the next fits are fitted with."""
    given: list[Any] = []

    def noting(fitted_by: Any) -> Any:
        def noted(*arguments: Any, class_weights: Any, **options: Any) -> Any:
            given.append(class_weights)
            return fitted_by(*arguments, class_weights=class_weights, **options)

        return noted

    monkeypatch.setattr(fitting, "train", noting(fitting.train))
    monkeypatch.setattr(fitting, "solve_head", noting(fitting.solve_head))
    return given


def _unbalanced(path: Path) -> TaskData:
    """Six zeros, two ones and no two."""
    images, labels = digits()["train_images"], digits()["train_labels"]
    rows = np.concatenate([np.flatnonzero(labels == 0)[:6], np.flatnonzero(labels == 1)[:2]])
    chosen = {"train_images": images[rows], "train_labels": labels[rows]}
    chosen |= {"val_images": images[rows], "val_labels": labels[rows]}
    return open_data(write_digits(path, classes=np.array(["zero", "one", "two"]), **chosen, **_NO_TEST))


_NO_TEST = {"test_images": None, "test_labels": None}


def test_balance_weighs_each_class_by_the_inverse_of_its_share(
    tmp_path: Path, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _weights_given(monkeypatch)
    fit(_unbalanced(tmp_path / "three.npz"), balance=True)
    # 8 images, 3 classes: 8 / (3 * 6) and 8 / (3 * 2); a class without images counts as one image.
    expected = torch.tensor([8 / 18, 8 / 6, 8 / 3])
    assert len(given) == 2
    for weights in given:
        torch.testing.assert_close(weights, expected)


def test_without_balance_every_class_weighs_the_same(
    tmp_path: Path, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _weights_given(monkeypatch)
    fit(_unbalanced(tmp_path / "three.npz"))
    assert given == [None, None]


def test_a_class_without_images_keeps_its_place_and_is_never_answered(
    base: Base, tmp_path: Path, fit: Any
) -> None:
    task = _unbalanced(tmp_path / "three.npz")
    patch = fit(task, epochs=3).patch
    assert patch.classes == ("zero", "one", "two")
    assert task.train is not None
    assert set(answer(base, task.train, patch).probabilities.argmax(1)) <= {0, 1}


def test_training_images_of_a_single_class_can_be_fitted(base: Base, task: TaskData, fit: Any) -> None:
    assert task.train is not None
    zeros = task.train.subset(np.flatnonzero(task.train.labels == 0))
    patch = fit(replace(task, train=zeros), epochs=3).patch
    assert set(answer(base, zeros, patch).probabilities.argmax(1)) == {0}


def test_a_class_that_is_missing_from_the_validation_images_is_trained_all_the_same(
    base: Base, tmp_path: Path, fit: Any
) -> None:
    labels = digits()["val_labels"][:40]
    not_two = {"val_images": digits()["val_images"][:40][labels != 2], "val_labels": labels[labels != 2]}
    task = open_data(write_digits(tmp_path / "digits.npz", **not_two))
    assert task.train is not None
    answers = answer(base, task.train, fit(task).patch)
    twos = answers.labels == 2
    assert (answers.probabilities.argmax(1) == 2)[twos].all()


def test_without_validation_images_the_last_epoch_is_kept_and_there_are_no_figures(
    tmp_path: Path, fit: Any
) -> None:
    path = write_digits(tmp_path / "digits.npz", val_images=None, val_labels=None)
    result = fit(open_data(path, validation=0), patience=1, epochs=3)
    assert result.best_epoch == len(result.history) == 3
    assert result.history[-1].validation_loss is None
    assert result.patch.info.figures == {}


def test_a_single_training_image_is_enough_to_run(task: TaskData, fit: Any) -> None:
    assert task.train is not None
    result = fit(replace(task, train=task.train.subset([0])))
    assert len(result.history) == 2
    assert all(parameter.isfinite().all() for parameter in result.patch.parameters())
