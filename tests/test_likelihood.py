"""Rate estimates: against an independent reference, and against what coding really costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nvc_jax.entropy import likelihood
from nvc_jax.entropy.freeze import TABLES, TOTAL, factorized_tables
from nvc_jax.entropy.likelihood import PROBABILITY_MIN, SCALE_MIN


def test_gaussian_bits_against_scipy():
    value = np.linspace(-60, 60, 481)[:, None]
    scale = np.array([-3.0, 0.0, 0.05, 0.11, 0.2, 0.5, 1, 3, 10, 50])
    tail = stats.norm(scale=np.maximum(scale, SCALE_MIN)).sf
    probability = tail(abs(value) - 0.5) - tail(abs(value) + 0.5)
    expected = -np.log2(np.maximum(probability, PROBABILITY_MIN))
    bits = likelihood.gaussian_bits(np.float32(value), np.float32(scale))
    np.testing.assert_allclose(bits, expected, rtol=2e-3, atol=2e-5)
    assert bits.max() <= -np.log2(PROBABILITY_MIN) + 1e-3


def test_laplace_bits_against_scipy():
    value = np.linspace(-60, 60, 481)[:, None]
    scale = np.array([-3.0, 0.0, 0.005, 0.01, 0.1, 0.5, 1, 3, 10, 50])
    used = np.maximum(scale, likelihood.LAPLACE_SCALE_MIN)
    probability = stats.laplace(scale=used).cdf(-abs(value) + 0.5)
    probability -= stats.laplace(scale=used).cdf(-abs(value) - 0.5)
    expected = -np.log2(np.maximum(probability, PROBABILITY_MIN))
    bits = likelihood.laplace_bits(np.float32(value), np.float32(scale))
    np.testing.assert_allclose(bits, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("family", likelihood.BITS)
def test_published_estimates_count_no_symbol_more_than_17_bits(family):
    """They add 1e-5 to every probability and let scales fall to 1e-5."""
    bits = likelihood.BITS[family]
    value, scale = np.float32([0, 1, 3, 40]), np.float32([1e-6, 0.01, 1, 2])
    p = 2.0 ** -np.asarray(bits(value, np.maximum(scale, 0.11)), np.float64)
    published = bits(value, scale, as_published=True)
    assert published.min() >= 0 and published.max() <= -np.log2(1e-5)
    np.testing.assert_allclose(published[2:], -np.log2(p[2:] + 1e-5), rtol=1e-4)
    assert published[0] == 0 and published[1] == pytest.approx(-np.log2(1e-5), rel=1e-4)


@pytest.mark.parametrize("bits_of", likelihood.BITS.values())
def test_bits_have_finite_gradients_everywhere(bits_of):
    value, scale = jnp.meshgrid(
        jnp.array([-1e6, -40.0, -0.5, 0.0, 0.5, 3.0, 1e6]), jnp.array([-1e3, 0.0, 0.11, 1.0, 1e4])
    )
    total = lambda v, s: bits_of(v, s).sum()  # noqa: E731
    for gradient in jax.grad(total, (0, 1))(value, scale):
        assert jnp.isfinite(gradient).all()
    # A scale that is too small for its value is pushed up, even from below the bound.
    assert jax.grad(bits_of, 1)(0.9, 0.005) < 0
    assert jax.grad(bits_of, 1)(0.0, 0.005) == 0


def frozen_bits(tables, number: int):
    """(values, probabilities, bits) of a table, without the escape."""
    size = tables.size[number]
    p = np.diff(tables.cdf[number].astype(np.int64))[: size - 1] / TOTAL
    return tables.offset[number] + np.arange(size - 1), p, -np.log2(p)


@pytest.mark.parametrize("family", likelihood.BITS)
@pytest.mark.parametrize("scale", [0.12, 0.5, 2.0, 25.0])
def test_bits_are_what_the_frozen_tables_cost(scale, family):
    values, p, bits = frozen_bits(TABLES[family](np.array([scale])), 0)
    estimate = likelihood.BITS[family](np.float32(values), np.float32(scale))
    # Wide Laplacian tables have long tails, of entries that each take one count at least.
    assert abs(p @ (estimate - bits)) < (1e-3 if family == "gaussian" else 5e-3)
    likely = p > 500 / TOTAL
    np.testing.assert_allclose(estimate[likely], bits[likely], atol=5e-3)


@pytest.mark.parametrize("seed", range(4))
def test_factorized_bits_are_what_the_frozen_tables_cost(seed):
    rng = np.random.default_rng(seed)
    chain = np.float32(rng.normal(0, 0.5, (6, 11)) + np.repeat([0.5, 0.0], [4, 7]))
    tables = factorized_tables(chain.astype(np.float64))
    z = np.broadcast_to(np.arange(-100, 101)[:, None], (1, 1, 201, 6)).astype(np.float32)
    estimates = np.asarray(likelihood.factorized_bits(z, chain[None]))[0, 0]
    for number in range(len(chain)):
        values, p, bits = frozen_bits(tables, number)
        estimate = estimates[values + 100, number]
        assert abs(p @ (estimate - bits)) < 1e-3
        likely = p > 500 / TOTAL
        np.testing.assert_allclose(estimate[likely], bits[likely], atol=5e-3)


def test_each_image_of_a_batch_has_its_own_prior():
    rng = np.random.default_rng(0)
    chain = np.float32(rng.normal(0, 0.5, (2, 3, 11)))
    z = np.float32(rng.normal(0, 3, (2, 4, 5, 3)))
    both = likelihood.factorized_bits(z, chain)
    for i in range(2):
        np.testing.assert_allclose(
            likelihood.factorized_bits(z[i : i + 1], chain[i : i + 1])[0], both[i], rtol=1e-6
        )


def test_lists_cost_what_it_takes_to_say_which_elements_are_on_them():
    level = np.full((2, 10, 10, 10), 20.5)
    level[0, 0, 0] += [0.5, -0.4999, 0, 0, 0, 0.4999, 0, 0, 0, 0]
    level[1] = [1.0001, 70] * 5  # below what is coded, and above the last level
    scale = jnp.float32(likelihood.SCALE_MIN * np.exp(level * likelihood.LEVEL_STEP))
    bits = likelihood.list_bits(scale, 2e-3)
    share = 0.003
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    np.testing.assert_allclose(bits, [1000 * entropy, 0], rtol=1e-3)


numbers = st.integers(-80, 80).map(lambda n: n / 8)


@given(numbers, numbers, st.sampled_from([-2.0, 3.0]))
def test_lower_bound_lets_gradients_lift_what_is_too_low(x, bound, slope):
    value, gradient = jax.value_and_grad(lambda x: slope * likelihood.lower_bound(x, bound))(x)
    assert value == slope * max(x, bound)
    # A step against a negative gradient makes x larger.
    assert gradient == (slope if x >= bound or slope < 0 else 0)


def test_rounding_goes_straight_through():
    x = jnp.array([-1.5, -0.5, 0.4999, 0.5, 1.5, 2.5, 1e6 + 0.5])
    np.testing.assert_array_equal(likelihood.round_straight_through(x), np.round(x))
    gradient = jax.grad(lambda x: (3 * likelihood.round_straight_through(x)).sum())(x)
    np.testing.assert_array_equal(gradient, np.full(7, 3.0))
