"""Transport: plans that can be worked out by hand, and marginals that hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltapatch.selection import SelectionError
from deltapatch.selection.transport import EXACT_UP_TO, domain_costs, squared_distances, transport


def test_moving_everything_by_a_vector_costs_its_squared_length() -> None:
    source = np.random.default_rng(0).standard_normal((40, 4))
    plan = transport(squared_distances(source, source + np.array([1.0, 2.0, 0.0, 0.0])))
    assert plan.cost == pytest.approx(5.0, abs=1e-12)
    np.testing.assert_allclose(plan.masses, np.eye(40) / 40, atol=1e-15)
    assert (plan.marginal_error, plan.iterations, plan.warnings) == (0.0, 0, ())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([0.02, 0.05, 1.0]), st.integers(0, 99))
def test_rows_and_columns_carry_equal_masses(rows: int, columns: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = squared_distances(rng.standard_normal((rows, 3)), rng.standard_normal((columns, 3)))
    plan = transport(costs, regularization=share)
    error = np.abs(plan.masses.sum(1) - 1 / rows).sum() + np.abs(plan.masses.sum(0) - 1 / columns).sum()
    assert plan.masses.min() >= 0
    # The error that is reported is the true one.
    assert error == pytest.approx(plan.marginal_error, abs=1e-12)
    assert error <= 1e-6 or plan.warnings
    assert plan.cost == pytest.approx((plan.masses * costs).sum())


def test_sinkhorn_is_the_minimum_of_cost_less_entropy() -> None:
    """Of masses exp(f + g - C / ε) with the right marginals there is one, and it is the minimum."""
    rng = np.random.default_rng(0)
    costs = rng.uniform(size=(6, 9))
    plan = transport(costs, regularization=0.2, tolerance=1e-13)
    potentials = np.log(plan.masses) + costs / (0.2 * np.median(costs))
    crossed = potentials - potentials[:1] - potentials[:, :1] + potentials[0, 0]
    np.testing.assert_allclose(crossed, 0, atol=1e-9)


def test_a_blurred_plan_nears_the_exact_one() -> None:
    rng = np.random.default_rng(1)
    rows = EXACT_UP_TO + 1
    source, target = rng.standard_normal((rows, 1)), 2 + rng.standard_normal((rows, 1))
    # On a line the smallest goes to the smallest, and so on.
    exact = ((np.sort(source[:, 0]) - np.sort(target[:, 0])) ** 2).mean()
    costs = [
        transport(squared_distances(source, target), regularization=share).cost for share in (1.0, 0.2, 0.05)
    ]
    assert costs[0] > costs[1] > costs[2] > exact
    assert costs[2] == pytest.approx(exact, rel=0.05)


def test_costs_that_no_exponential_could_hold() -> None:
    rng = np.random.default_rng(2)
    source, target = rng.standard_normal((30, 2)), rng.standard_normal((45, 2))
    source[0] += 15.0
    costs = squared_distances(source, target)
    assert costs[0].min() / (0.05 * np.median(costs)) > 800  # exp(-745) is 0
    plan = transport(costs)
    assert np.isfinite(plan.masses).all()
    assert plan.marginal_error <= 1e-6
    # Farther out it takes too many iterations, which is said.
    source[0] += 500.0
    far = transport(squared_distances(source, target))
    assert np.isfinite(far.masses).all()
    assert far.warnings


def test_stopping_early_is_said() -> None:
    rng = np.random.default_rng(3)
    costs = squared_distances(rng.standard_normal((20, 2)), rng.standard_normal((30, 2)))
    plan = transport(costs, regularization=0.005, max_iterations=3)
    assert plan.iterations == 3
    assert plan.marginal_error > 1e-6
    assert "marginal error" in plan.warnings[0]
    assert "after 3 iterations" in plan.warnings[0]


@pytest.mark.parametrize("shape", [(3, 3), (3, 5)])
def test_sets_that_coincide_cost_nothing(shape: tuple[int, int]) -> None:
    plan = transport(np.zeros(shape))
    assert plan.cost == 0
    assert plan.masses.sum() == pytest.approx(1)


def test_distances_keep_their_digits_far_from_zero() -> None:
    rng = np.random.default_rng(4)
    left, right = rng.standard_normal((5, 3)), rng.standard_normal((7, 3))
    direct = ((left[:, None] - right) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distances(left, right), direct, rtol=1e-12)
    # The features themselves are rounded to 2e-9 there.
    np.testing.assert_allclose(squared_distances(left + 1e7, right + 1e7), direct, rtol=1e-6)


def test_scaled_distances_do_not_feel_the_scale_or_the_distance_of_the_sets() -> None:
    rng = np.random.default_rng(5)
    left, right = rng.standard_normal((50, 3)), rng.standard_normal((50, 3))
    plain = domain_costs(left, right, scaled=False)
    variance = (left.var(axis=0) + right.var(axis=0)).mean() / 2
    np.testing.assert_allclose(domain_costs(left, right), plain / variance)
    np.testing.assert_allclose(domain_costs(8 * left, 8 * right), plain / variance)
    far = squared_distances(left, right + 100) / variance
    np.testing.assert_allclose(domain_costs(left, right + 100), far)


@pytest.mark.parametrize(
    "costs", [np.zeros(3), np.zeros((0, 2)), np.full((2, 2), np.nan), np.array([[1.0, -1.0]])]
)
def test_costs_that_are_none_are_refused(costs: NDArray) -> None:
    with pytest.raises(SelectionError, match="must be a matrix of finite numbers from 0"):
        transport(costs)


def test_options_and_features_that_cannot_be_are_refused() -> None:
    with pytest.raises(SelectionError, match="above 0"):
        transport(np.ones((2, 3)), regularization=0)
    with pytest.raises(SelectionError, match="4 columns and target features 3; give features of one model"):
        domain_costs(np.ones((2, 4)), np.ones((2, 3)))
    with pytest.raises(SelectionError, match="constant in both sets"):
        domain_costs(np.ones((2, 3)), np.zeros((2, 3)))
