import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qc_compiler.extrapolation import polynomial_weights

# Steps at least 1 apart, as timesteps of a sampler are (in units of its smallest step).
spacings = st.lists(st.integers(1, 50), min_size=0, max_size=3)


def test_one_point_is_repeated():
    assert polynomial_weights([700.0], 600.0).tolist() == [1.0]


def test_two_points_extrapolate_in_a_straight_line():
    assert polynomial_weights([900.0, 1000.0], 850.0).tolist() == [1.5, -0.5]


def test_three_evenly_spaced_points_one_step_ahead():
    # Newton's forward formula: f(0) = 3 f(1) - 3 f(2) + f(3)
    assert polynomial_weights([1.0, 2.0, 3.0], 0.0).tolist() == [3.0, -3.0, 1.0]


def test_no_points_give_no_weights():
    assert polynomial_weights([], 1.0).shape == (0,)


@given(spacings, st.integers(1, 50), st.integers(-1000, 1000), st.lists(st.integers(-5, 5), min_size=4, max_size=4))
def test_exact_for_polynomials_of_degree_below_the_number_of_points(gaps, ahead, start, coefficients):
    known = (start + np.concatenate([[0], np.cumsum(gaps)])).astype(np.float64)
    at = float(start - ahead)
    polynomial = np.polynomial.Polynomial(coefficients[: len(known)], domain=[start - 50, start + 50])
    weights = polynomial_weights(known.tolist(), at).astype(np.float64)
    # float32 weights: each is off by at most 2⁻²⁴ of itself
    bound = 2.0**-23 * np.abs(weights * polynomial(known)).sum() + 1e-6
    assert abs(weights @ polynomial(known) - polynomial(at)) <= bound + 1e-9 * abs(polynomial(at))


@given(spacings, st.integers(1, 50))
def test_weights_sum_to_one(gaps, ahead):
    known = np.concatenate([[0.0], np.cumsum(gaps)]).tolist()
    weights = polynomial_weights(known, -float(ahead)).astype(np.float64)
    assert weights.sum() == pytest.approx(1.0, abs=1e-6 * np.abs(weights).sum())


@given(spacings, st.integers(0, 3))
def test_at_a_known_point_its_value_is_taken(gaps, index):
    known = np.concatenate([[0.0], np.cumsum(gaps)])
    index = min(index, len(known) - 1)
    assert polynomial_weights(known.tolist(), float(known[index])).tolist() == np.eye(len(known))[index].tolist()


def test_a_parabola_needs_three_points():
    """The bound is tight: with one point fewer the parabola is missed."""
    values = np.array([1.0, 4.0, 9.0])
    assert polynomial_weights([1.0, 2.0, 3.0], 0.0) @ values == 0.0
    assert polynomial_weights([1.0, 2.0], 0.0) @ values[:2] == -2.0
