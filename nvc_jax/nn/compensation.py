"""Motion compensation: a picture predicted from blocks of a reference that a motion field moves.

A field is int16 [batch, rows, columns, 3], see `nvc_jax.nn.motion`: for every block of 8x8 luma
samples a vector (down, across) in quarters of a luma sample, and whether the block is predicted at
all. Blocks that are not ("none") are mid-grey, which makes them intra coded.

Samples between samples come from an 8-tap windowed sinc, as in AVC and its successors, and blocks
overlap: each predicts twice its size, weighted by a window (Orchard and Sullivan 1994).

Per-pixel gathers are what makes warping slow on CPUs and TPUs alike. Here whole blocks are
gathered, one slice each with the margin that the filter needs, and then each is filtered on its
own, down and across. Compilers would filter down anew for every tap across, and across for each of
four overlapping blocks, so every stage is materialized. On a CPU at 352x288 that takes a quarter of
the time of interpolating the whole reference first.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax.nn.materialize import materialized, one_by_one
from nvc_jax.nn.warp import warp

PHASES = 4  # positions per sample, in each direction
TAPS = 8
BLANK = 0.5  # of blocks that nothing predicts
# Of a cell of features at 1/8 of the size, in the field's units.
CELL = 32


def interpolation_kernel() -> np.ndarray:
    """float32 [PHASES, TAPS]: weights of samples -3..4 for a position of 0, 1/4, 1/2, 3/4."""
    taps = np.arange(TAPS) - 3
    offsets = taps - np.arange(PHASES)[:, None] / PHASES
    kernel = np.sinc(offsets) * np.cos(np.pi * offsets / (TAPS + 1))
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


def window(block: int) -> np.ndarray:
    """float32 [2 block]: weight of a prediction from half a block before to half a block behind.

    Steeper than a triangle, and together with the neighbour's 1 everywhere.
    """
    near = 1 - np.abs(np.arange(2 * block) + 0.5 - block) / block
    return (near**2 / (near**2 + (1 - near) ** 2)).astype(np.float32)


def compensate(reference: jax.Array, field: jax.Array, overlap: bool = True) -> jax.Array:
    """Predicts a picture from a reference.

    Args:
      reference: float32 [b, h, w, c]: luma, or chroma at half size. Beyond its border it goes on as
        it ends.
      field: int16 [b, rows, columns, 3]; h / rows samples are a block (8 for luma, 4 for chroma,
        whose vectors are rounded to quarters of its samples).
      overlap: whether blocks reach over their neighbours.

    Returns:
      float32 [b, h, w, c]. Gradients flow to the reference only.
    """
    b, rows, columns, _ = field.shape
    block = reference.shape[1] // rows
    edge = block // 2 if overlap else 0
    vectors = _quarters(field[..., :2].astype(jnp.int32), block)
    # Channels first: rows of samples are what processors take at once.
    planes = reference.transpose(0, 3, 1, 2)
    take = partial(blocks_at, size=block + 2 * edge, edge=edge)
    blocks = one_by_one(take)(planes, vectors)
    used = (field[..., 2] > 0)[..., None, None, None]
    if overlap:
        shares = jnp.where(used, np.multiply.outer(window(block), window(block)), 0)
        cells = _overlapped(materialized(blocks * shares), block)
        cells /= jnp.maximum(_overlapped(shares, block), 1e-6)
        half = block // 2
        picture = _assembled(materialized(cells))[:, :, half:-half, half:-half]
    else:
        picture = _assembled(blocks)
    here = jnp.broadcast_to(used, (b, rows, columns, 1, block, block))
    return jnp.where(_assembled(here), picture, BLANK).transpose(0, 2, 3, 1)


def blocks_at(plane: jax.Array, vectors: jax.Array, size: int, edge: int = 0) -> jax.Array:
    """Blocks of one reference, filtered where they lie between samples.

    Args:
      plane: [c, h, w].
      vectors: int32 [rows, columns, 2], in quarters of a sample.
      size: of blocks, which begin `edge` samples before their place.

    Returns:
      [rows, columns, c, size, size].
    """
    c, *sides = plane.shape
    rows, columns, _ = vectors.shape
    margin, step = size + TAPS, size - 2 * edge  # further out nothing changes
    before, behind = margin + TAPS // 2 - 1, margin + TAPS // 2
    plane = jnp.pad(plane, ((0, 0), (before, behind), (before, behind)), mode="edge")
    grid = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1)
    places = step * grid - edge + (vectors >> 2)
    places = (jnp.clip(places, -margin, jnp.array(sides) + TAPS) + margin).reshape(-1, 2)
    places = materialized(places)
    taps = jnp.asarray(interpolation_kernel())[vectors & 3].reshape(-1, 2, TAPS)
    taps = materialized(taps)[..., None, None, None]

    def take(place):
        return lax.dynamic_slice(plane, (0, *place), (c, size + TAPS - 1, size + TAPS - 1))

    blocks = materialized(jax.vmap(take)(places))
    blocks = sum(blocks[:, :, k : k + size] * taps[:, 0, k] for k in range(TAPS))
    blocks = materialized(blocks)
    blocks = sum(blocks[..., k : k + size] * taps[:, 1, k] for k in range(TAPS))
    return blocks.reshape(rows, columns, c, size, size)


def compensate_features(features: jax.Array, field: jax.Array) -> jax.Array:
    """Features at 1/8 of the size [b, h/8, w/8, c], moved likewise, bilinear; 0 where none."""
    flow = field[..., 1::-1].astype(jnp.float32) / CELL
    return jnp.where(field[..., 2:] > 0, warp(features, flow), 0)


def compensate_cells(memory: jax.Array, field: jax.Array) -> jax.Array:
    """A memory of integers at 1/8 of the size [b, h/8, w/8, c], moved by whole cells; 0 where none.

    The same on every machine: nothing is interpolated.
    """
    _, rows, columns, _ = memory.shape
    whole = (field[..., :2].astype(jnp.int32) + CELL // 2) // CELL
    row = jnp.clip(jnp.arange(rows)[:, None] + whole[..., 0], 0, rows - 1)
    column = jnp.clip(jnp.arange(columns) + whole[..., 1], 0, columns - 1)
    moved = jax.vmap(lambda m, r, c: m[r, c])(memory, row, column)
    return jnp.where(field[..., 2:] > 0, moved, jnp.zeros((), memory.dtype))


def _quarters(vectors: jax.Array, block: int) -> jax.Array:
    """Vectors in quarters of a sample of a plane with blocks of this size, rounded half up."""
    coarser = 8 // block
    return (vectors + coarser // 2) // coarser


def _assembled(blocks: jax.Array) -> jax.Array:
    """[b, rows, columns, c, n, n] -> [b, c, rows * n, columns * n]."""
    b, rows, columns, c, n, _ = blocks.shape
    return blocks.transpose(0, 3, 1, 4, 2, 5).reshape(b, c, rows * n, columns * n)


def _overlapped(blocks: jax.Array, block: int) -> jax.Array:
    """Sums predictions [b, rows, columns, c, 2 block, 2 block] where they overlap.

    In a grid moved by half a block, every cell gets one quadrant of each of four blocks.
    """
    cells = 0.0
    for down, across in np.ndindex(2, 2):
        first = blocks[..., down * block : (down + 1) * block, :]
        quadrant = first[..., across * block : (across + 1) * block]
        place = ((0, 0), (down, 1 - down), (across, 1 - across), (0, 0), (0, 0), (0, 0))
        cells += jnp.pad(quadrant, place)
    return cells
