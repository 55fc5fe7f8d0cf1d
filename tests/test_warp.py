"""Warping and resampling: against plain loops, and gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.nn.flow import SpyNet
from nvc_jax.nn.warp import double, halve, warp, warp_groups


def sampled(plane: np.ndarray, x: float, y: float) -> np.ndarray:
    """plane [h, w, c] at a position, bilinear, positions outside moved to the border."""
    h, w, _ = plane.shape
    x, y = min(max(x, 0), w - 1), min(max(y, 0), h - 1)
    column, row = int(x), int(y)
    right, below = min(column + 1, w - 1), min(row + 1, h - 1)
    a, b = x - column, y - row
    upper = (1 - a) * plane[row, column] + a * plane[row, right]
    lower = (1 - a) * plane[below, column] + a * plane[below, right]
    return (1 - b) * upper + b * lower


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=20)  # every size is compiled
def test_warp_against_a_loop(height, width, seed):
    """Also far outside, exactly on pixels and borders, and for planes of one line."""
    rng = np.random.default_rng(seed)
    plane = rng.normal(size=(2, height, width, 3))
    flow = rng.choice([rng.normal(0, 3), 0.0, 1.0, -1.0, 0.5, 1e6, -1e6], (2, height, width, 2))
    ours = warp(jnp.float32(plane), jnp.float32(flow))
    for b, row, column in np.ndindex(2, height, width):
        u, v = flow[b, row, column]
        expected = sampled(plane[b], column + u, row + v)
        np.testing.assert_allclose(ours[b, row, column], expected, atol=1e-5)


def test_groups_have_flows_of_their_own():
    rng = np.random.default_rng(0)
    plane, flow = rng.normal(size=(1, 4, 5, 2, 3)), rng.normal(0, 2, (1, 4, 5, 6, 2))
    ours = warp_groups(jnp.float32(plane), jnp.float32(flow))
    for k in range(6):
        single = warp(jnp.float32(plane[..., k % 2, :]), jnp.float32(flow[..., k, :]))
        np.testing.assert_allclose(ours[..., k, :], single, atol=1e-6)


@pytest.mark.parametrize("argument", [0, 1])
def test_gradients_of_warping_against_finite_differences(argument):
    rng = np.random.default_rng(1)
    plane = rng.normal(size=(1, 5, 6, 2, 2)).astype(np.float32)
    # Away from pixel borders, where the derivative jumps.
    flow = (rng.integers(-3, 4, (1, 5, 6, 4, 2)) + rng.uniform(0.2, 0.8, (1, 5, 6, 4, 2))).astype(
        np.float32
    )
    weights = rng.normal(size=(1, 5, 6, 4, 2)).astype(np.float32)

    def total(plane, flow):
        return jnp.sum(warp_groups(plane, flow) * weights)

    arguments = [plane, flow]
    gradient = jax.grad(total, argument)(*arguments)
    direction = rng.normal(size=arguments[argument].shape).astype(np.float32)
    step = 1e-2
    around = [[a + s * step * direction if i == argument else a for i, a in enumerate(arguments)]
              for s in (1, -1)]  # fmt: skip
    expected = (total(*around[0]) - total(*around[1])) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3)


def test_flows_beyond_the_border_have_no_gradient():
    plane = jnp.float32(np.random.default_rng(2).normal(size=(1, 4, 4, 2)))
    gradient = jax.grad(lambda flow: warp(plane, flow).sum())(jnp.full((1, 4, 4, 2), 50.0))
    assert not gradient.any()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 5)])
def test_doubling_is_bilinear_between_pixel_centres(size):
    x = np.random.default_rng(3).normal(size=(2, *size, 3)).astype(np.float32)
    shape = (2, 2 * size[0], 2 * size[1], 3)
    expected = jax.image.resize(x, shape, "bilinear", antialias=False)
    np.testing.assert_allclose(double(jnp.asarray(x)), expected, atol=1e-6)


def test_halving_is_the_mean():
    x = np.random.default_rng(4).normal(size=(1, 6, 4, 2)).astype(np.float32)
    halved = np.asarray(halve(jnp.asarray(x)))
    assert halved.shape == (1, 3, 2, 2)
    np.testing.assert_allclose(halved[0, 2, 1], x[0, 4:6, 2:4].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(halve(double(jnp.asarray(x)))).mean(), x.mean(), atol=1e-6
    )


def test_flow_corrects_itself_from_coarse_to_fine():
    """A network that always says "one pixel to the right" ends at 8 + 4 + 2 + 1."""
    a = jnp.zeros((1, 16, 24, 3))
    net = SpyNet(widths=(4,), kernel=3)
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0), a, a))
    for level in params["params"].values():
        level["conv1"]["bias"] = jnp.array([1.0, 0.0])
    flow = net.apply(params, a, a)
    np.testing.assert_allclose(flow, np.broadcast_to([15.0, 0.0], flow.shape), atol=1e-5)
