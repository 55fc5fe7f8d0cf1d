"""Attention of a picture's features to those of another one, at a cost linear in pixels.

Two kinds that complement each other: a window around every position, for detail, and all positions
at once without a softmax, for what the window does not reach. What belongs to their modules
(projections, gates) stands with the codecs that use them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def neighbourhood_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax attention of every position to a window of keys around it.

    Neighbourhood attention (arXiv 2204.07143), but keys outside of the plane are left out; there,
    windows at borders are pushed inwards.

    Args:
      q, k, v: [b, h, w, heads, d].
      bias: [heads, n, n], n odd: added to the logits by the key's place in the window.

    Returns:
      [b, h, w, heads, d]: means of v, weighted by the softmax of q k / sqrt(d) + bias.

    The windows are never taken apart: each of the n * n displacements is a pass over the shifted
    plane, which leaves one number per head behind. So memory is that of h w heads n^2 weights, and
    not of n^2 copies of the features; gradients are written out to keep it so.
    """
    return _attend(q, k, v, bias)[0]


def _attend(q, k, v, bias):
    weights = jax.nn.softmax(_logits(q, k, bias), 0)

    def add(total, step):
        weight, place = step
        return total + weight[..., None] * _shifted(v_padded, place, v.shape), None

    v_padded = _padded(v, bias)
    total, _ = lax.scan(add, jnp.zeros_like(v), (weights.astype(v.dtype), _places(bias)))
    return total, weights


def _logits(q, k, bias):
    """float32 [n * n, b, h, w, heads], -inf where there is no key."""
    padded = _padded(k, bias)
    there = _padded(jnp.ones((1, *k.shape[1:3], 1, 1), bool), bias)
    q = q * q.shape[-1] ** -0.5

    def one(_, step):
        bias, place = step
        logit = _dot(q, _shifted(padded, place, k.shape)).astype(jnp.float32) + bias
        inside = _shifted(there, place, there.shape[:1] + k.shape[1:3] + (1, 1))[..., 0]
        return None, jnp.where(inside, logit, -jnp.inf)

    by_place = jnp.moveaxis(bias.reshape(bias.shape[0], -1), 0, 1).astype(jnp.float32)
    return lax.scan(one, None, (by_place, _places(bias)))[1]


def _places(bias):
    """int32 [n * n, 2]: row and column of every displacement, counted from the window's corner."""
    n = bias.shape[-1]
    return jnp.stack(jnp.divmod(jnp.arange(n * n), n), -1)


def _padded(x, bias):
    reach = bias.shape[-1] // 2
    return jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0), (0, 0)))


def _shifted(padded, place, shape):
    return lax.dynamic_slice(padded, (0, place[0], place[1], 0, 0), shape)


def _dot(a, b):
    """Sums of products over the last axis: a matrix product, which CPUs add up fastest."""
    ones = jnp.ones((a.shape[-1], 1), a.dtype)
    return jnp.dot(a * b, ones, precision=lax.Precision.HIGHEST)[..., 0]


def _attend_forward(q, k, v, bias):
    out, weights = _attend(q, k, v, bias)
    return out, (q, k, v, bias, weights)


def _attend_backward(saved, gradient):
    q, k, v, bias, weights = saved
    scale = q.shape[-1] ** -0.5
    places = _places(bias)

    def through_values(to_v, step):
        weight, place = step
        start = (0, place[0], place[1], 0, 0)
        here = lax.dynamic_slice(to_v, start, v.shape) + weight[..., None] * gradient
        slope = _dot(gradient, _shifted(v_padded, place, v.shape))
        return lax.dynamic_update_slice(to_v, here, start), slope

    v_padded = _padded(v, bias)
    to_v, slopes = lax.scan(
        through_values, jnp.zeros_like(v_padded), (weights.astype(v.dtype), places)
    )
    slopes = slopes.astype(jnp.float32)
    to_logits = weights * (slopes - (weights * slopes).sum(0))

    def through_logits(carry, step):
        to_q, to_k = carry
        slope, place = step
        start = (0, place[0], place[1], 0, 0)
        to_q = to_q + slope[..., None] * _shifted(k_padded, place, k.shape)
        here = lax.dynamic_slice(to_k, start, k.shape) + slope[..., None] * q
        return (to_q, lax.dynamic_update_slice(to_k, here, start)), None

    k_padded = _padded(k, bias)
    (to_q, to_k), _ = lax.scan(
        through_logits,
        (jnp.zeros_like(q), jnp.zeros_like(k_padded)),
        ((scale * to_logits).astype(q.dtype), places),
    )
    reach, (h, w) = bias.shape[-1] // 2, k.shape[1:3]
    inner = (slice(None), slice(reach, reach + h), slice(reach, reach + w))
    to_bias = jnp.moveaxis(to_logits.sum((1, 2, 3)), 0, 1).reshape(bias.shape)
    return to_q, to_k[inner], to_v[inner], to_bias.astype(bias.dtype)


neighbourhood_attention.defvjp(_attend_forward, _attend_backward)


def polarity_attention(q: jax.Array, k: jax.Array, v: jax.Array, power: jax.Array) -> jax.Array:
    """Linear attention to all keys that keeps apart agreement in sign and opposition.

    PolaFormer (arXiv 2501.15061): positive and negative parts are raised to learned powers, which
    sharpens them as a softmax would. Products of equal signs weigh the first half of the values,
    those of opposite signs the second.

    Args:
      q: [b, n, heads, d]; k, v: [b, m, heads, d], d even.
      power: [heads, d], at least 1.

    Returns:
      [b, n, heads, d]. All sums go over m first, so the cost is that of (n + m) heads 2 d^2.
    """
    einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def parts(x):
        return _power(x, power), _power(-x, power)

    agree, oppose = parts(q)
    keys = jnp.concatenate(parts(k), -1)
    means = einsum("bmhe,bmhf->bhef", keys, v) / k.shape[1]
    norm = keys.mean(1)
    results = []
    halves = jnp.split(means, 2, -1)
    for pair, mean in zip(((agree, oppose), (oppose, agree)), halves, strict=True):
        query = jnp.concatenate(pair, -1)
        weight = einsum("bnhe,bhe->bnh", query, norm) + 1e-6
        results.append(einsum("bnhe,bhef->bnhf", query, mean) / weight[..., None])
    return jnp.concatenate(results, -1)


def _power(x, power):
    """max(x, 0)^power. Where that is 0, so are the gradients; those of `**` would not be finite."""
    positive = x > 0
    return jnp.where(positive, jnp.where(positive, x, 1.0) ** power, 0.0)
