"""Motion that nobody sends: where decoders find a picture again in one that they already have."""

import jax
import jax.numpy as jnp
from jax import lax

from nvc_jax.nn.warp import double, halve, warp

BLOCK = 8  # pixels for which one motion is found


def motion_between(
    picture: jax.Array,
    reference: jax.Array,
    search: tuple[tuple[int, int], ...],
    sharpness: jax.Array,
    inertia: jax.Array,
) -> jax.Array:
    """Flow from a picture to where a reference looks the same, from coarse to fine.

    A search of whole displacements for each block of `BLOCK` pixels, weighted by how well blocks
    and their surroundings agree, in place of the best: so it has gradients, finds parts of pixels,
    and does not jump where machines differ in the last bits.

    Args:
      picture, reference: float32 [b, h, w, 1], sides multiples of `BLOCK`.
      search: (scale, reach) of every level: pictures that are reduced by `scale` (1, 2, 4) are
        compared at up to `reach` of their pixels from where the level before ended.
      sharpness: [levels], logarithm of how much weight squared differences take away.
      inertia: [levels], how much weight each pixel of displacement takes away.

    Returns:
      float32 [b, h, w, 2], in pixels, as `nvc_jax.nn.warp.warp` takes it.
    """
    flow = None
    for (scale, reach), sharp, still in zip(search, jnp.exp(sharpness), inertia, strict=True):
        moved = reference if flow is None else warp(reference, flow)
        ours, theirs = _reduced(picture, scale)[..., 0], _reduced(moved, scale)[..., 0]
        # Or compilers would warp and reduce anew for every displacement.
        ours, theirs = lax.optimization_barrier((ours, theirs))
        errors = _smooth(block_errors(ours, theirs, reach, BLOCK // scale))
        places = _displacements(reach)
        logits = -sharp * errors - still * jnp.abs(places).sum(-1)
        step = jnp.dot(jax.nn.softmax(logits, -1), places, precision=lax.Precision.HIGHEST)
        for _ in range(3):
            step = double(step)
        flow = scale * step if flow is None else flow + scale * step
    return flow


def block_errors(picture: jax.Array, reference: jax.Array, reach: int, block: int) -> jax.Array:
    """Mean squared differences of blocks to a reference at all displacements.

    Args:
      picture, reference: [b, h, w], sides multiples of `block`. Beyond its border a reference goes
        on as it ends.
      reach: the largest displacement, in pixels.

    Returns:
      [b, h / block, w / block, (2 reach + 1)^2]: for every displacement, row by row, the error of
      the block at (x, y) to the reference at (x, y) + displacement. Only these numbers take
      memory: displaced references are looked at one after the other.
    """
    b, h, w = picture.shape
    padded = jnp.pad(reference, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    mean = jnp.full((block, 1), 1 / block**2, picture.dtype)

    @jax.checkpoint
    def error(place):
        row, column = jnp.divmod(place, 2 * reach + 1)
        apart = picture - lax.dynamic_slice(padded, (0, row, column), picture.shape)
        # Rows by additions, columns by a matrix product: one sum over both takes CPUs ten times as
        # long.
        rows = jnp.square(apart).reshape(b, h // block, block, w).sum(2)
        rows = rows.reshape(b, h // block, w // block, block)
        return jnp.dot(rows, mean, precision=lax.Precision.HIGHEST)[..., 0]

    errors = lax.map(error, jnp.arange((2 * reach + 1) ** 2))
    return jnp.moveaxis(errors, 0, -1)


def _displacements(reach: int) -> jax.Array:
    """float32 [(2 reach + 1)^2, 2]: horizontal and vertical, in the order of `block_errors`."""
    axis = jnp.arange(-reach, reach + 1, dtype=jnp.float32)
    rows, columns = jnp.meshgrid(axis, axis, indexing="ij")
    return jnp.stack([columns, rows], -1).reshape(-1, 2)


def _reduced(x: jax.Array, scale: int) -> jax.Array:
    while scale > 1:
        x, scale = halve(x), scale // 2
    return x


def _smooth(x: jax.Array) -> jax.Array:
    """Every position with a share of its eight neighbours: [b, h, w, c], binomial weights."""
    for axis in (1, 2):
        edges = [(0, 0)] * x.ndim
        edges[axis] = (1, 1)
        padded, size = jnp.pad(x, edges, mode="edge"), x.shape[axis]
        before, here, after = (lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))
        x = (before + 2 * here + after) / 4
    return x
