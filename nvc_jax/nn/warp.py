"""Motion: backward warping, bilinear resampling by two, and sampling with many offsets.

Conventions (those of the published DCVC family): a flow is in pixels of the plane that it is
applied to, channel 0 horizontal, channel 1 vertical; position (x, y) of the result is the plane's
value at (x + u, y + v), bilinear between the four pixels around, coordinates outside the plane
moved to its border. Resampling is centred between pixels (half-pixel centres).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def warp(plane: jax.Array, flow: jax.Array) -> jax.Array:
    """Backward warp: [b, h, w, c] by a flow [b, h, w, 2] -> [b, h, w, c]."""
    return warp_groups(plane[..., None, :], flow[..., None, :])[..., 0, :]


@jax.custom_vjp
def warp_groups(plane: jax.Array, flow: jax.Array) -> jax.Array:
    """Backward warp of channel groups, each by flows of its own.

    Args:
      plane: [b, h, w, g, c].
      flow: float32 [b, h, w, n, 2], n a multiple of g: flow k moves group k modulo g.

    Returns:
      [b, h, w, n, c] in the dtype of `plane`.
    """
    near = _neighbours(plane.shape, flow)
    x, y = near.x.astype(plane.dtype), near.y.astype(plane.dtype)
    a, b, c, d = _gather(plane, near)
    return (a * (1 - x) + b * x) * (1 - y) + (c * (1 - x) + d * x) * y


class _Neighbours(NamedTuple):
    """Where the four pixels around every position are.

    Attributes:
      index: four of int32 [b, h * w * n], upper left, upper right, lower left, lower right: which
        row of plane.reshape(b, h * w * g, c).
      x, y: float32 [b, h, w, n, 1], the position between them, 0..1.
      inside: bool [b, h, w, n, 2], whether it moves with the flow's two values.
    """

    index: tuple[jax.Array, ...]
    x: jax.Array
    y: jax.Array
    inside: jax.Array


def _neighbours(shape: tuple[int, ...], flow: jax.Array) -> _Neighbours:
    _, h, w, g, _ = shape
    axes = (jnp.arange(n, dtype=jnp.float32) for n in (w, h))
    here = jnp.stack(jnp.meshgrid(*axes), -1)[:, :, None]
    last = jnp.array([w - 1, h - 1], jnp.float32)
    unbound = here + flow
    position = jnp.clip(unbound, 0, last)
    # The upper left of the four pixels; one that has all of them inside, also on the border.
    corner = jnp.clip(jnp.floor(position), 0, jnp.maximum(last - 1, 0))
    left, top = jnp.moveaxis(corner.astype(jnp.int32), -1, 0)
    group = jnp.arange(flow.shape[3], dtype=jnp.int32) % g

    def index(down, across):
        pixel = (top + min(down, h - 1)) * w + left + min(across, w - 1)
        return (pixel * g + group).reshape(len(flow), -1)

    x, y = jnp.split(position - corner, 2, -1)
    inside = (unbound >= 0) & (unbound <= last)
    return _Neighbours(tuple(index(i, j) for i in (0, 1) for j in (0, 1)), x, y, inside)


def _gather(plane: jax.Array, near: _Neighbours) -> list[jax.Array]:
    b, h, w, g, c = plane.shape
    rows = plane.reshape(b, h * w * g, c)
    take = jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))
    return [take(rows, index).reshape(*near.x.shape[:4], c) for index in near.index]


def _warp_forward(plane, flow):
    return warp_groups(plane, flow), (plane, flow)


def _warp_backward(saved, gradient):
    """Gradients of `warp_groups`, which XLA's own are several times as slow as on a CPU.

    One scatter-add in place of four, and a matrix product for the sums over channels, which the
    compiler would merge with the gathers into loops over single numbers.
    """
    plane, flow = saved
    batch, h, w, g, c = plane.shape
    near = _neighbours(plane.shape, flow)
    x, y = near.x.astype(plane.dtype), near.y.astype(plane.dtype)
    upper_left, upper_right, lower_left, lower_right = _gather(plane, near)
    along_x = (upper_right - upper_left) * (1 - y) + (lower_right - lower_left) * y
    along_y = (lower_left - upper_left) * (1 - x) + (lower_right - upper_right) * x
    sums = [
        jnp.dot(gradient * slope, jnp.ones(c, plane.dtype), precision=jax.lax.Precision.HIGHEST)
        for slope in (along_x, along_y)
    ]
    to_flow = jnp.where(near.inside, jnp.stack(sums, -1), 0).astype(flow.dtype)

    weights = [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y]
    parts = jnp.concatenate([(gradient * s).reshape(batch, -1, c) for s in weights], 1)
    add = jax.vmap(
        lambda index, parts: (
            jnp.zeros((h * w * g, c), plane.dtype).at[index].add(parts, mode="promise_in_bounds")
        )
    )
    return add(jnp.concatenate(near.index, 1), parts).reshape(plane.shape), to_flow


warp_groups.defvjp(_warp_forward, _warp_backward)


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
    rows = x[:, ::2] + x[:, 1::2]  # a reduction would be slower on CPUs
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4
