"""Training steps get every example once an epoch, with its own label, in an order of seed and epoch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deltapatch.base import Base
from deltapatch.data import Batches, TaskData, evaluation_transform, load_batches
from deltapatch.fitting.examples import ImageExamples, StoredExamples, Survey, survey, total_bad
from deltapatch.patch import pooled
from deltapatch.split import split_before

PLENTY = 2**30


def _rows(examples: Any, epoch: int) -> list[int]:
    return [int(row) for step in examples.epoch(epoch) for row in step.labels]


# --- stored examples --------------------------------------------------------------------------------------


def _stored(seed: int | None) -> StoredExamples:
    return StoredExamples([torch.arange(10.0).view(10, 1)], torch.arange(10), batch_size=4, seed=seed)


def test_stored_examples_come_once_each_with_their_own_label() -> None:
    for step in _stored(seed=1).epoch(3):
        assert torch.equal(step.inputs[0].flatten(), step.labels.float())
    assert sorted(_rows(_stored(seed=1), 3)) == list(range(10))
    assert [len(step.labels) for step in _stored(seed=1).epoch(0)] == [4, 4, 2]
    assert len(_stored(seed=1)) == 3


def test_the_order_of_stored_examples_depends_on_seed_and_epoch_alone() -> None:
    assert _rows(_stored(seed=1), 3) == _rows(_stored(seed=1), 3)
    assert _rows(_stored(seed=1), 3) != _rows(_stored(seed=1), 4)
    assert _rows(_stored(seed=1), 3) != _rows(_stored(seed=2), 3)
    assert _rows(_stored(seed=None), 3) == list(range(10))


def _batches(base: Base, task: TaskData, shuffle: bool = False) -> Batches:
    assert task.train is not None
    images = task.train.with_transform(evaluation_transform(base.preprocessing))
    return load_batches(images, batch_size=10, shuffle=shuffle, seed=5)


def test_stored_examples_and_images_come_in_the_same_order(base: Base, task: TaskData) -> None:
    """Otherwise how much memory there is would decide which patch a fit gives."""
    images = ImageExamples(_batches(base, task, shuffle=True))
    assert task.train is not None
    stored = StoredExamples([], torch.from_numpy(task.train.labels), batch_size=10, seed=5)
    assert _rows(images, 2) == _rows(stored, 2)


# --- images -----------------------------------------------------------------------------------------------


def test_bad_images_are_noted_once_and_passed_over(base: Base, task_with_bad_images: TaskData) -> None:
    examples = ImageExamples(_batches(base, task_with_bad_images))
    for epoch in (1, 2):
        assert len(_rows(examples, epoch)) == 24
    assert len(examples.bad) == 2


# --- the survey -------------------------------------------------------------------------------------------


def _survey(base: Base, task: TaskData, path: str | None, room: int = PLENTY) -> Survey:
    return survey(base, _batches(base, task), split_before(base, path) if path else None, room)


@torch.no_grad()
def _seen_by(base: Base, path: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = base.submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    base.module(images)
    handle.remove()
    return seen[0]


def test_a_survey_keeps_what_classifier_and_divergence_are_given(base: Base, task: TaskData) -> None:
    found = _survey(base, task, "layer4.0")
    first = next(iter(_batches(base, task)))
    assert found.activations is not None
    assert torch.equal(found.activations[0][:10], _seen_by(base, "layer4.0", first.images))
    assert torch.equal(found.features[:10], pooled(_seen_by(base, "fc", first.images), "NC"))
    assert task.train is not None
    assert found.labels.tolist() == task.train.labels.tolist()
    assert found.features.shape == (64, 128)


def test_activations_are_dropped_whole_where_they_do_not_fit_and_features_stay(
    base: Base, task: TaskData
) -> None:
    whole = _survey(base, task, "layer4.0")
    assert whole.activations is not None
    size = sum(tensor.numel() * tensor.element_size() for tensor in whole.activations)
    assert _survey(base, task, "layer4.0", room=size).activations is not None
    cramped = _survey(base, task, "layer4.0", room=size - 1)
    assert cramped.activations is None
    assert torch.equal(cramped.features, whole.features)


def test_without_a_split_only_features_are_kept(base: Base, task: TaskData) -> None:
    assert _survey(base, task, None).activations is None


def test_a_survey_counts_bad_images_and_says_how_far_it_is(
    base: Base, task_with_bad_images: TaskData
) -> None:
    done: list[int] = []
    found = survey(base, _batches(base, task_with_bad_images), None, 0, done.append)
    assert sum(done) == len(found.labels) == len(found.features) == 24
    assert len(found.bad) == 2
    assert total_bad([found, found]) == 4


def test_a_survey_of_no_images_is_empty(base: Base, task: TaskData) -> None:
    assert task.train is not None
    images = task.train.subset([]).with_transform(evaluation_transform(base.preprocessing))
    found = survey(base, load_batches(images, batch_size=4, shuffle=False), None, 0)
    assert found.features.shape == (0, 128)
    assert found.labels.shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_a_survey_runs_the_base_in_eval_mode_whatever_its_mode_is(
    base: Base, task: TaskData, training: bool
) -> None:
    expected = _survey(base, task, None).features
    base.module.train(training)
    try:
        assert torch.equal(_survey(base, task, None).features, expected)
        assert base.module.training == training
    finally:
        base.module.eval()
