"""Which images are measured, and several tasks as one."""

from dataclasses import replace

import numpy as np
import pytest

from deltapatch.data import ImageLimits
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.evaluation import protocols
from deltapatch.evaluation.protocols.splits import first_classes, images_to_measure


def same_images(first, second) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(first.image(index), second.image(index)) for index in range(len(first))
    )


# --- what is measured -------------------------------------------------------------------------------------


def test_the_test_images_are_measured_and_the_validation_images_where_wanted(make_task) -> None:
    task = make_task("pets")
    assert images_to_measure(task, "test") == (task.test, "test")
    assert images_to_measure(task, "validation") == (task.val, "validation")


def test_without_test_images_the_validation_images_are_measured_and_named(make_task) -> None:
    task = make_task("pets", test=0)
    assert images_to_measure(task, "test") == (task.val, "validation")


@pytest.mark.parametrize(("on", "missing"), [("test", "test or validation"), ("validation", "validation")])
def test_a_task_with_nothing_to_measure_is_an_error(make_task, on, missing) -> None:
    task = make_task("pets", val=0, test=0 if on == "test" else 15)
    with pytest.raises(DataError, match=f"pets has no {missing} images"):
        images_to_measure(task, on)


def test_a_test_selected_task_chooses_on_its_test_images_and_says_so(make_task) -> None:
    task = make_task("pets")
    chosen = protocols.test_selected(task)
    assert chosen.val is chosen.test is task.test
    assert chosen.provenance.validation == "test-selected"
    assert chosen.provenance.val == 15
    assert chosen.provenance.digest != task.provenance.digest
    assert images_to_measure(chosen, "test")[1] == "test-selected"
    assert images_to_measure(chosen, "validation")[1] == "test-selected"
    assert task.provenance.validation == "given"


def test_a_task_without_test_images_cannot_be_chosen_on_them(make_task) -> None:
    with pytest.raises(DataError, match="pets has no test images to choose on"):
        protocols.test_selected(make_task("pets", test=0))


# --- several tasks as one ---------------------------------------------------------------------------------


def test_the_joint_task_has_the_images_and_classes_of_all_in_order(make_task) -> None:
    pets, cars = make_task("pets", seed=1), make_task("cars", seed=2, classes=2, train=10)
    joint = protocols.joint_task([pets, cars])
    assert joint.name == "pets+cars"
    assert joint.classes == ("pets/class 0", "pets/class 1", "pets/class 2", "cars/class 0", "cars/class 1")
    assert first_classes([pets, cars]) == [0, 3]
    assert joint.train.labels.tolist() == [*pets.train.labels, *(cars.train.labels + 3)]
    assert same_images(joint.train.subset(range(24)), pets.train)
    assert same_images(joint.train.subset(range(24, 34)), cars.train)
    assert (joint.provenance.train, joint.provenance.val, joint.provenance.test) == (34, 24, 30)
    assert joint.provenance.kind == "joint"


def test_subsets_of_stores_are_joined_by_their_own_rows(make_task) -> None:
    pets, cars = make_task("pets", seed=1), make_task("cars", seed=2)
    few = protocols.few_shot(pets, 2, seed=0), protocols.few_shot(cars, 1, seed=0)
    joint = protocols.joint_task(few)
    assert same_images(joint.train.subset(range(6)), few[0].train)
    assert same_images(joint.train.subset(range(6, 9)), few[1].train)
    assert joint.train.names(6).startswith("cars[train]")


def test_a_split_holds_the_tasks_that_have_it_and_is_none_where_none_has(make_task) -> None:
    pets, cars = make_task("pets", val=0, test=0), make_task("cars", test=0)
    joint = protocols.joint_task([pets, cars])
    assert same_images(joint.val, cars.val)
    assert joint.val.labels.tolist() == (cars.val.labels + 3).tolist()
    assert joint.test is None
    assert joint.provenance.validation == "pets: none; cars: given"


def test_the_joint_task_of_test_selected_tasks_is_test_selected(make_task) -> None:
    tasks = [protocols.test_selected(make_task(name)) for name in ("pets", "cars")]
    assert protocols.joint_task(tasks).provenance.validation == "test-selected"


def test_the_order_of_the_tasks_and_their_data_make_the_digest(make_task) -> None:
    pets, cars = make_task("pets"), make_task("cars")
    digests = {
        protocols.joint_task(tasks).provenance.digest
        for tasks in ([pets, cars], [cars, pets], [make_task("pets", seed=1), cars])
    }
    assert len(digests) == 3


def test_the_joint_task_of_many_tasks_is_described_in_few_words(make_task) -> None:
    tasks = [make_task(f"a task with a rather long name {number}") for number in range(40)]
    assert len(protocols.joint_task(tasks).provenance.source) == 500


def test_tasks_that_cannot_be_joined_are_errors(make_task) -> None:
    pets = make_task("pets")
    with pytest.raises(DataError, match="two tasks are called 'pets'"):
        protocols.joint_task([pets, make_task("pets", seed=1)])
    with pytest.raises(DeltapatchError, match="there is no task"):
        protocols.joint_task([])
    cars = make_task("cars")
    cars = replace(cars, train=replace(cars.train, limits=ImageLimits(max_pixels=100)))
    with pytest.raises(DataError, match="different image limits"):
        protocols.joint_task([pets, cars])
