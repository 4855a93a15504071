"""V-information: what every layer, a later layer or no layer tells, and ridge against scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from deltapatch.selection.quality.v_information import v_information
from deltapatch.selection.score import SelectionError


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_what_is_linear_in_every_layer_has_complexity_0(random: np.random.Generator) -> None:
    x = random.normal(size=(300, 12))
    layers = [x, x @ random.normal(size=(12, 40)), 3 * x + 1]
    found = v_information(layers, x @ random.normal(size=(12, 4)))
    assert found.complexity == pytest.approx(np.zeros(4), abs=1e-6)
    assert found.information.shape == (3, 4)


@pytest.mark.parametrize("width", [5, 600])
def test_independent_noise_has_complexity_1(random: np.random.Generator, width: int) -> None:
    layers = [random.normal(size=(400, width)) for _ in range(3)]
    found = v_information(layers, random.normal(size=(400, 6)))
    assert found.complexity == pytest.approx(np.ones(6), abs=0.02)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_what_layer_m_of_4_is_the_first_to_tell_has_complexity_m_less_1_over_4(
    random: np.random.Generator, first: int
) -> None:
    x = random.normal(size=(400, 8))
    layers = [random.normal(size=(400, 8))] * (first - 1) + [x] * (5 - first)
    found = v_information(layers, x @ random.normal(size=(8, 3)))
    assert found.complexity == pytest.approx(np.full(3, (first - 1) / 4), abs=0.02)


def test_shares_are_those_of_a_ridge_regression_with_the_chosen_penalty(random: np.random.Generator) -> None:
    for width in (10, 300):
        x = random.normal(size=(120, width))
        z = x[:, :3] @ random.normal(size=(3, 2)) + random.normal(size=(120, 2))
        found = v_information([x], z, held_out=0.25, seed=5)
        order = np.random.default_rng(5).permutation(120)
        train, test = order[:90], order[90:]
        values = np.linalg.svd(x[train] - x[train].mean(0), compute_uv=False) ** 2
        mean = values[values > 1e-9 * values[0]].mean()
        z = (z - z[train].mean(0)) / z[train].std(0)
        fitted = Ridge(alpha=found.penalties[0] * mean).fit(x[train], z[train])
        rest = ((z[test] - fitted.predict(x[test])) ** 2).sum(0)
        expected = 1 - rest / ((z[test] - z[test].mean(0)) ** 2).sum(0)
        assert found.information[0] == pytest.approx(np.clip(expected, 0, 1), abs=1e-8)
        assert found.held_out == 30


def test_in_sample_fit_does_not_count(random: np.random.Generator) -> None:
    """Fewer images than activations: on the same images the share would be 1."""
    found = v_information([random.normal(size=(60, 500))], random.normal(size=(60, 3)))
    assert (found.information < 0.3).all()


def test_scale_and_offset_of_features_change_nothing(random: np.random.Generator) -> None:
    x = random.normal(size=(100, 10))
    z = x @ random.normal(size=(10, 3)) + random.normal(size=(100, 3))
    one = v_information([x], z)
    other = v_information([x], z * [1, -100, 1e-3] + [0, 5, 7])
    assert one.complexity == pytest.approx(other.complexity)


def test_constant_features_are_left_out_and_a_constant_layer_tells_nothing(
    random: np.random.Generator,
) -> None:
    x = random.normal(size=(100, 4))
    found = v_information([np.ones((100, 3)), x], np.column_stack([x[:, 0], np.full(100, 2.0), x[:, 1]]))
    assert found.features == (0, 2)
    assert found.warnings == ("1 of 3 features are constant and left out",)
    assert found.complexity == pytest.approx([0.5, 0.5], abs=1e-6)


def test_inputs_stay_as_they_are_and_a_seed_gives_the_same(random: np.random.Generator) -> None:
    x, z = random.normal(size=(50, 4)).astype(np.float32), random.normal(size=(50, 2)).astype(np.float32)
    copies = x.copy(), z.copy()
    one, other = (v_information([x], z, seed=1) for _ in range(2))
    assert np.array_equal(one.information, other.information)
    assert np.array_equal(x, copies[0])
    assert np.array_equal(z, copies[1])


def test_what_cannot_be_measured_is_refused(random: np.random.Generator) -> None:
    x = random.normal(size=(20, 4))
    with pytest.raises(SelectionError, match="there are no layers"):
        v_information([], x)
    with pytest.raises(SelectionError, match="layer 1 has 19 rows, but the features have 20"):
        v_information([x, x[1:]], x)
    with pytest.raises(SelectionError, match="8 images are too few"):
        v_information([x[:8]], x[:8])
    with pytest.raises(SelectionError, match="all features are constant"):
        v_information([x], np.ones((20, 2)))
    with pytest.raises(SelectionError, match="held_out must be"):
        v_information([x], x, held_out=1.0)
