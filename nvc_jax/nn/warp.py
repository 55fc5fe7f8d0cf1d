"""Motion: backward warping, bilinear resampling by two, and sampling with many offsets.

Conventions (those of the published DCVC family): a flow is in pixels of the plane that it is
applied to, channel 0 horizontal, channel 1 vertical; position (x, y) of the result is the plane's
value at (x + u, y + v), bilinear between the four pixels around, coordinates outside the plane
moved to its border. Resampling is centred between pixels (half-pixel centres).
"""

import jax
import jax.numpy as jnp


def warp(plane: jax.Array, flow: jax.Array) -> jax.Array:
    """Backward warp: [b, h, w, c] by a flow [b, h, w, 2] -> [b, h, w, c]."""
    return warp_groups(plane[..., None, :], flow[..., None, :])[..., 0, :]


def warp_groups(plane: jax.Array, flow: jax.Array) -> jax.Array:
    """Backward warp of channel groups, each by flows of its own.

    Args:
      plane: [b, h, w, g, c].
      flow: float32 [b, h, w, n, 2], n a multiple of g: flow k moves group k modulo g.

    Returns:
      [b, h, w, n, c] in the dtype of `plane`.
    """
    b, h, w, g, c = plane.shape
    n = flow.shape[3]
    column = jnp.clip(jnp.arange(w, dtype=jnp.float32)[:, None] + flow[..., 0], 0, w - 1)
    row = jnp.clip(jnp.arange(h, dtype=jnp.float32)[:, None, None] + flow[..., 1], 0, h - 1)
    # The upper left of the four pixels; one that has all of them inside, also on the border.
    left = jnp.clip(jnp.floor(column), 0, max(w - 2, 0))
    top = jnp.clip(jnp.floor(row), 0, max(h - 2, 0))
    right_share = (column - left).astype(plane.dtype)[..., None]
    lower_share = (row - top).astype(plane.dtype)[..., None]
    left, top = left.astype(jnp.int32), top.astype(jnp.int32)

    pixels = plane.reshape(b, h * w * g, c)
    group = jnp.arange(n, dtype=jnp.int32) % g

    def pixel(down, across):
        index = ((top + min(down, h - 1)) * w + left + min(across, w - 1)) * g + group
        taken = jax.vmap(lambda p, i: p.at[i].get(mode="promise_in_bounds"))(
            pixels, index.reshape(b, -1)
        )
        return taken.reshape(b, h, w, n, c)

    upper = pixel(0, 0) * (1 - right_share) + pixel(0, 1) * right_share
    lower = pixel(1, 0) * (1 - right_share) + pixel(1, 1) * right_share
    return upper * (1 - lower_share) + lower * lower_share


def double(x: jax.Array) -> jax.Array:
    """Bilinear upsampling by two: [b, h, w, c] -> [b, 2h, 2w, c]. A flow's values stay."""

    def along(axis, x):
        n = x.shape[axis]
        before = jnp.concatenate(
            [
                jax.lax.slice_in_dim(x, 0, 1, axis=axis),
                jax.lax.slice_in_dim(x, 0, n - 1, axis=axis),
            ],
            axis,
        )
        after = jnp.concatenate(
            [
                jax.lax.slice_in_dim(x, 1, n, axis=axis),
                jax.lax.slice_in_dim(x, n - 1, n, axis=axis),
            ],
            axis,
        )
        pair = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        return pair.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])

    return along(2, along(1, x))


def halve(x: jax.Array) -> jax.Array:
    """Means of 2x2 pixels: [b, h, w, c], even sides -> [b, h/2, w/2, c]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
