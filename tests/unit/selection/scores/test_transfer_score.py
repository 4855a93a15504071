"""Transfer score: each of its three terms in closed form."""

import numpy as np
import pytest
from numpy.typing import NDArray

from deltapatch.selection import Score, SelectionError, transfer_score


def points(samples: int = 400, width: int = 2, seed: int = 0) -> NDArray:
    return np.random.default_rng(seed).uniform(size=(samples, width))


def simplex(classes: int) -> NDArray:
    """Rows that are all as far apart as they can be."""
    return np.eye(classes) - 1 / classes


def uniform(samples: int, classes: int) -> NDArray:
    return np.full((samples, classes), 1 / classes)


def term(score: Score, name: str) -> float:
    return score.diagnostics.details[name]


@pytest.mark.parametrize(("classes", "expected"), [(2, np.pi**2), (3, 4.3864908)])
def test_equal_weights_for_all_classes_are_furthest_from_uniform(classes: int, expected: float) -> None:
    # The directions' product is rounded to more than 1.
    found = transfer_score(np.ones((classes, 3)), points(), uniform(400, classes))
    assert term(found, "U") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_rows_of_a_simplex_are_uniform(classes: int) -> None:
    found = transfer_score(5 * simplex(classes), points(), uniform(400, classes))
    assert term(found, "U") == pytest.approx(0, abs=1e-12)


def test_u_is_a_mean_over_pairs_also_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float32)
    directions = weights / np.linalg.norm(weights.astype(np.float64), axis=1, keepdims=True)
    angles = [np.arccos(directions[i] @ directions[j]) for i in range(11) for j in range(11) if i != j]
    expected = np.mean((np.array(angles) - np.arccos(-1 / 10)) ** 2)
    for block in (1024, 4):
        monkeypatch.setattr("deltapatch.selection.scores.transfer_score._BLOCK", block)
        assert term(transfer_score(weights, points(), uniform(400, 11)), "U") == pytest.approx(expected)


def test_undecided_answers_share_no_information_and_sure_balanced_ones_all() -> None:
    undecided = transfer_score(simplex(4), points(), uniform(400, 4))
    assert term(undecided, "M") == pytest.approx(0, abs=1e-12)
    sure = transfer_score(simplex(4), points(), np.eye(4)[np.arange(400) // 100])
    assert -term(sure, "M") / np.log(4) == pytest.approx(1, abs=1e-12)
    one_sided = transfer_score(simplex(4), points(), np.eye(4)[np.zeros(400, int)])
    assert term(one_sided, "M") == pytest.approx(0, abs=1e-12)
    assert one_sided.diagnostics.warnings == ("3 of 4 classes are predicted for no image",)


def test_the_value_is_the_sum_of_the_terms() -> None:
    answers = np.random.default_rng(1).dirichlet(np.ones(3), 400)
    found = transfer_score(np.random.default_rng(2).standard_normal((3, 5)), points(), answers)
    expected = term(found, "Hop") - term(found, "M") / np.log(3) - term(found, "U")
    assert found.value == pytest.approx(expected)
    assert (found.diagnostics.samples, found.diagnostics.width, found.diagnostics.classes) == (400, 2, 3)


def test_points_that_fill_their_box_and_tight_clusters() -> None:
    filled = [
        term(transfer_score(simplex(2), points(seed=seed), uniform(400, 2)), "Hop") for seed in range(5)
    ]
    assert np.mean(filled) == pytest.approx(0.5, abs=0.03)
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])[np.arange(400) % 4]
    clusters = corners + 0.002 * np.random.default_rng(0).standard_normal((400, 2))
    assert term(transfer_score(simplex(2), clusters, uniform(400, 2)), "Hop") > 0.98


def test_repeated_features_are_clusters_of_no_size() -> None:
    found = transfer_score(simplex(2), np.repeat(points(10), 2, axis=0), uniform(20, 2))
    assert term(found, "Hop") == 1


def test_wide_features_are_reduced_before_the_box_is_drawn() -> None:
    """Directions of noise that say nothing would carry the statistic towards 1."""
    rng = np.random.default_rng(0)
    flat = points() * [3, 1]  # so that the box of the principal components is that of the points
    basis = np.linalg.qr(rng.standard_normal((300, 2)))[0]
    wide = flat @ basis.T + 1e-6 * rng.standard_normal((400, 300))
    reduced = transfer_score(simplex(2), wide, uniform(400, 2), components=2)
    assert term(reduced, "Hop") == pytest.approx(0.5, abs=0.1)
    noise = transfer_score(simplex(2), rng.standard_normal((400, 300)), uniform(400, 2), components=300)
    assert term(noise, "Hop") > term(reduced, "Hop") + 0.05


def test_the_seed_decides_and_nothing_is_written_to() -> None:
    arrays = (simplex(3), points(), np.random.default_rng(1).dirichlet(np.ones(3), 400))
    before = [array.copy() for array in arrays]
    first, again, other = (transfer_score(*arrays, seed=seed) for seed in (0, 0, 1))
    assert first.value == again.value != other.value
    assert abs(first.value - other.value) < 0.1
    for array, old in zip(arrays, before, strict=True):
        assert np.array_equal(array, old)


def test_scale_and_shift_of_the_features_change_nothing() -> None:
    value = transfer_score(simplex(2), points(), uniform(400, 2)).value
    moved = transfer_score(simplex(2), 50 * points() + 7, uniform(400, 2)).value
    assert moved == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("weights", "features", "probabilities", "message"),
    [
        (np.ones((1, 2)), points(5), np.ones((5, 1)), "has one class"),
        (np.ones((2, 3)), points(5), uniform(5, 3), r"give weights of shape \(classes, width\)"),
        (simplex(3), points(5), uniform(4, 3), "5 rows of features and 4 of probabilities"),
        (simplex(3), points(1), uniform(1, 3), "needs two or more"),
        (simplex(3), np.ones((5, 2)), uniform(5, 3), "features are constant"),
        (np.diag([1.0, 0.0, 1.0]), points(5), uniform(5, 3), "weights of class 1 are all zero"),
        (simplex(3), points(5), np.ones((5, 3)), "sum to 3"),
        (np.full((3, 2), np.nan), points(5), uniform(5, 3), "weights hold NaN"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    weights: NDArray, features: NDArray, probabilities: NDArray, message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        transfer_score(weights, features, probabilities)


@pytest.mark.parametrize("option", [{"components": 0}, {"draws": 0}, {"share": 0.0}, {"share": 1.5}])
def test_options_that_cannot_be_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(SelectionError, match="above 0 and at most 1"):
        transfer_score(simplex(2), points(), uniform(400, 2), **option)  # pyright: ignore[reportArgumentType]
