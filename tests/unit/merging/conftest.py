"""A base and three models that were fine-tuned from it."""

import pytest
from random_models import random_model
from torch import Tensor


@pytest.fixture
def base() -> dict[str, Tensor]:
    return random_model(0)


@pytest.fixture
def models() -> list[dict[str, Tensor]]:
    return [random_model(seed) for seed in (1, 2, 3)]
