"""Options of a fit are checked when they are given, not after an hour."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.fitting.config import FitConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("patience", 0),
        ("views", 0),
        ("views", 2),
        ("feature_noise", -0.1),
        ("validation", 0.0),
        ("validation", 1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("workers", -1),
    ],
)
def test_a_value_that_makes_no_fit_is_refused_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(DeltapatchError, match=f"{field} cannot be {value}"):
        FitConfig(**{field: value})


def test_the_limits_themselves_are_allowed() -> None:
    FitConfig(epochs=1, batch_size=1, weight_decay=0.0, label_smoothing=0.0, patience=1, seed=2**32 - 1)
    FitConfig(patience=None, views=1, workers=0, seed=0)
    FitConfig(augment="flip", views=2)
    FitConfig(augment="crop", views=8)


def test_a_configuration_cannot_be_changed_afterwards() -> None:
    with pytest.raises(FrozenInstanceError):
        FitConfig().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
