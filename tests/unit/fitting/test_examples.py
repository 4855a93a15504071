"""Training steps get every example once an epoch, with its own label, in an order of seed and epoch."""

from typing import Any

import torch

from deltapatch.base import Base
from deltapatch.data import Batches, TaskData, evaluation_transform, load_batches
from deltapatch.fitting.examples import ImageExamples, StoredExamples


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
