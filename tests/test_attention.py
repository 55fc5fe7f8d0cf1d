"""Attention: against plain loops, gradients against finite differences, memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ANY_ORDER
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from nvc_jax.models import uni_lvc
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


def dense(x, layer):
    layer = layer.get("dense", layer)
    return x @ layer["kernel"] + layer["bias"]


def depth_wise(x, layer):
    """[b, h, w, c], a window at a time, zeros beyond the border."""
    size = layer["kernel"].shape[0]
    padded = np.pad(x, ((0, 0), *2 * [(size // 2, size // 2)], (0, 0)))
    out = np.empty_like(x)
    for row, column in np.ndindex(x.shape[1:3]):
        window = padded[:, row : row + size, column : column + size]
        out[:, row, column] = (window * layer["kernel"]).sum((1, 2)) + layer["bias"]
    return out


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def moved(x, flow):
    """Groups of channels by flows of their own: bilinear, borders go on."""
    b, h, w, groups, _ = flow.shape
    parts, out = x.reshape(b, h, w, groups, -1), np.zeros((b, h, w, groups, x.shape[-1] // groups))
    for n, row, column, group in np.ndindex(b, h, w, groups):
        right, down = flow[n, row, column, group]
        x_at, y_at = np.clip(column + right, 0, w - 1), np.clip(row + down, 0, h - 1)
        for y, x in itertools.product(range(h), range(w)):
            share = max(0, 1 - abs(y_at - y)) * max(0, 1 - abs(x_at - x))
            out[n, row, column, group] += share * parts[n, y, x, group]
    return out.reshape(b, h, w, -1)


def shuffled(x):
    """Blocks of 2x2 as channels, in the order channel, row, column."""
    corners = [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return np.stack(corners, -1).reshape(*corners[0].shape[:3], -1)


def everywhere(query, tokens, p):
    """Steps 1 to 7 of the linear attention, at half of the resolution."""
    x, t = dense(shuffled(query), p["query_patch"]), dense(shuffled(tokens), p["token_patch"])
    q, gate = np.split(dense(x, p["query"]), 2, -1)
    k, v = np.split(dense(t, p["key_value"]), 2, -1)
    k = k + depth_wise(k, p["place"])
    b, h, w, c = q.shape
    heads = p["power"].shape
    parts = [(a / np.log1p(np.exp(p["temperature"]))).reshape(b, h * w, *heads) for a in (q, k)]
    parts = [a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) for a in parts]
    power = 1 + 4 * sigmoid(p["power"])
    out = linear(*parts, v.reshape(b, h * w, *heads), power).reshape(b, h, w, c)
    out = dense((out + depth_wise(v, p["near"])) * gate, p["subpixel"])
    unshuffled = np.empty((b, 2 * h, 2 * w, c))
    for row, column in np.ndindex(2, 2):
        unshuffled[:, row::2, column::2] = out[..., 2 * row + column :: 4]
    return unshuffled


def test_what_a_query_finds_in_a_reference_against_loops():
    """Neighbourhood and linear attention with all that surrounds them, at random weights."""
    cfg = uni_lvc.Config(**ANY_ORDER)
    lookup = uni_lvc.ReferenceLookup(cfg, jnp.float32)
    query, tokens = drawn(3, *[(2, 4, 6, cfg.tokens)] * 2)
    params = jax.eval_shape(lookup.init, jax.random.key(0), query, tokens)["params"]
    leaves, tree = jax.tree.flatten(params)
    p = tree.unflatten(np.float64(0.3) * x for x in drawn(4, *(leaf.shape for leaf in leaves)))

    joined = dense(np.concatenate([query, tokens], -1), p["align"]["join"])
    x = depth_wise(joined, p["align"]["depth"])
    flow = dense(x * sigmoid(4 * x), p["align"]["flow"]).reshape(2, 4, 6, cfg.groups, 2)
    found = moved(tokens, uni_lvc.REACH / 8 * np.tanh(flow))
    k, v = np.split(dense(found, p["key_value"]), 2, -1)
    heads = (2, 4, 6, cfg.heads, -1)
    parts = (a.astype(np.float64).reshape(heads) for a in (query, k, v))
    near = windowed(*parts, p["bias"]).reshape(query.shape)
    both = near + everywhere(query, tokens, p["linear"])
    gate = sigmoid(dense(np.concatenate([query, both], -1), p["gate"]))
    expected = (both.reshape(heads) * gate[..., None]).reshape(query.shape)

    params = jax.tree.map(np.float32, p)
    result = lookup.apply({"params": params}, query, tokens)
    np.testing.assert_allclose(result, expected, rtol=2e-3, atol=2e-3)
