"""What is measured of the base's own task and what is chosen by, with the numbers of the base's outputs."""

from dataclasses import replace

import numpy as np
import pytest

from deltapatch.base import Base
from deltapatch.data import ImageSet, TaskData
from deltapatch.errors import DataError
from deltapatch.evaluation.protocols import Supporting

NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def named(base: Base) -> Base:
    """The toy base with names for its five outputs."""
    return replace(base, classes=NAMES)


@pytest.fixture
def own(make_task) -> TaskData:
    """Three of them, in another order."""
    return replace(make_task("own"), classes=("dog", "ant", "cat"))


def _same(first: ImageSet, second: ImageSet) -> bool:
    return first.store is second.store and np.array_equal(first.rows, second.rows)


def test_the_test_images_are_measured_and_the_validation_images_are_chosen_by(
    named: Base, own: TaskData
) -> None:
    found = Supporting.of(named, own)
    assert own.test is not None
    assert own.val is not None
    assert found.validation is not None
    assert _same(found.images, own.test)
    assert _same(found.validation, own.val)


def test_classes_are_matched_by_name(named: Base, own: TaskData) -> None:
    found = Supporting.of(named, own)
    assert own.test is not None
    assert [NAMES[label] for label in found.images.labels] == [own.classes[k] for k in own.test.labels]


@pytest.mark.parametrize(
    ("counts", "halved"),
    [
        ({"val": 0}, "test"),
        ({"test": 0}, "val"),
        ({"val": 0, "test": 0}, "train"),
    ],
)
def test_without_both_each_class_is_halved_and_no_image_is_measured_and_chosen_by(
    named: Base, make_task, counts: dict[str, int], halved: str
) -> None:
    task = replace(make_task("own", **counts), classes=NAMES[:3])
    found = Supporting.of(named, task)
    images: ImageSet = getattr(task, halved)
    assert found.validation is not None
    assert sorted([*found.images.rows, *found.validation.rows]) == images.rows.tolist()
    one, other = (np.bincount(part.labels, minlength=3) for part in (found.images, found.validation))
    assert np.abs(one - other).max() <= 1


def test_a_single_image_is_too_few(named: Base, make_task) -> None:
    with pytest.raises(DataError, match="own has fewer than two images of the base's own task"):
        Supporting.of(named, make_task("own", train=1, val=0, test=0))


def test_classes_that_are_partly_the_base_s_are_refused(named: Base, own: TaskData) -> None:
    with pytest.raises(DataError, match=r"has the class '\?', which is not one of the 5 classes of Net"):
        Supporting.of(named, replace(own, classes=("dog", "?", "cat")))


@pytest.mark.parametrize("has_names", [True, False])
def test_as_many_classes_with_other_names_are_taken_in_order(
    base: Base, named: Base, make_task, has_names: bool
) -> None:
    task = make_task("own", classes=5)
    found = Supporting.of(named if has_names else base, task)
    assert found.images.labels.tolist() == task.test.labels.tolist()
