"""The Fréchet distance between features: closed forms, features against statistics, what is refused."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from deltapatch.selection.diagnosing.frechet import frechet_distance
from deltapatch.selection.score import SelectionError
from deltapatch.selection.statistics import Statistics


def rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))


def test_equal_covariances_leave_the_distance_of_the_means() -> None:
    source, shift = rows(50, 4), np.array([1.0, -2.0, 0.5, 0.0])
    assert frechet_distance(source, source + shift) == pytest.approx(float(shift @ shift), rel=1e-9)
    assert frechet_distance(source, source) == pytest.approx(0, abs=1e-10)


def test_variances_1_and_4_of_one_feature_are_1_apart() -> None:
    unit = np.array([[-1.0], [0.0], [1.0]])  # variance 1 with N - 1
    assert frechet_distance(unit, 2 * unit) == pytest.approx(1)


@pytest.mark.parametrize(("first", "second"), [((80, 6), (60, 6)), ((5, 20), (9, 20)), ((4, 10), (50, 10))])
def test_it_is_the_formula_with_matrix_roots(first: tuple[int, int], second: tuple[int, int]) -> None:
    source, target = rows(*first), 2 * rows(*second, seed=1) + 1
    c_s, c_t = np.cov(source.T), np.cov(target.T)
    values, vectors = np.linalg.eigh(c_s)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    shift = source.mean(0) - target.mean(0)
    expected = shift @ shift + np.trace(c_s + c_t) - 2 * np.trace(sqrtm(root @ c_t @ root)).real
    assert frechet_distance(source, target) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(target, source) == pytest.approx(frechet_distance(source, target))


def test_statistics_stand_in_for_features() -> None:
    source, target = rows(80, 6), rows(40, 6, seed=1) + 1
    statistics = [Statistics.of(part, np.zeros(len(part), int)) for part in (source, target)]
    assert frechet_distance(*statistics) == pytest.approx(frechet_distance(source, target), rel=1e-8)
    assert frechet_distance(source, statistics[1]) == pytest.approx(
        frechet_distance(source, target), rel=1e-8
    )


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(SelectionError, match="of 3 and of 4 columns"):
        frechet_distance(rows(9, 3), rows(9, 4))
    with pytest.raises(SelectionError, match="one row"):
        frechet_distance(rows(1, 3), rows(9, 3))
    with pytest.raises(SelectionError, match="compact"):
        frechet_distance(Statistics.of(rows(3, 9), [0, 1, 1], compact=True), rows(9, 9))
    with pytest.raises(SelectionError, match="NaN"):
        frechet_distance(rows(9, 3) * np.nan, rows(9, 3))
