"""TransRate: the closed form, both sides of the determinant, and scale."""

import numpy as np
import pytest

from deltapatch.selection import SelectionError, transrate


def test_three_classes_on_the_simplex() -> None:
    angles = np.deg2rad([0, 120, 240])[np.arange(30) % 3]
    found = transrate(np.stack([np.cos(angles), np.sin(angles)], axis=1), np.arange(30) % 3)
    epsilon = 1e-4
    expected = np.log(1 + 1 / (2 * epsilon)) - 0.5 * np.log(1 + 1 / epsilon)
    assert expected == pytest.approx(3.9121729879)
    assert found.value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("samples", "width"), [(60, 5), (40, 90)])
@pytest.mark.parametrize("weights", ["samples", "equal"])
def test_it_is_the_formula(samples: int, width: int, weights: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, samples - 3), [0, 1, 2]])
    features = rng.standard_normal((len(labels), width)) + labels[:, None]
    centred = features - features.mean(0)
    centred /= np.sqrt((centred**2).sum() / len(labels))

    def rate(rows: np.ndarray) -> float:
        matrix = np.eye(width) + rows.T @ rows / (len(rows) * 1e-4)
        return 0.5 * float(np.linalg.slogdet(matrix)[1])

    shares = [np.mean(labels == k) if weights == "samples" else 1 / 3 for k in range(3)]
    expected = rate(centred) - sum(share * rate(centred[labels == k]) for k, share in enumerate(shares))
    found = transrate(features, labels, class_weights=weights)  # type: ignore[arg-type]
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_scale_matters_only_when_it_is_asked_for() -> None:
    rng = np.random.default_rng(1)
    features, labels = rng.standard_normal((50, 4)), np.arange(50) % 2
    value = transrate(features, labels).value
    assert transrate(50 * features - 3, labels).value == pytest.approx(value, rel=1e-9)
    own = transrate(features, labels, scaled=False).value
    assert transrate(50 * features, labels, scaled=False).value != pytest.approx(own, rel=1e-6)


def test_two_separated_classes_in_one_dimension_score_nothing() -> None:
    labels = np.arange(20) % 2
    assert transrate(labels[:, None] * 2.0 - 1, labels).value == pytest.approx(0, abs=1e-9)


def test_a_distortion_of_zero_is_refused() -> None:
    with pytest.raises(SelectionError, match="epsilon is 0"):
        transrate([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1], epsilon=0)
