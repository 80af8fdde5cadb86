import numpy as np
import pytest
from scipy.stats import false_discovery_control

from panda_lightning.formulas.conformal import benjamini_hochberg, discoverable, p_values, require_alpha
from panda_lightning.types import PandaError


def test_p_values_count_as_a_plain_loop_does():
    rng = np.random.default_rng(0)
    calibration, scores = rng.integers(0, 9, 40).astype(float), rng.integers(-2, 12, 60).astype(float)  # with ties
    expected = [(1 + sum(c >= s for c in calibration)) / 41 for s in scores]
    np.testing.assert_array_equal(p_values(calibration, scores), expected)


def test_each_of_exchangeable_images_is_as_likely_to_have_each_p_value():
    values = np.random.default_rng(1).normal(size=20)
    found = [p_values(np.delete(values, i), values[i : i + 1])[0] for i in range(20)]
    np.testing.assert_allclose(sorted(found), np.arange(1, 21) / 20, rtol=1e-12)


def test_nan_has_no_p_value_and_infinity_the_least_or_largest():
    found = p_values(np.arange(9.0), np.array([np.nan, np.inf, -np.inf]))
    np.testing.assert_array_equal(found, [np.nan, 0.1, 1.0])


def test_p_values_are_those_of_another_implementation():
    nonconform = pytest.importorskip("nonconform.scoring")
    rng = np.random.default_rng(2)
    calibration, scores = rng.normal(size=50), rng.normal(1, 1, size=30)
    theirs = nonconform.calculate_p_val(scores, calibration)
    np.testing.assert_allclose(p_values(calibration, scores), theirs, rtol=1e-12)


@pytest.mark.parametrize(("alpha", "count"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.3, 3)])
def test_alpha_needs_as_many_images_as_the_message_says(alpha, count):
    require_alpha(alpha, count)
    with pytest.raises(PandaError, match=f"needs {count} calibration images or more, and there are {count - 1}"):
        require_alpha(alpha, count - 1)


def test_discoveries_are_those_of_scipy():
    rng = np.random.default_rng(3)
    for level in (0.05, 0.2):
        p = np.concatenate([rng.uniform(size=80), rng.uniform(0, 0.02, 20)])
        np.testing.assert_array_equal(benjamini_hochberg(p, level), false_discovery_control(p) <= level)
    assert not benjamini_hochberg(np.array([0.9, np.nan]), 0.1).any()
    assert benjamini_hochberg(np.array([0.04, np.nan]), 0.05).tolist() == [True, False]  # NaN was not tested
    assert not len(benjamini_hochberg(np.array([]), 0.1))


def test_fewer_than_discoverable_are_never_found():
    least = discoverable(100, 99, 0.1)
    assert least == 10
    p = np.ones(100)
    p[:least] = 1 / 100
    assert benjamini_hochberg(p, 0.1).sum() == least
    p[least - 1] = 1
    assert not benjamini_hochberg(p, 0.1).any()
