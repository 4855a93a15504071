"""The order of the jobs, and how long one is expected to take."""

import pytest

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.comparing.contenders import parse_contenders
from deltapatch.evaluation.comparing.job import BaseOptions, DataSource
from deltapatch.evaluation.comparing.planning import ComparisonConfig, Planned, expected_seconds, plan

from .conftest import FIT, MakeRow

TASKS = {"birds": DataSource("birds", "b", "birds"), "cars": DataSource("cars", "c", "cars")}


def _plan(base: Base, methods: str, config: ComparisonConfig) -> tuple[Planned, ...]:
    return plan(BaseOptions.of(base), TASKS, parse_contenders(methods), FIT, config)


def test_first_every_method_gets_a_seed_then_every_variant_then_the_next_seed(base: Base) -> None:
    planned = _plan(base, "head,delta:modules=1|2", ComparisonConfig(seeds=2))
    order = [(one.job.fit.seed, dict(one.job.options).get("modules"), one.tasks[0]) for one in planned]
    one_seed = [(None, "birds"), (1, "birds"), (None, "cars"), (1, "cars"), (2, "birds"), (2, "cars")]
    assert order == [(seed, *rest) for seed in (0, 1) for rest in one_seed]
    assert [one.is_first for one in planned] == [True] * 4 + [False] * 8


def test_all_jobs_are_different(base: Base) -> None:
    config = ComparisonConfig(
        seeds=2, protocols=("single", "joint", "sequential", "parallel"), shares=(30, 100), few_shot=2
    )
    planned = _plan(base, "head,delta", config)
    # Two methods, two seeds, three amounts, and two single tasks beside three protocols of both.
    assert len(planned) == len({one.job.digest for one in planned}) == 2 * 2 * 3 * (2 + 3)


@pytest.mark.parametrize(
    ("config", "amounts"),
    [
        (ComparisonConfig(), ((100, None),)),
        (ComparisonConfig(shares=(15, 100, 15)), ((15, None), (100, None))),
        (ComparisonConfig(few_shot=5), ((100, 5),)),
        (ComparisonConfig(shares=(30,), few_shot=5), ((30, None), (100, 5))),
    ],
)
def test_amounts_of_training_images(config: ComparisonConfig, amounts: object) -> None:
    assert config.amounts == amounts


def test_a_protocol_of_several_tasks_needs_several(base: Base) -> None:
    config = ComparisonConfig(protocols=("single", "joint"))
    with pytest.raises(DeltapatchError, match="'joint' needs two or more sets of images"):
        plan(BaseOptions.of(base), {"birds": TASKS["birds"]}, parse_contenders("head"), FIT, config)


@pytest.mark.parametrize("fields", [{"seeds": 0}, {"shares": (0,)}, {"few_shot": 0}, {"protocols": ()}])
def test_a_configuration_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(DeltapatchError, match="give"):
        ComparisonConfig(**fields)  # pyright: ignore[reportArgumentType]


def test_a_job_is_expected_to_take_as_long_as_those_most_like_it(base: Base, make_row: MakeRow) -> None:
    planned = _plan(base, "head,delta:modules=1|2", ComparisonConfig(seeds=2))
    assert expected_seconds(planned[0], []) == 0
    done = [(one, make_row(job_seconds=float(place))) for place, one in enumerate(planned[:6])]
    for like, ahead in zip(planned[:6], planned[6:], strict=True):
        place = planned.index(like)
        assert expected_seconds(ahead, done) == place
    # The second variant of a task before it was ever fitted: as long as the first.
    assert expected_seconds(planned[4], done[:4]) == 1
