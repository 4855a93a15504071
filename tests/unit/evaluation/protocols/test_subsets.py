"""Subsets hold what they say, lie inside each other, and are the same everywhere."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from deltapatch.data import TaskData
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.evaluation.protocols import few_shot, subsample


@pytest.fixture(scope="module")
def task(make_task) -> TaskData:
    """Classes of 40, 20 and 1 training images, mixed."""
    whole = make_task("pets", train=61)
    labels = np.random.default_rng(5).permutation(np.repeat([0, 1, 2], [40, 20, 1]))
    return replace(whole, train=whole.train.with_labels(labels))


def rows(task: TaskData) -> list[int]:
    assert task.train is not None
    return task.train.rows.tolist()


@pytest.mark.parametrize(
    ("share", "expected"), [(0.15, (6, 3, 1)), (0.3, (12, 6, 1)), (0.5, (20, 10, 1)), (0.001, (1, 1, 1))]
)
def test_a_share_is_taken_of_each_class_and_at_least_one_image(task, share, expected) -> None:
    part = subsample(task, share, seed=0)
    assert tuple(np.bincount(part.train.labels)) == expected
    assert part.provenance.train == sum(expected)


def test_every_image_keeps_its_label(task) -> None:
    part = subsample(task, 0.3, seed=0)
    assert part.train.labels.tolist() == [task.train.labels[row] for row in rows(part)]


def test_smaller_shares_lie_inside_larger_ones(task) -> None:
    shares = [set(rows(subsample(task, share, seed=7))) for share in (0.15, 0.3, 0.5, 1.0)]
    assert all(smaller < larger for smaller, larger in pairwise(shares))


def test_fewer_shots_lie_inside_more_and_inside_a_share_of_as_many(make_task) -> None:
    task = make_task("pets", train=60)
    one, five = (set(rows(few_shot(task, shots, seed=2))) for shots in (1, 5))
    assert one < five
    assert five == set(rows(subsample(task, 0.25, seed=2)))


def test_the_whole_share_is_the_task_itself(task) -> None:
    assert subsample(task, 1.0, seed=0) is task


def test_few_shots_are_as_many_of_each_class(make_task) -> None:
    part = few_shot(make_task("pets", train=24), 3, seed=0)
    assert np.bincount(part.train.labels).tolist() == [3, 3, 3]


def test_the_same_images_are_chosen_on_every_machine(make_task) -> None:
    """A patch file names its data by a digest: another choice would silently be other data."""
    assert rows(few_shot(make_task("pets", train=24), 2, seed=0)) == [1, 3, 11, 13, 20, 21]


def test_another_seed_chooses_other_images_and_another_digest(task) -> None:
    first, second = (subsample(task, 0.3, seed=seed) for seed in (0, 1))
    assert rows(first) != rows(second)
    digests = {first.provenance.digest, second.provenance.digest, task.provenance.digest}
    assert len(digests) == 3
    assert subsample(task, 0.3, seed=0).provenance == first.provenance


def test_all_but_the_training_images_stays_as_it_is(task) -> None:
    part = subsample(task, 0.3, seed=0)
    assert (part.name, part.classes, part.val, part.test) == (task.name, task.classes, task.val, task.test)
    kept = {"source", "kind", "val", "test", "validation"}
    assert part.provenance.model_dump(include=kept) == task.provenance.model_dump(include=kept)
    assert len(task.train) == 61


def test_a_class_without_training_images_is_left_without(make_task) -> None:
    task = make_task("pets", train=24)
    task = replace(task, classes=(*task.classes, "never seen"))
    assert np.bincount(few_shot(task, 2, seed=0).train.labels).tolist() == [2, 2, 2]
    assert len(subsample(task, 0.5, seed=0).train) == 12


def test_more_shots_than_a_class_has_images_is_an_error_that_names_the_class(task) -> None:
    with pytest.raises(DataError, match=r"pets: class 'class 2' has 1 training images, but 5"):
        few_shot(task, 5, seed=0)


@pytest.mark.parametrize("share", [0, -0.1, 15, float("nan")])
def test_a_share_that_is_no_part_is_an_error(task, share) -> None:
    with pytest.raises(DeltapatchError, match=r"0 < share <= 1 is expected, such as 0.15"):
        subsample(task, share, seed=0)


def test_no_shots_a_negative_seed_and_no_training_images_are_errors(task, make_task) -> None:
    with pytest.raises(DeltapatchError, match="at least one image of each class"):
        few_shot(task, 0, seed=0)
    with pytest.raises(DeltapatchError, match="seed is -1"):
        subsample(task, 0.5, seed=-1)
    with pytest.raises(DataError, match="pets has no training images"):
        subsample(make_task("pets", train=0), 0.5, seed=0)
