"""A probe and its halves hold the classes in proportion, and are the same for the same seed."""

import numpy as np
import pytest

from deltapatch.selection.drawing import draw_halves, draw_probe
from deltapatch.selection.score import SelectionError

LABELS = np.repeat(np.arange(4), [400, 200, 60, 3]).astype(np.int64)


def test_a_probe_holds_each_class_in_proportion_and_two_of_a_rare_one() -> None:
    probe = draw_probe(LABELS, 66)
    assert np.bincount(LABELS[probe]).tolist() == [40, 20, 6, 2]
    assert (np.diff(probe) > 0).all()


def test_a_probe_is_the_same_for_a_seed_and_inside_a_larger_one() -> None:
    probe = draw_probe(LABELS, 66, seed=3)
    assert probe.tolist() == draw_probe(LABELS, 66, seed=3).tolist()
    assert probe.tolist() != draw_probe(LABELS, 66, seed=4).tolist()
    assert set(probe) < set(draw_probe(LABELS, 200, seed=3))


def test_a_probe_of_more_than_all_is_all() -> None:
    assert draw_probe(LABELS, 10_000).tolist() == list(range(len(LABELS)))


@pytest.mark.parametrize(
    ("labels", "size", "message"),
    [
        ([5] * 20, 10, r"the labels hold one class \(5\)"),
        (list(range(9)), 10, "0 of 9 classes have 2 samples or more"),
        ([0, 0, 1, 1], 3, "a probe of 3 images cannot hold two images of two classes"),
    ],
)
def test_images_that_cannot_be_scored_are_refused_before_any_base_is_loaded(
    labels: list[int], size: int, message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        draw_probe(np.array(labels), size)


def test_halves_hold_half_of_each_class_and_no_image_twice() -> None:
    labels = np.repeat([0, 2, 7], [10, 20, 7])
    halves = draw_halves(labels, 50)
    assert halves.shape == (50, 37)
    counts = np.array([np.bincount(labels[half], minlength=8) for half in halves])
    assert set(counts[:, 0]) == {5}
    assert set(counts[:, 2]) == {10}
    assert set(counts[:, 7]) == {3, 4}  # of an odd number, sometimes the larger half
    assert len({half.tobytes() for half in halves}) == 50


def test_a_class_of_two_or_three_is_kept_whole_or_left_out() -> None:
    labels = np.repeat(np.arange(7), [10, 2, 3, 2, 3, 2, 1])
    counts = np.array([np.bincount(labels[half], minlength=7) for half in draw_halves(labels, 40)])
    for label, size in ((1, 2), (2, 3), (3, 2), (4, 3), (5, 2)):
        assert set(counts[:, label]) == {0, size}
    assert set((counts[:, 1:6] > 0).sum(axis=1)) == {2, 3}
    assert set(counts[:, 6]) == {0}  # one image is in no half


def test_a_half_always_has_two_classes() -> None:
    for sizes in ([2, 2], [3, 2, 2], [8, 2]):
        labels = np.repeat(np.arange(len(sizes)), sizes)
        assert all(len(np.unique(labels[half])) >= 2 for half in draw_halves(labels, 20))


def test_the_spread_of_halves_is_the_spread_of_the_whole() -> None:
    """For a mean: the halves' variance around the whole is that of the whole around the population."""
    random = np.random.default_rng(0)
    values = random.normal(size=2000)
    labels = np.zeros(2000, np.int64)
    means = [values[half].mean() for half in draw_halves(labels, 400)]
    assert np.std(means) == pytest.approx(values.std() / np.sqrt(2000), rel=0.1)
