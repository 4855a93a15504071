"""From results to lines: what is chosen, what is compared, and what is called a tie."""

from collections.abc import Callable

import numpy as np
import pytest

from deltapatch.evaluation.comparing.job import Job
from deltapatch.evaluation.comparing.ledger import Row, packed
from deltapatch.evaluation.comparing.planning import Planned
from deltapatch.evaluation.comparing.table import Section, make_sections
from deltapatch.evaluation.protocols import harmonic_mean
from deltapatch.method import Method
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head

from .conftest import MakeJob, MakeRow

Done = tuple[Planned, Row]
MakeDone = Callable[..., list[Done]]


@pytest.fixture
def results(make_job: MakeJob, make_row: MakeRow) -> MakeDone:
    """The results of one contender on one task: its test accuracies, seed by seed."""

    def make(
        contender: str,
        accuracies: list[float],
        variant: Method | None = None,
        task: str = "digits",
        validation: float = 0.5,
        **fields: object,
    ) -> list[Done]:
        job: Job = make_job()
        planned = Planned(job, contender, variant or Head(), (task,), False)
        return [
            (planned, make_row(accuracy, validation, seed, task=task, **fields))
            for seed, accuracy in enumerate(accuracies)
        ]

    return make


def _section(done: list[Done]) -> Section:
    (section,) = make_sections(done)
    return section


def test_a_difference_inside_the_noise_is_printed_as_a_tie(results: MakeDone) -> None:
    done = results("delta", [0.80, 0.84, 0.82]) + results("head", [0.81, 0.80, 0.83])
    best, other = _section(done).standings
    assert (best.contender, best.verdict) == ("delta", "best")
    assert other.verdict.startswith("tie (−0.7 points, ")
    assert other.compared_by == "3 seeds"


def test_a_difference_beyond_the_noise_is_printed_as_worse(results: MakeDone) -> None:
    done = results("head", [0.70, 0.71, 0.72]) + results("delta", [0.80, 0.815, 0.82])
    best, other = _section(done).standings
    assert best.contender == "delta"
    assert other.verdict.startswith("worse by 10.2 points (−")


def test_over_several_tasks_a_task_is_one_pair(results: MakeDone) -> None:
    done = [
        pair
        for task, shift in (("a", 0.0), ("b", 0.1))
        for name, accuracy in (("delta", 0.8), ("head", 0.7))
        for pair in results(name, [accuracy + shift] * 4, task=task)
    ]
    best, other = _section(done).standings
    assert best.accuracy == pytest.approx(0.85)
    assert other.compared_by == "2 tasks"


@pytest.mark.parametrize(("both_right", "verdict"), [(50, "worse by 20.0 points"), (68, "tie (−2.0 points")])
def test_with_one_seed_the_images_decide(results: MakeDone, both_right: int, verdict: str) -> None:
    first, second = np.arange(100) < 70, np.arange(100) < both_right
    done = results("delta", [0.7], correct=packed(first))
    done += results("head", [both_right / 100], correct=packed(second))
    other = _section(done).standings[1]
    assert other.verdict.startswith(verdict)
    assert other.compared_by == "100 images, exact McNemar test"


def test_a_lead_that_every_seed_repeats_on_one_image_is_a_tie(results: MakeDone) -> None:
    """Two methods without chance in their fits: five seeds say no more than one."""
    first, second = np.arange(30) < 28, np.arange(30) < 27
    done = results("dua", [28 / 30] * 5, correct=packed(first), images=30)
    done += results("head", [27 / 30] * 5, correct=packed(second), images=30)
    other = _section(done).standings[1]
    assert other.verdict.startswith("tie (−3.3 points")
    assert other.compared_by == "30 images, each with the mean of 5 seeds"


def test_a_lead_on_many_images_with_every_seed_is_no_tie(results: MakeDone) -> None:
    first, second = np.arange(100) < 70, np.arange(100) < 50
    done = results("delta", [0.7] * 3, correct=packed(first))
    done += results("head", [0.5] * 3, correct=packed(second))
    other = _section(done).standings[1]
    assert other.verdict.startswith("worse by 20.0 points")
    assert other.compared_by == "3 seeds"


def test_one_pair_without_its_images_is_a_tie_that_says_why(results: MakeDone) -> None:
    other = _section(results("delta", [0.9]) + results("head", [0.1])).standings[1]
    assert other.verdict == "tie (−80.0 points; one pair says nothing about chance)"


def test_the_variant_that_validation_likes_is_chosen_whatever_the_test_images_say(results: MakeDone) -> None:
    done = results("delta", [0.9, 0.9], Delta(modules=1), validation=0.6)
    done += results("delta", [0.8, 0.8], Delta(modules=2), validation=0.7)
    (line,) = _section(done).lines
    assert line.variant == "delta (modules=2)"
    assert line.accuracy.mean == pytest.approx(0.8)
    assert line.validation == {"delta (modules=1)": 0.6, "delta (modules=2)": 0.7}


def test_of_variants_with_the_same_validation_accuracy_the_first_is_chosen(results: MakeDone) -> None:
    done = results("delta", [0.8], Delta(modules=2)) + results("delta", [0.9], Delta(modules=1))
    assert _section(done).lines[0].variant == "delta (modules=2)"


def test_variants_are_compared_on_the_seeds_that_all_of_them_have(
    results: MakeDone, make_row: MakeRow
) -> None:
    done = results("delta", [0.8], Delta(modules=1), validation=0.6)
    # Better than that with seed 1, which the other has not, and worse with seed 0.
    (planned, _), *_ = results("delta", [0.8], Delta(modules=2))
    done += [(planned, make_row(0.8, validation, seed)) for seed, validation in ((0, 0.5), (1, 0.9))]
    assert _section(done).lines[0].variant == "delta (modules=1)"


def test_a_refused_method_is_in_no_table(results: MakeDone) -> None:
    done = results("head", [0.8]) + results("delta", [0.0], refused="no stage", scores=())
    assert [line.contender for line in _section(done).lines] == ["head"]


def test_a_method_refused_on_one_task_is_not_ranked_by_the_other(results: MakeDone) -> None:
    done = (
        results("head", [0.7], task="a")
        + results("head", [0.7], task="b")
        + results("delta", [0.9], task="a")
    )
    section = _section(done)
    assert [one.contender for one in section.standings] == ["head"]
    assert [(line.task, line.contender) for line in section.lines] == [
        *(("a", "head"), ("a", "delta")),
        ("b", "head"),
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_with_one_seed_or_where_all_agree_the_interval_is_that_of_the_images(
    results: MakeDone, seeds: int
) -> None:
    (line,) = _section(results("head", [0.9] * seeds)).lines
    assert (line.interval.low, line.interval.high) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_the_interval_of_a_mean_stays_between_none_and_all(results: MakeDone) -> None:
    (line,) = _section(results("head", [0.9, 1.0])).lines
    assert line.interval.high == 1.0
    assert 0 < line.interval.low < 0.9


def test_the_base_s_own_task_enters_the_harmonic_mean(results: MakeDone) -> None:
    (line,) = _section(results("head", [0.9414], base_accuracy=0.7, supporting_accuracy=0.6887)).lines
    assert (line.base_accuracy, line.supporting_accuracy) == (0.7, 0.6887)
    assert line.harmonic == pytest.approx(harmonic_mean((0.6887, 0.9414))) == pytest.approx(0.7955, abs=1e-4)
    (without,) = _section(results("head", [0.9414])).lines
    assert (without.supporting_accuracy, without.harmonic) == (None, None)
