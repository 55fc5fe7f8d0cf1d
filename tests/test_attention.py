"""Attention: against plain loops, gradients against finite differences, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from nvc_jax.nn.attention import neighbourhood_attention, polarity_attention

HEADS, DEPTH = 2, 4


def windowed(q, k, v, bias):
    """`neighbourhood_attention` one position and key at a time."""
    b, h, w, heads, d = q.shape
    reach = bias.shape[-1] // 2
    out = np.zeros_like(q)
    for n, row, column, head in np.ndindex(b, h, w, heads):
        logits, values = [], []
        for i in range(max(0, row - reach), min(h, row + reach + 1)):
            for j in range(max(0, column - reach), min(w, column + reach + 1)):
                place = bias[head, i - row + reach, j - column + reach]
                logits.append(q[n, row, column, head] @ k[n, i, j, head] / np.sqrt(d) + place)
                values.append(v[n, i, j, head])
        weights = np.exp(np.array(logits) - np.max(logits))
        out[n, row, column, head] = weights @ np.array(values) / weights.sum()
    return out


def linear(q, k, v, power):
    """`polarity_attention` with all weights written out."""
    b, n, heads, d = q.shape
    out = np.zeros_like(q)
    for i, head in np.ndindex(b, heads):
        for at in range(n):
            totals, norms = np.zeros(d), np.zeros(2)
            for key, value in zip(k[i, :, head], v[i, :, head], strict=True):
                p = power[head]
                a, b_ = (np.maximum(s * q[i, at, head], 0) ** p for s in (1, -1))
                c, e = (np.maximum(s * key, 0) ** p for s in (1, -1))
                same, opposite = a @ c + b_ @ e, a @ e + b_ @ c
                totals[: d // 2] += same * value[: d // 2]
                totals[d // 2 :] += opposite * value[d // 2 :]
                norms += same, opposite
            means = norms / k.shape[1]
            out[i, at, head] = totals / k.shape[1] / (np.repeat(means, d // 2) + 1e-6)
    return out


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@given(st.integers(1, 6), st.integers(1, 7), st.sampled_from([1, 3, 5]), st.integers(0, 99))
@settings(max_examples=15)  # every size is compiled
def test_windows_against_a_loop(height, width, window, seed):
    """Also in planes that are smaller than the window."""
    shape = (2, height, width, HEADS, DEPTH)
    arrays = drawn(seed, shape, shape, shape, (HEADS, window, window))
    np.testing.assert_allclose(
        neighbourhood_attention(*arrays), windowed(*arrays), rtol=1e-4, atol=1e-5
    )


def test_windows_have_gradients():
    shape = (1, 4, 5, HEADS, DEPTH)
    arrays = drawn(1, shape, shape, shape, (HEADS, 3, 3))
    check_grads(neighbourhood_attention, arrays, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=15)
def test_linear_attention_against_a_loop(queries, keys, seed):
    q, k, v = drawn(seed, *((2, n, HEADS, DEPTH) for n in (queries, keys, keys)))
    power = np.random.default_rng(seed).uniform(1, 5, (HEADS, DEPTH)).astype(np.float32)
    expected = linear(*(a.astype(np.float64) for a in (q, k, v, power)))
    np.testing.assert_allclose(polarity_attention(q, k, v, power), expected, rtol=2e-3, atol=1e-4)


def test_linear_attention_has_gradients_also_where_nothing_is_positive():
    q, k, v = drawn(2, *[(1, 5, HEADS, DEPTH)] * 3)
    power = np.full((HEADS, DEPTH), 3.0, np.float32)
    check_grads(polarity_attention, (q, k, v, power), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
    slopes = jax.grad(lambda *a: polarity_attention(*a).sum(), (0, 1, 2, 3))(0 * q, k, v, power)
    assert all(np.isfinite(s).all() for s in slopes)


@pytest.mark.parametrize("differentiate", [False, True])
def test_windows_do_not_copy_the_features(differentiate):
    """Memory beside arguments and results is that of the weights and a few planes, not of 25."""
    shape = (1, 32, 32, 4, 32)
    plane = 4 * int(np.prod(shape))
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape, shape, (4, 5, 5))]
    function = neighbourhood_attention
    if differentiate:
        function = jax.grad(lambda *a: neighbourhood_attention(*a).sum(), (0, 1, 2, 3))
    used = jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert used < (12 if differentiate else 6) * plane, used / plane
