"""The leave-one-out accuracy equals that of fits that really leave each sample out."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from deltapatch.selection import linear_probe


def draw(samples: int, width: int, signal: float, seed: int = 0) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), np.arange(3), rng.integers(0, 3, samples - 6)])
    means = signal * np.random.default_rng(9).standard_normal((3, width))
    return rng.standard_normal((samples, width)) + means[labels], labels


@pytest.mark.parametrize(("samples", "width"), [(40, 4), (25, 60), (30, 30)])
def test_it_is_what_leaving_each_sample_out_gives(samples: int, width: int) -> None:
    features, labels = draw(samples, width, 0.7)
    found = linear_probe(features, labels)
    unit = ((features - features.mean(0)) ** 2).sum() / samples
    # The penalty is one for all fits, so the rows that are left share it.
    ridge = Ridge(alpha=found.diagnostics.details["penalty"] * unit)
    targets = np.eye(3)[labels]
    predictions = np.stack(
        [
            ridge.fit(np.delete(features, i, 0), np.delete(targets, i, 0)).predict(features[i : i + 1])[0]
            for i in range(samples)
        ]
    )
    assert found.value == pytest.approx((predictions.argmax(1) == labels).mean())
    error = ((predictions - targets) ** 2).sum() / samples
    assert found.diagnostics.details["squared_error"] == pytest.approx(error, rel=1e-6)


def test_scale_rotation_and_shift_change_nothing() -> None:
    features, labels = draw(50, 8, 0.5)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8))).Q
    error = linear_probe(features, labels).diagnostics.details["squared_error"]
    for changed in (100 * features, features @ rotation, features + 20):
        details = linear_probe(changed, labels).diagnostics.details
        assert details["squared_error"] == pytest.approx(error, rel=1e-6)


def test_features_without_signal_are_at_chance_however_many() -> None:
    features, labels = draw(300, 600, 0.0)
    assert linear_probe(features, labels).value == pytest.approx(1 / 3, abs=0.12)
    features, labels = draw(300, 600, 1.0)
    assert linear_probe(features, labels).value == 1


def test_one_image_of_a_class_is_left_out() -> None:
    features, labels = draw(30, 5, 1.0)
    labels[7] = 50
    assert linear_probe(features, labels).diagnostics.dropped == (50,)
