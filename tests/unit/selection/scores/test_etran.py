"""ETran: the energy and both class terms in closed form, and the combination over candidates."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from deltapatch.selection import Score, SelectionError, etran
from deltapatch.selection.scores.etran import etran_over_pool


def blobs(samples: int, width: int, seed: int = 0, distance: float = 1.0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), np.arange(3), rng.integers(0, 3, samples - 6)])
    centres = distance * rng.standard_normal((3, width))
    return rng.standard_normal((samples, width)) + centres[labels], labels


def details(score: Score) -> dict[str, float]:
    return dict(score.diagnostics.details)


def test_the_energy_of_equal_features() -> None:
    """log Σ_d e^c = c + log d; of fewer than 200 samples the one of least energy counts."""
    features = np.repeat([[2.0], [3.0], [-1.0], [4.0]], 5, axis=1)
    found = etran(features, [0, 0, 1, 1], scaled=False)
    assert details(found)["energy"] == pytest.approx(-1 + np.log(5), abs=1e-12)
    assert details(found)["energy_samples"] == 1


def test_the_energy_is_the_mean_of_the_smallest_half_percent() -> None:
    features, labels = blobs(601, 4)
    found = etran(features, labels, scaled=False)
    assert details(found)["energy_samples"] == 4
    assert details(found)["energy"] == pytest.approx(np.sort(logsumexp(features, axis=1))[:4].mean())


@pytest.mark.parametrize(("samples", "width"), [(200, 5), (40, 90)])
def test_the_released_class_term_is_the_nearest_mean_whatever_the_eigenvectors(
    samples: int, width: int
) -> None:
    features, labels = blobs(samples, width, distance=0.4)
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    # What the released code projects on: all eigenvectors that a symmetric solver finds in one that is not.
    within, between = np.cov((features - means[labels]).T), np.cov(means[labels].T)
    vectors = np.linalg.eigh(np.linalg.inv(within + 1e-5 * np.eye(width)) @ between)[1]
    projected, centres = features @ vectors, means @ vectors
    posteriors = softmax(
        projected @ centres.T - 0.5 * (centres**2).sum(1) + np.log(np.bincount(labels) / samples), axis=1
    )
    found = etran(features, labels, scaled=False)
    assert details(found)["class"] == pytest.approx(
        posteriors[np.arange(samples), labels].mean(), rel=1e-9, abs=1e-12
    )
    assert found.value == details(found)["energy"] + details(found)["class"]


@pytest.mark.parametrize(("samples", "width"), [(200, 5), (40, 90)])
def test_lda_is_that_of_the_textbook(samples: int, width: int) -> None:
    features, labels = blobs(samples, width)
    means = np.stack([features[labels == k].mean(0) for k in range(3)])
    shrinkage = ledoit_wolf_shrinkage(features - means[labels], assume_centered=True)
    found = etran(features, labels, class_term="lda")
    assert details(found)["shrinkage"] == pytest.approx(shrinkage, rel=1e-9)
    inside = (features - means[labels]).T @ (features - means[labels]) / samples
    shrunk = (1 - shrinkage) * inside + shrinkage * np.trace(inside) / width * np.eye(width)
    # Equal to the textbook's rule without shrinkage on features whose shrunk covariance is the identity.
    whitened = features @ np.linalg.inv(np.linalg.cholesky(shrunk)).T
    centres = np.stack([whitened[labels == k].mean(0) for k in range(3)])
    scores = whitened @ centres.T - 0.5 * (centres**2).sum(1) + np.log(np.bincount(labels) / samples)
    expected = softmax(scores, axis=1)[np.arange(samples), labels].mean()
    assert details(found)["class"] == pytest.approx(expected, rel=1e-9)


def test_lda_of_many_samples_is_that_of_scikit_learn() -> None:
    features, labels = blobs(3000, 4)
    features = features * [1, 2, 3, 4]
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels).predict_proba(features)
    found = etran(features, labels, class_term="lda")
    assert details(found)["class"] == pytest.approx(expected[np.arange(3000), labels].mean(), abs=1e-3)


@pytest.mark.parametrize("class_term", ["ncm", "lda"])
def test_the_scale_of_the_features_changes_nothing(class_term: str) -> None:
    features, labels = blobs(60, 8)
    value = etran(features, labels, class_term=class_term).value
    assert etran(30 * features, labels, class_term=class_term).value == pytest.approx(value, rel=1e-10)
    assert etran(30 * features, labels, class_term=class_term, scaled=False).value != pytest.approx(value)


def test_labels_with_gaps_small_classes_and_float32() -> None:
    features, labels = blobs(50, 6)
    plain = etran(features.astype(np.float32), labels)
    gaps = np.append(np.array([4, 0, 9])[labels], 7)
    found = etran(np.vstack([features, np.full((1, 6), -50.0)]), gaps)
    assert found.value == pytest.approx(plain.value, rel=1e-6)
    assert found.diagnostics.dropped == (7,)


@pytest.mark.parametrize("class_term", ["ncm", "lda"])
def test_constant_columns_are_said_and_nothing_is_written(class_term: str) -> None:
    features, labels = blobs(50, 6)
    features[:, 2] = 3.0
    before = features.copy()
    found = etran(features, labels, class_term=class_term)
    assert np.array_equal(features, before)
    assert found.diagnostics.warnings == ("1 of 6 features are constant",)


def test_lda_without_spread_inside_of_classes_is_refused() -> None:
    features = np.repeat([[0.1, 0.2], [0.3, 0.7]], 3, axis=0)
    with pytest.raises(SelectionError, match="no covariance within classes; use class_term 'ncm'"):
        etran(features, [0, 0, 0, 1, 1, 1], class_term="lda")
    assert etran(features, [0, 0, 0, 1, 1, 1]).value > 0


def with_terms(energy: float, classes: float) -> Score:
    features, labels = blobs(30, 3)
    found = etran(features, labels)
    changed = {**found.diagnostics.details, "energy": energy, "class": classes}
    return replace(found, diagnostics=replace(found.diagnostics, details=changed))


def test_over_a_pool_each_term_counts_from_its_least_to_its_largest() -> None:
    scores = [with_terms(1.0, 0.5), with_terms(3.0, 0.9), with_terms(2.0, 0.6)]
    combined = etran_over_pool(scores)
    assert [score.value for score in combined] == pytest.approx([0, 1, 0.15 * 0.5 + 0.85 * 0.25])
    assert {score.name for score in combined} == {"etran_over_pool"}
    assert [score.diagnostics for score in combined] == [score.diagnostics for score in scores]
    other = etran_over_pool(scores, energy=1, classes=0)
    assert [score.value for score in other] == pytest.approx([0, 1, 0.5])


def test_over_a_pool_a_term_without_spread_adds_nothing() -> None:
    combined = etran_over_pool([with_terms(1.0, 0.7), with_terms(3.0, 0.7)])
    assert [score.value for score in combined] == pytest.approx([0, 0.15])


def test_over_a_pool_another_candidate_changes_the_order_of_two() -> None:
    first, second = with_terms(0.0, 0.52), with_terms(1.0, 0.5)
    alone = etran_over_pool([first, second])
    beside = etran_over_pool([first, second, with_terms(0.5, 1.0)])
    assert alone[0].value > alone[1].value
    assert beside[0].value < beside[1].value


def test_what_cannot_be_combined_or_scored_is_refused() -> None:
    features, labels = blobs(30, 3)
    found = etran(features, labels)
    with pytest.raises(SelectionError, match="1 scores cannot be combined; give those of two or more"):
        etran_over_pool([found])
    with pytest.raises(SelectionError, match="give what etran returned"):
        etran_over_pool([found, replace(found, name="logme")])
    with pytest.raises(SelectionError, match="on the same images with the same options"):
        etran_over_pool([found, etran(features[1:], labels[1:])])
    with pytest.raises(SelectionError, match="on the same images with the same options"):
        etran_over_pool([found, etran(features, labels, class_term="lda")])
    with pytest.raises(SelectionError, match="give numbers from 0"):
        etran_over_pool([found, found], energy=-1)
    with pytest.raises(SelectionError, match="give 'ncm' or 'lda'"):
        etran(features, labels, class_term="qda")  # pyright: ignore[reportArgumentType]
