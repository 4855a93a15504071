"""LogME: the specification's numbers, the exact Gaussian density, the optimum, and what changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from deltapatch.selection import logme
from deltapatch.selection.scores.logme import logme_of_targets

FEATURES = np.array([[1, 0], [0, 1], [1, 1], [2, 1], [0, 2]], float)
TARGET = np.array([1, 0, 1, 1, 0])


def density(features: NDArray, target: NDArray, alpha: float, beta: float) -> float:
    samples = len(features)
    covariance = features @ features.T / alpha + np.eye(samples) / beta
    return float(multivariate_normal(np.zeros(samples), covariance).logpdf(target)) / samples


def test_the_worked_example() -> None:
    found = logme_of_targets(FEATURES, TARGET, center=False)
    assert found.value == pytest.approx(-0.8072868826, abs=1e-9)
    details = found.diagnostics.details
    assert details["alpha"] == pytest.approx(5.0554940, rel=1e-5)
    assert details["beta"] == pytest.approx(8.9665501, rel=1e-5)
    assert density(FEATURES, TARGET, details["alpha"], details["beta"]) == pytest.approx(
        found.value, abs=1e-12
    )
    assert logme(FEATURES, TARGET).value == pytest.approx(-0.7987959367, abs=1e-9)
    assert logme_of_targets(FEATURES + 1, TARGET, center=False).value == pytest.approx(-0.69737651, abs=1e-7)


@pytest.mark.parametrize(("samples", "width"), [(30, 4), (6, 15), (20, 20), (9, 8)])
@pytest.mark.parametrize("seed", range(6))
def test_the_evidence_is_the_gaussian_density_at_its_maximum(samples: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((samples, width))
    target = features @ rng.standard_normal(width) + rng.standard_normal(samples) * rng.uniform(0.1, 3)
    found = logme_of_targets(features, target, center=False)
    details = found.diagnostics.details
    if not details["no_signal"]:
        exact = density(features, target, details["alpha"], details["beta"])
        assert found.value == pytest.approx(exact, abs=1e-7)

    def loss(logs: NDArray) -> float:
        return -density(features, target, *np.exp(np.clip(logs, -25, 25)))

    best = min(minimize(loss, start, method="Nelder-Mead").fun for start in ([0, 0], [3, 0], [-2, 3]))
    assert found.value == pytest.approx(-best, abs=2e-4)


@given(st.integers(0, 1000), st.integers(6, 40), st.integers(1, 60))
def test_scale_rotation_repetition_and_order_change_nothing(seed: int, samples: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    features, labels = rng.standard_normal((samples, width)), np.arange(samples) % 3
    value = logme(features, labels).value
    rotation = np.linalg.qr(rng.standard_normal((width, width))).Q
    order = rng.permutation(samples)
    for changed in (7 * features, features @ rotation, np.hstack([features, features]) / np.sqrt(2)):
        assert logme(changed, labels).value == pytest.approx(value, abs=1e-6)
    assert logme(features[order], labels[order]).value == pytest.approx(value, abs=1e-8)
    assert logme(features, 2 - labels).value == pytest.approx(value, abs=1e-8)


def test_columns_of_zeros_add_nothing() -> None:
    """The term that the widely copied code leaves out: it would move the value with the width alone."""
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((20, 30)), np.arange(20) % 4
    wider = np.hstack([features, np.zeros((20, 500))])
    assert logme(wider, labels).value == pytest.approx(logme(features, labels).value, abs=1e-9)


def test_centred_features_do_not_feel_a_shift() -> None:
    rng = np.random.default_rng(1)
    features, labels = rng.standard_normal((50, 6)), np.arange(50) % 3
    value = logme(features, labels, center=True).value
    assert logme(features + 30, labels, center=True).value == pytest.approx(value, abs=1e-8)
    assert logme(features + 30, labels).value != pytest.approx(logme(features, labels).value, abs=1e-2)


def test_features_that_tell_nothing_and_all_are_counted() -> None:
    labels = np.arange(40) % 2
    telling = np.eye(2)[labels] * 3
    found = logme(telling, labels)
    assert np.isfinite(found.value)
    assert found.diagnostics.details["separable"] == 2
    assert found.diagnostics.warnings == ("the features fit 2 of 2 classes without error",)
    # Orthogonal to both indicators.
    silent = np.where(np.arange(40) % 4 < 2, 1.0, -1.0)[:, None]
    nothing = logme(silent, labels)
    assert nothing.diagnostics.details["no_signal"] == 2
    assert nothing.value < found.value
    assert nothing.value == pytest.approx(-0.5 * (np.log(2 * np.pi * 0.5) + 1), abs=1e-9)


def test_better_features_have_more_evidence() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 4, 300)
    means = rng.standard_normal((4, 20))
    values = [
        logme(means[labels] * signal + rng.standard_normal((300, 20)), labels).value
        for signal in (0.0, 0.5, 1.0, 2.0)
    ]
    assert values == sorted(values)


def test_targets_of_regression_may_have_several_columns() -> None:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((80, 5))
    targets = features @ rng.standard_normal((5, 3)) + 0.1 * rng.standard_normal((80, 3))
    both = logme_of_targets(features, targets)
    single = [logme_of_targets(features, column).value for column in targets.T]
    assert both.value == pytest.approx(np.mean(single))
