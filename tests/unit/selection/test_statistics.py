"""Statistics of parts add up to those of the whole, and scores from them are those of the features."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltapatch import selection
from deltapatch.selection import SelectionError, Statistics, sum_of

FIELDS = ("counts", "class_sums", "mean", "scatter", "cubic", "quartic", "gram", "within", "class_means")


def draw(samples: int, width: int, classes: int, seed: int = 0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, samples - classes)])
    return rng.standard_normal((samples, width)) + 3 * rng.standard_normal((classes, width))[labels], labels


def assert_equal(one: Statistics, other: Statistics, tolerance: float) -> None:
    for name in FIELDS:
        a, b = np.asarray(getattr(one, name), float), np.asarray(getattr(other, name), float)
        scale = one.quartic**0.75 if name == "cubic" else np.abs(a).max()  # cubes of two samples cancel
        assert np.abs(a - b).max() <= tolerance * max(scale, 1.0), name


def test_seven_uneven_shards_equal_one_pass() -> None:
    features, labels = draw(3000, 17, 6)
    features = features.astype(np.float32) + 40
    cuts = [10, 11, 400, 1200, 1203, 2999]
    shards = zip(np.split(features, cuts), np.split(labels, cuts), strict=True)
    whole = Statistics.of(features, labels)
    assert_equal(whole, sum_of(Statistics.of(*shard) for shard in shards), 1e-10)
    assert whole.samples == 3000


@given(st.integers(0, 10_000), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_any_shards_in_any_order_equal_one_pass(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((sum(sizes), 5)) * rng.uniform(0.1, 10, 5) + 7
    labels = rng.integers(0, 4, sum(sizes))
    ends = np.cumsum(sizes)[:-1]
    parts = [
        Statistics.of(f, y) for f, y in zip(np.split(features, ends), np.split(labels, ends), strict=True)
    ]
    rng.shuffle(parts)
    assert_equal(Statistics.of(features, labels), sum_of(parts), 1e-9)


def test_sums_are_what_they_are_called() -> None:
    features, labels = draw(50, 4, 3)
    found = Statistics.of(features, labels)
    centred = features - features.mean(0)
    lengths = (centred**2).sum(1)
    np.testing.assert_allclose(found.scatter, centred.T @ centred)
    np.testing.assert_allclose(found.gram, features.T @ features)
    np.testing.assert_allclose(found.cubic, lengths @ centred)
    assert found.quartic == pytest.approx(float((lengths**2).sum()))
    within = sum(
        (features[labels == k] - features[labels == k].mean(0)).T
        @ (features[labels == k] - features[labels == k].mean(0))
        for k in range(3)
    )
    np.testing.assert_allclose(found.within, within)


def test_taking_a_part_away_leaves_the_rest() -> None:
    features, labels = draw(200, 6, 4)
    rest = Statistics.of(features, labels) - Statistics.of(features[150:], labels[150:])
    assert_equal(rest, Statistics.of(features[:150], labels[:150], 4), 1e-10)


def test_streamed_batches_equal_one_pass() -> None:
    features, labels = draw(5000, 9, 5)
    batches = [
        (torch.from_numpy(features[i : i + 64]).float(), torch.from_numpy(labels[i : i + 64]))
        for i in range(0, 5000, 64)
    ]
    assert_equal(Statistics.of(features.astype(np.float32), labels), Statistics.streamed(batches), 1e-10)


def test_half_precision_is_raised_before_it_is_summed() -> None:
    features = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    features[::2] = 1.0078125
    labels = torch.arange(4096) % 2
    found = Statistics.of(features, labels)
    np.testing.assert_allclose(found.class_means, [[1.0078125] * 2, [1.0] * 2], rtol=1e-15)


@pytest.mark.parametrize("name", ["h_score", "shrinkage_h_score", "logme"])
@pytest.mark.parametrize(("samples", "width"), [(400, 12), (60, 30), (30, 60)])
def test_scores_from_statistics_are_those_from_features(name: str, samples: int, width: int) -> None:
    features, labels = draw(samples, width, 5)
    score = getattr(selection, name)
    statistics = sum_of(
        Statistics.of(f, y, 5)
        for f, y in zip(np.array_split(features, 7), np.array_split(labels, 7), strict=True)
    )
    assert score(statistics).value == pytest.approx(score(features, labels).value, rel=1e-8)
    compact = Statistics.of(features, labels, compact=True)
    assert score(compact).value == pytest.approx(score(features, labels).value, rel=1e-8)


def test_memory_does_not_grow_with_the_samples() -> None:
    few, many = (Statistics.of(*draw(samples, 8, 3)) for samples in (100, 10_000))
    assert [np.asarray(getattr(few, f)).nbytes for f in FIELDS] == [
        np.asarray(getattr(many, f)).nbytes for f in FIELDS
    ]


def test_classes_of_one_sample_leave_without_a_trace() -> None:
    features, labels = draw(100, 5, 4)
    labels[labels == 2] = 1
    labels[7] = 2
    kept = labels != 2
    without = Statistics.of(features, labels).without_small_classes(2)
    renumbered = np.searchsorted([0, 1, 3], labels[kept])
    assert_equal(without, Statistics.of(features[kept], renumbered), 1e-10)
    assert selection.logme(Statistics.of(features, labels)).value == pytest.approx(
        selection.logme(features, labels).value, rel=1e-10
    )


def test_classes_that_cannot_be_taken_out_of_sums_are_named() -> None:
    statistics = Statistics.of([[0.0], [1], [2], [3], [4]], [0, 0, 0, 1, 1])
    with pytest.raises(SelectionError, match="class 1 has 2 samples"):
        statistics.without_small_classes(3)


def test_statistics_of_different_models_do_not_add() -> None:
    with pytest.raises(SelectionError, match="of 1 and of 2 features cannot be added"):
        Statistics.of([[0.0], [1]], [0, 1]) + Statistics.of([[0.0, 1], [1, 2]], [0, 1])


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ([[0.0], [1.0]], [0], "2 rows of features and 1 labels"),
        ([0.0, 1.0], [0, 1], "features have shape"),
        (np.zeros((0, 3)), [], "features have shape"),
        ([[0.0], [np.nan]], [0, 1], r"NaN or infinite numbers in 1 of 2 rows \(the first is row 1\)"),
        ([[0.0], [1.0]], [0, -1], "negative number -1"),
        ([[0.0], [1.0]], [0, 0.5], "not whole numbers"),
        ([[0.0], [1.0]], [[0], [1]], "expected one number for each sample"),
    ],
)
def test_what_cannot_be_summed_is_said(features: object, labels: object, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Statistics.of(features, labels)  # type: ignore[arg-type]


def test_no_batch_is_said() -> None:
    with pytest.raises(SelectionError, match="no features to score"):
        Statistics.streamed([])
