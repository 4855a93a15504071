"""Heads from statistics are the textbook's."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid

from deltapatch.selection import SelectionError, Statistics
from deltapatch.selection.closed_form import discriminant, nearest_mean

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 120)
FEATURES = RNG.standard_normal((120, 6)) + 2 * RNG.standard_normal((4, 6))[LABELS]
STATISTICS = Statistics.of(FEATURES, LABELS)


def test_nearest_mean_is_the_nearest_centroid() -> None:
    expected = NearestCentroid().fit(FEATURES, LABELS).predict(FEATURES)
    np.testing.assert_array_equal(nearest_mean(STATISTICS).predict(FEATURES), expected)


def test_a_class_without_samples_is_never_chosen() -> None:
    labels = np.where(LABELS == 1, 5, LABELS)
    assert 1 not in nearest_mean(Statistics.of(FEATURES, labels)).predict(FEATURES * 100)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_the_discriminant_is_scikit_learns(shrinkage: float) -> None:
    # Its covariance is standardised before it is shrunk, so features are given that change nothing.
    within = STATISTICS.within / 120
    scaled = FEATURES / np.sqrt(np.diag(within))
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(scaled, LABELS)
    rule = discriminant(Statistics.of(scaled, LABELS), shrinkage)
    difference = rule.scores(scaled) - peer.decision_function(scaled)
    np.testing.assert_allclose(difference, difference[:, :1] * np.ones(4), atol=1e-8)


def test_a_singular_covariance_is_said() -> None:
    with pytest.raises(SelectionError, match="4 samples with 6 features is singular"):
        discriminant(Statistics.of(FEATURES[:4], [0, 0, 1, 1]))
