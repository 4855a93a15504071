"""What a patch may cost is measured before it is fitted."""

import pytest

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError
from deltapatch.evaluation.comparing import budget as budgets
from deltapatch.evaluation.comparing.budget import Budget, milliseconds_an_image
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head

CLASSES = ("a", "b")


def test_without_limits_nothing_is_refused_or_built(base: Base) -> None:
    assert Budget().refusal(base, Delta(), CLASSES) == ""
    assert Budget().seconds == float("inf")
    assert Budget(minutes=1.5).seconds == 90


def test_parameters_are_counted_without_the_head(base: Base) -> None:
    count = Delta(modules=1).build(base, CLASSES).num_parameters(head=False)
    assert Budget(parameters=count).refusal(base, Delta(modules=1), CLASSES) == ""
    refusal = Budget(parameters=count - 1).refusal(base, Delta(modules=1), CLASSES)
    assert refusal == f"{count:,} parameters, and {count - 1:,} are allowed"
    assert Budget(parameters=0).refusal(base, Head(), CLASSES) == ""


def test_time_of_an_image_is_the_median_over_the_batch(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [8.0, 2.0, 400.0, 4.0, 6.0]
    ticks = iter([tick for place, took in enumerate(durations) for tick in (1e4 * place, 1e4 * place + took)])
    monkeypatch.setattr(budgets.time, "perf_counter", lambda: next(ticks))
    # The median is 6 seconds for a batch of four.
    assert milliseconds_an_image(base, Head().build(base, CLASSES)) == 1500


def test_a_patch_that_is_too_slow_is_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "milliseconds_an_image", lambda base, patch: 3.25)
    assert Budget(milliseconds=4).refusal(base, Delta(), CLASSES) == ""
    assert Budget(milliseconds=3).refusal(base, Delta(), CLASSES) == "3.25 ms an image, and 3 are allowed"


@pytest.mark.parametrize("field", ["parameters", "minutes", "milliseconds"])
@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_a_limit_that_cannot_be_is_refused_by_its_name(field: str, value: float) -> None:
    with pytest.raises(DeltapatchError, match=f"a budget of {value} {field} cannot be"):
        Budget(**{field: value})  # pyright: ignore[reportArgumentType]
