"""SFDA: textbook discriminant analysis in both passes, a case by hand, and what is not touched."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from deltapatch.selection import SelectionError, sfda


def textbook(features: NDArray, labels: NDArray, scaled: bool) -> float:
    """The paper's algorithm in its own form: all generalised eigenvectors, samples one by one."""
    samples, width = features.shape
    classes = labels.max() + 1
    priors = np.log(np.bincount(labels) / samples)

    def covariance(rows: NDArray) -> NDArray:
        means = np.stack([rows[labels == k].mean(0) for k in range(classes)])
        centred = rows - means[labels]
        return centred.T @ centred / samples

    total = np.trace(np.atleast_2d(np.cov(features, rowvar=False, bias=True)))
    scale = width / total if scaled else 1.0
    shrinkage = max(np.exp(-5 * scale * np.linalg.eigvalsh(covariance(features))[-1]), 1e-10)

    def posteriors(rows: NDArray) -> NDArray:
        inside = covariance(rows)
        inside = (1 - shrinkage) * inside + shrinkage * np.trace(inside) / width * np.eye(width)
        values, vectors = np.linalg.eigh(inside)
        project = vectors / np.sqrt(values)  # any E with Eᵀ S_W E = I
        projected = rows @ project
        means = np.stack([projected[labels == k].mean(0) for k in range(classes)])
        return softmax(projected @ means.T - 0.5 * (means**2).sum(1) + priors, axis=1)

    sure = softmax(posteriors(features), axis=1)[np.arange(samples), labels]
    means = np.stack([features[labels == k].mean(0) for k in range(classes)])
    mixed = np.stack(
        [
            p * x + (1 - p) * np.mean([means[j] for j in range(classes) if j != k], axis=0)
            for p, x, k in zip(sure, features, labels, strict=True)
        ]
    )
    return float(posteriors(mixed)[np.arange(samples), labels].mean())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_it_is_the_algorithm_of_the_paper(scaled: bool, spread: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, 150)])
    features = spread * (rng.standard_normal((154, 6)) + rng.standard_normal((4, 6))[labels])
    found = sfda(features, labels, scaled=scaled)
    assert found.value == pytest.approx(textbook(features, labels, scaled), rel=1e-8)
    assert found.diagnostics.details["components"] == 6


def test_two_classes_on_a_line_by_hand() -> None:
    features, labels = np.array([[-2.0], [0.0], [0.0], [2.0], [1.0], [3.0]]), np.array([0, 0, 0, 1, 1, 1])
    assert sfda(features, labels).value == pytest.approx(textbook(features, labels, True), rel=1e-10)


def test_scale_and_shift_change_nothing() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(90) % 3
    features = rng.standard_normal((90, 5)) + labels[:, None]
    value = sfda(features, labels).value
    assert sfda(9 * features + 4, labels).value == pytest.approx(value, rel=1e-7)


def test_few_samples_are_projected_first_and_it_is_said() -> None:
    rng = np.random.default_rng(2)
    features, labels = rng.standard_normal((60, 300)), np.arange(60) % 3
    found = sfda(features, labels)
    assert found.diagnostics.details["components"] == 12
    assert "projected on 12 principal directions" in found.diagnostics.warnings[0]
    assert found.value < 0.9
    centred = features - features.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:12]
    assert found.value == pytest.approx(textbook(features @ directions.T, labels, True), rel=1e-7)
    assert "nears 1" in sfda(features, labels, components=300).diagnostics.warnings[0]


def test_the_features_stay_as_they_were() -> None:
    features, labels = np.random.default_rng(3).standard_normal((40, 3)), np.arange(40) % 2
    before = features.copy()
    sfda(features, labels)
    np.testing.assert_array_equal(features, before)


def test_components_have_to_be_there() -> None:
    with pytest.raises(SelectionError, match="components is 9, but there are 1 features"):
        sfda([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1], components=9)
