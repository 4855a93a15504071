"""A smaller number of samples in the proportions of their classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltapatch.selection import SelectionError
from deltapatch.selection.drawing import stratified


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(2, 60), st.integers(0, 9))
def test_every_class_gives_its_share_up_to_rounding(labels: list[int], most: int, seed: int) -> None:
    numbers = np.array(labels)
    chosen = stratified(numbers, most, seed)
    assert len(chosen) == min(most, len(numbers))
    assert (np.diff(chosen) > 0).all()
    share = len(chosen) / len(numbers)
    drawn = np.bincount(numbers[chosen], minlength=5)
    assert (np.abs(drawn - share * np.bincount(numbers, minlength=5)) < 1).all()


def test_the_seed_decides_which() -> None:
    labels = np.arange(200) % 3
    assert np.array_equal(stratified(labels, 50, 1), stratified(labels, 50, 1))
    assert not np.array_equal(stratified(labels, 50, 1), stratified(labels, 50, 2))


def test_all_samples_of_a_class_have_the_same_chance() -> None:
    drawn = sum(np.bincount(stratified(np.zeros(20, np.int64), 5, seed), minlength=20) for seed in range(400))
    # 100 expected each, with a standard deviation of 9.
    assert np.abs(drawn - 100).max() < 45


def test_fewer_than_two_are_refused() -> None:
    with pytest.raises(SelectionError, match="at most 1 samples were asked for; ask for 2 or more"):
        stratified(np.zeros(5, np.int64), 1, 0)
