"""PED: a step by hand, what stays where it is, and scores that it wraps."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from deltapatch.selection import Diagnostics, Score, SelectionError, logme, ped, sfda
from deltapatch.selection.score import ranking_scores
from deltapatch.selection.scores.ped import move_classes_apart

PAIR = np.array([0, 0, 1, 1])


def on_a_line(distance: float) -> NDArray:
    """Two classes of radius 1 whose means are so far apart."""
    return np.array([[-1.0], [1.0], [distance - 1], [distance + 1]])


def blobs(seed: int = 0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(90) % 3
    return rng.standard_normal((90, 5)) + 0.3 * rng.standard_normal((3, 5))[labels], labels


def distance_of_means(features: ArrayLike, labels: ArrayLike) -> Score:
    """A small score: between the means of classes 0 and 1."""
    rows, numbers = np.asarray(features), np.asarray(labels)
    value = float(np.linalg.norm(rows[numbers == 0].mean(0) - rows[numbers == 1].mean(0)))
    return Score("distance", value, Diagnostics(len(rows), rows.shape[1], 2, details={"own": 1.0}))


def step_by_step(features: NDArray, labels: NDArray, std: NDArray, mean: NDArray, overlap: float) -> NDArray:
    """The published method in its own form: all features are standardised and moved at every step."""
    first = None
    for _ in range(6):
        rows = (features - mean) / std
        classes = range(labels.max() + 1)
        means = [rows[labels == k].mean(0) for k in classes]
        radii = [np.sqrt(rows[labels == k].var(0).sum()) for k in classes]
        moves = []
        for k in classes:
            move = np.zeros(rows.shape[1])
            for other in classes:
                if other != k:
                    apart = means[k] - means[other]
                    distance = np.linalg.norm(apart)
                    amount = max(overlap * (radii[k] + radii[other]) - distance, 0)
                    move += apart / distance * min(0.5 * 0.1**2 * amount, amount)
            moves.append(move)
        size = np.abs(moves).sum()
        first = size if first is None else first
        if size <= 0.5 * first:
            break
        features = (rows + np.array(moves)[labels]) * std + mean
    return features


def test_one_step_by_hand() -> None:
    """ν (1 + 1) - 0.2 = 1 is the overlap, and half of 0.1² of it is what each class moves."""
    once = move_classes_apart(on_a_line(0.2), PAIR, reference_std=[1.0])
    assert once.sizes[0] == pytest.approx(0.01)
    # Each step leaves 99 % of the overlap.
    assert once.steps == 6
    assert once.sizes == pytest.approx([0.01 * 0.99**step for step in range(6)])
    grown = sum(once.sizes)
    np.testing.assert_allclose(once.features, on_a_line(0.2) + np.array([[-1], [-1], [1], [1]]) * grown / 2)


def test_a_step_that_shrank_to_half_is_not_made() -> None:
    """With ½ Δt² = ⅓ the overlap of 1 falls by ⅔ at once; the second move would be a third of the first."""
    found = move_classes_apart(on_a_line(0.2), PAIR, reference_std=[1.0], time_step=np.sqrt(2 / 3))
    assert found.sizes == pytest.approx((2 / 3, 2 / 9))
    assert found.steps == 1
    means = found.features[2:].mean() - found.features[:2].mean()
    assert means == pytest.approx(0.2 + 2 / 3)


def test_a_large_time_step_moves_by_the_overlap_at_most() -> None:
    found = move_classes_apart(on_a_line(0.2), PAIR, reference_std=[1.0], time_step=100.0)
    assert found.sizes == pytest.approx((2.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_published_method_with_its_standardising(seed: int) -> None:
    features, labels = blobs(seed)
    generic = np.random.default_rng(9).standard_normal((200, 5)) * [1, 2, 3, 4, 5] + 8
    std, mean = generic.std(0), generic.mean(0)
    expected = step_by_step(features, labels, std, mean, 0.6)
    found = move_classes_apart(features, labels, reference_std=std, reference_mean=mean)
    np.testing.assert_allclose(found.features, expected, atol=1e-12)
    assert np.abs(expected - features).max() > 1e-4
    # The mean of the generic set cancels.
    without = move_classes_apart(features, labels, reference_std=std)
    np.testing.assert_array_equal(without.features, found.features)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_overlap_all_stays_bit_for_bit(dtype: type) -> None:
    features = on_a_line(1.3).astype(dtype)
    moved = move_classes_apart(features, PAIR, reference_std=[1.0])
    assert (moved.steps, moved.sizes) == (0, (0.0,))
    assert moved.features.dtype == dtype
    assert np.array_equal(moved.features, features)
    found = ped(distance_of_means, features, PAIR, reference_std=[1.0])
    assert found.value == distance_of_means(features, PAIR).value
    assert found.diagnostics.details == {"own": 1.0, "ped_steps": 0, "ped_first_move": 0.0}


def test_only_classes_that_overlap_move() -> None:
    features = np.vstack([on_a_line(0.2), on_a_line(0.2)[:2] + 50])
    moved = move_classes_apart(features, [0, 0, 1, 1, 2, 2], reference_std=[1.0]).features
    assert np.array_equal(moved[4:], features[4:])
    assert not np.isclose(moved[:4], features[:4]).any()


def test_classes_move_as_a_whole() -> None:
    features, labels = blobs()
    moves = move_classes_apart(features, labels, reference_std=np.ones(5)).features - features
    for label in range(3):
        np.testing.assert_allclose(moves[labels == label], moves[label][None].repeat(30, 0), atol=1e-12)
    # Whatever a class pushes pushes back.
    np.testing.assert_allclose(moves[:3].sum(axis=0), 0, atol=1e-12)


def test_classes_whose_means_coincide_do_not_push() -> None:
    features = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    moved = move_classes_apart(features, PAIR, reference_std=np.ones(2))
    assert np.array_equal(moved.features, features)


def test_narrow_reference_features_count_as_a_thousandth() -> None:
    features, labels = blobs()
    narrow, floor = (
        move_classes_apart(features, labels, reference_std=np.array([1, 1, 1, 1, least]))
        for least in (0.0, 1e-3)
    )
    np.testing.assert_array_equal(narrow.features, floor.features)


def test_classes_of_one_sample_neither_move_nor_push() -> None:
    features, labels = blobs()
    more, numbers = np.vstack([features, features[:1] + 0.01]), np.append(labels, 6)
    moved = move_classes_apart(more, numbers, reference_std=np.ones(5)).features
    assert np.array_equal(moved[-1], more[-1])
    plain = move_classes_apart(features, labels, reference_std=np.ones(5)).features
    np.testing.assert_array_equal(moved[:-1], plain)


def test_far_from_zero_classes_move_as_they_do_at_zero() -> None:
    features, labels = blobs()
    near = move_classes_apart(features, labels, reference_std=np.ones(5))
    far = move_classes_apart(features + 1e6, labels, reference_std=np.ones(5))
    np.testing.assert_allclose(far.features - 1e6, near.features, atol=1e-8)


TAKE_FEATURES = [name for name, score in ranking_scores().items() if score.reads != "probabilities"]


@pytest.mark.parametrize("name", TAKE_FEATURES)
def test_every_score_that_takes_features_can_be_wrapped(name: str) -> None:
    score = ranking_scores()[name].compute
    features, labels = blobs()
    before = features.copy()
    found = ped(score, features, labels, reference_std=np.ones(5))
    moved = move_classes_apart(features, labels, reference_std=np.ones(5))
    assert np.array_equal(features, before)
    assert found.name == f"ped({name})"
    assert found.value == score(moved.features, labels).value
    assert found.diagnostics.details["ped_steps"] == moved.steps == 6
    assert found.diagnostics.details["ped_first_move"] == moved.sizes[0]


@pytest.mark.parametrize("score", [logme, sfda])
def test_classes_that_were_moved_apart_are_easier(score: Callable[[ArrayLike, ArrayLike], Score]) -> None:
    features, labels = blobs()
    found = ped(score, features, labels, reference_std=np.ones(5), overlap=3.0, time_step=0.5)
    assert found.value > score(features, labels).value


def test_labels_with_gaps_and_dropped_classes_reach_the_score() -> None:
    features, labels = blobs()
    gaps = np.array([4, 0, 9])[labels]
    gaps[0] = 7
    found = ped(logme, features, gaps, reference_std=np.ones(5))
    assert found.diagnostics.dropped == (7,)
    assert found.diagnostics.classes == 3


def test_what_cannot_be_moved_is_refused() -> None:
    features, labels = blobs()
    with pytest.raises(SelectionError, match=r"reference_std has shape \(4,\), but there are 5 features"):
        move_classes_apart(features, labels, reference_std=np.ones(4))
    with pytest.raises(SelectionError, match=r"reference_mean has shape \(1, 5\), but there are 5 features"):
        move_classes_apart(features, labels, reference_std=np.ones(5), reference_mean=np.ones((1, 5)))
    with pytest.raises(SelectionError, match="negative number -1"):
        move_classes_apart(features, labels, reference_std=-np.ones(5))
    with pytest.raises(SelectionError, match="reference_std hold NaN"):
        move_classes_apart(features, labels, reference_std=np.full(5, np.nan))
    with pytest.raises(SelectionError, match="1 classes have 2 samples or more"):
        move_classes_apart(features, np.zeros(90, int), reference_std=np.ones(5))
    with pytest.raises(SelectionError, match="90 rows of features and 89 labels"):
        move_classes_apart(features, labels[1:], reference_std=np.ones(5))
    with pytest.raises(SelectionError, match="give numbers above 0"):
        move_classes_apart(features, labels, reference_std=np.ones(5), time_step=0)
