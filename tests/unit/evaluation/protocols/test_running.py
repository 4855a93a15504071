"""The four protocols on a toy base: what they measure, and what a frozen base guarantees."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from toys import copied_state, disturb, same_state, toy_base

from deltapatch.base import Base, fingerprint
from deltapatch.data import TaskData
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.evaluation import protocols
from deltapatch.evaluation.answers import answer, evaluate
from deltapatch.evaluation.protocols import (
    ProtocolResult,
    Supporting,
    harmonic_mean,
    joint,
    parallel,
    sequential,
    single_task,
)
from deltapatch.fitting.fit import fit_task
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.methods.interpolate import Interpolate
from deltapatch.patch import Patch

DELTA = Delta(modules=1)
INTERPOLATE = Interpolate(steps=3)
NAN = float("nan")


class Sharing(Delta):
    """Says of itself that it shares weights; its steps come from `shared_weights`."""

    shares_weights = True


@pytest.fixture(scope="module")
def tasks(make_task) -> list[TaskData]:
    return [make_task("pets", seed=1), make_task("cars", seed=2, classes=2)]


@pytest.fixture(scope="module")
def in_sequence(base: Base, tasks, config, supporting) -> ProtocolResult:
    return sequential(base, tasks, DELTA, config, supporting)


@pytest.fixture(scope="module")
def side_by_side(base: Base, tasks, config, supporting) -> ProtocolResult:
    return parallel(base, tasks, DELTA, config, supporting)


@pytest.fixture(scope="module")
def together(base: Base, tasks, config, supporting) -> ProtocolResult:
    return joint(base, tasks, DELTA, config, supporting)


def accuracy_of_base(base: Base, supporting: Supporting) -> float:
    answers = answer(base, supporting.images)
    return float((answers.probabilities.argmax(1) == answers.labels).mean())


def same_patch(first: Patch, second: Patch) -> bool:
    return first.classes == second.classes and same_state(first, copied_state(second))


# --- what a frozen base guarantees ------------------------------------------------------------------------


def test_the_base_answers_its_own_task_as_before_after_every_step(
    base: Base, in_sequence: ProtocolResult, supporting: Supporting
) -> None:
    column = in_sequence.matrix.values[:, 0]
    assert column.tolist() == [accuracy_of_base(base, supporting)] * 3
    assert fingerprint(base.module) == base.fingerprint
    # An accuracy of 0 would be constant for any base.
    assert column[0] > 0


def test_no_task_is_forgotten(in_sequence: ProtocolResult) -> None:
    forgetting = in_sequence.matrix.forgetting()
    assert forgetting[~np.isnan(forgetting)].tolist() == [0, 0, 0]


def test_each_patch_in_sequence_and_in_parallel_is_that_of_the_task_alone(
    base: Base, tasks, config, supporting, in_sequence: ProtocolResult, side_by_side: ProtocolResult
) -> None:
    for task in tasks:
        alone = single_task(base, task, DELTA, config, supporting)
        for result in (in_sequence, side_by_side):
            assert same_patch(result.steps[-1].patches[task.name], alone.steps[-1].patches[task.name])
            assert result.matrix.final()[task.name] == alone.matrix.final()[task.name]


def test_the_order_of_the_tasks_changes_no_accuracy(
    base: Base, tasks, config, supporting, in_sequence
) -> None:
    turned = sequential(base, tasks[::-1], DELTA, config, supporting)
    assert turned.matrix.columns == ("colours", "cars", "pets")
    assert turned.matrix.final() == in_sequence.matrix.final()


# --- what is measured -------------------------------------------------------------------------------------


def test_an_accuracy_is_that_of_the_fitted_patch_on_the_test_images(
    base: Base, tasks, config, in_sequence: ProtocolResult
) -> None:
    for place, task in enumerate(tasks, start=1):
        patch = fit_task(base, task, DELTA, config, progress=False).patch
        assert in_sequence.matrix.values[-1, place] == evaluate(base, task.test, patch).accuracy.value


def test_a_task_has_no_accuracy_before_its_step(in_sequence: ProtocolResult) -> None:
    matrix = in_sequence.matrix
    assert matrix.columns == ("colours", "pets", "cars")
    assert matrix.rows == ("base", "pets", "cars")
    measured = [[True, False, False], [True, True, False], [True, True, True]]
    assert np.isfinite(matrix.values).tolist() == measured


def test_without_a_supporting_task_only_the_patching_tasks_are_measured(base: Base, tasks, config) -> None:
    matrix = single_task(base, tasks[0], Head(), config).matrix
    assert (matrix.columns, matrix.rows) == (("pets",), ("base", "pets"))
    assert not matrix.has_supporting


def test_a_result_says_how_many_images_of_which_split_it_counts(
    base: Base, make_task, config, supporting
) -> None:
    tasks = [
        make_task("pets"),
        make_task("cars", seed=1, test=0),
        protocols.test_selected(make_task("birds")),
    ]
    result = parallel(base, tasks, Head(), config, supporting)
    found = {
        name: (part.images, part.skipped, part.measured_on) for name, part in result.measurements.items()
    }
    assert found == {
        "colours": (20, 0, "given"),
        "pets": (15, 0, "test"),
        "cars": (12, 0, "validation"),
        "birds": (15, 0, "test-selected"),
    }
    assert result.steps[-1].patches["birds"].info.fitted_on.validation == "test-selected"


def test_the_validation_images_are_measured_on_request(base: Base, tasks, config) -> None:
    result = single_task(base, tasks[0], Head(), config, on="validation")
    assert result.measurements["pets"].measured_on == "validation"
    assert result.matrix.final()["pets"] == pytest.approx(
        result.steps[0].patches["pets"].info.figures["validation/accuracy"]
    )


def test_the_parameters_are_those_of_the_last_patches(base: Base, in_sequence: ProtocolResult) -> None:
    patches = in_sequence.steps[-1].patches.values()
    assert in_sequence.parameters == sum(patch.num_parameters(head=False) for patch in patches) > 0
    # Four features and a bias for each of five classes.
    assert in_sequence.head_parameters == 5 * 5
    assert in_sequence.seconds > 0
    assert (in_sequence.protocol, in_sequence.method, in_sequence.tasks) == (
        "sequential",
        "delta",
        ("pets", "cars"),
    )


def test_a_score_counts_the_supporting_task_too(in_sequence: ProtocolResult) -> None:
    final = list(in_sequence.matrix.final().values())
    assert len(final) == 3
    assert in_sequence.score("mean") == pytest.approx(sum(final) / 3)
    assert in_sequence.score("harmonic") == pytest.approx(harmonic_mean(final))


# --- joint patching ---------------------------------------------------------------------------------------


def test_joint_patching_has_one_patch_with_the_classes_of_all_tasks(together: ProtocolResult) -> None:
    (step,) = together.steps
    assert step.task == "pets+cars"
    assert step.patches["pets+cars"].classes == (
        "pets/class 0",
        "pets/class 1",
        "pets/class 2",
        "cars/class 0",
        "cars/class 1",
    )
    assert together.matrix.rows == ("base", "pets+cars")


def test_joint_accuracies_are_those_on_the_concatenated_test_set_and_on_its_parts(
    base: Base, tasks, supporting, together: ProtocolResult
) -> None:
    joined = protocols.joint_task(tasks)
    right = evaluate(base, joined.test, together.steps[0].patches["pets+cars"]).correct
    final = together.matrix.final()
    assert final["pets"] == right[:15].mean()
    assert final["cars"] == right[15:].mean()
    assert together.concatenated == right.mean()
    assert together.score("harmonic") == harmonic_mean([accuracy_of_base(base, supporting), right.mean()])


def test_the_concatenated_accuracy_weighs_each_image_and_not_each_task(base: Base, make_task, config) -> None:
    tasks = [make_task("pets", test=30), make_task("cars", seed=1, test=6)]
    result = joint(base, tasks, Head(), config)
    pets, cars = result.matrix.final().values()
    assert result.concatenated == pytest.approx((30 * pets + 6 * cars) / 36)
    assert result.score("mean") == result.concatenated


# --- methods that share weights ---------------------------------------------------------------------------


@pytest.fixture
def shared_steps(base: Base, tasks, in_sequence) -> list[tuple[str, dict[str, Patch], Patch]]:
    """Steps with other weights each time; in the second, the first task is answered by an unfitted patch."""
    of_base = [disturb(DELTA.build(base, seed=0), seed=seed, scale=0.5) for seed in (1, 2)]
    pets, cars = (deepcopy(patch) for patch in in_sequence.steps[-1].patches.values())
    worse = disturb(DELTA.build(base, tasks[0].classes, seed=0), seed=5)
    return [("pets", {"pets": pets}, of_base[0]), ("cars", {"pets": worse, "cars": cars}, of_base[1])]


@pytest.mark.parametrize("protocol", [sequential, parallel])
def test_shared_weights_are_measured_on_every_task_after_every_step(
    base: Base, tasks, config, supporting, shared_weights, shared_steps, protocol
) -> None:
    shared_weights(*shared_steps)
    result = protocol(base, tasks, Sharing(modules=1), config, supporting)
    expected = np.full((3, 3), NAN)
    expected[0, 0] = accuracy_of_base(base, supporting)
    for row, (_, patches, headless) in enumerate(shared_steps, start=1):
        expected[row, 0] = evaluate(base, supporting.images, headless).accuracy.value
        for column, task in enumerate(tasks[:row], start=1):
            expected[row, column] = evaluate(base, task.test, patches[task.name]).accuracy.value
    assert np.array_equal(result.matrix.values, expected, equal_nan=True)
    # The steps are such that something is forgotten: else the test could not see it.
    assert len(set(expected[:, 0])) > 1
    assert result.matrix.forgetting()[2, 1] > 0


@pytest.mark.parametrize("damaged", ["a patch", "base"])
def test_a_later_step_that_changes_an_earlier_patch_or_the_base_is_an_error(
    tasks, config, supporting, shared_weights, shared_steps, damaged: str
) -> None:
    base = toy_base()
    first, second = shared_steps

    def second_step() -> tuple[str, dict[str, Patch], Patch]:
        module = base.module if damaged == "base" else first[1]["pets"]
        with torch.no_grad():
            next(module.parameters()).add_(1)
        return second

    shared_weights(first, second_step)
    with pytest.raises(DeltapatchError, match=f"^{damaged} .*was changed by a later step"):
        sequential(base, tasks, Sharing(modules=1), config, supporting)


@pytest.mark.parametrize("protocol", [sequential, parallel])
def test_interpolated_weights_answer_all_tasks_and_the_base_s_own(
    base: Base, tasks, config, supporting, protocol
) -> None:
    result = protocol(base, tasks, INTERPOLATE, config, supporting)
    *_, last = result.steps
    pets, cars = (last.patches[task.name] for task in tasks)
    assert same_state(pets.parts, copied_state(cars.parts))
    assert last.supporting is not None
    assert same_state(last.supporting.parts, copied_state(cars.parts))
    final = result.matrix.final()
    assert final["colours"] == evaluate(base, supporting.images, last.supporting).accuracy.value
    for task in tasks:
        assert final[task.name] == evaluate(base, task.test, last.patches[task.name]).accuracy.value
    assert result.parameters == pets.num_parameters(head=False)
    assert result.head_parameters == 5 * 5


def test_interpolating_one_task_alone_chooses_as_its_fit_does(base: Base, tasks, config, supporting) -> None:
    (step,) = single_task(base, tasks[0], INTERPOLATE, config, supporting).steps
    fitted = fit_task(
        base, tasks[0], INTERPOLATE, config, progress=False, supporting=supporting.validation
    ).patch
    chosen, expected = (patch.info.figures for patch in (step.patches["pets"], fitted))
    assert chosen["interpolation/alpha"] == expected["interpolation/alpha"]
    assert chosen["validation/accuracy"] == expected["validation/accuracy"]


# --- errors -----------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused_before_anything_is_fitted(
    base: Base, make_task, config, supporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "deltapatch.evaluation.protocols.steps.fit_task", lambda *_, **__: pytest.fail("fitted")
    )
    pets, unmeasured = make_task("pets"), make_task("cars", val=0, test=0)
    with pytest.raises(DataError, match="cars has no test or validation images"):
        sequential(base, [pets, unmeasured], DELTA, config)
    with pytest.raises(DataError, match="two tasks are called 'pets'"):
        sequential(base, [pets, pets], DELTA, config)
    with pytest.raises(DataError, match="both called 'colours'"):
        single_task(base, make_task("colours"), DELTA, config, supporting)
    with pytest.raises(DeltapatchError, match="there is no task"):
        parallel(base, [], DELTA, config)


def test_a_label_that_the_base_has_no_output_for_is_an_error(base: Base, tasks, config, supporting) -> None:
    wrong = Supporting("colours", supporting.images.with_labels(supporting.images.labels + 1))
    with pytest.raises(DeltapatchError, match="Labels run from 1 to 5 but there are 5 classes"):
        single_task(base, tasks[0], Head(), config, wrong)
