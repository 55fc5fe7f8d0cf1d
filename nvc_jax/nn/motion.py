"""Motion fields: what a unit says about where its blocks are found in a reference.

A field is int16 [batch, blocks down, blocks across, 3]: down and across in units of 1/`PRECISION`
pixel, and 1; or 0, 0, 0 for "none", a block that is predicted from nothing.
`nvc_jax.entropy.motion` codes fields.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nvc_jax.entropy import motion as coder
from nvc_jax.entropy.motion import CLASSES, ROOT, SPREADS

BLOCK = 8  # pixels that share a vector, in each direction
PRECISION = 4  # vector units per pixel
MAX_VECTOR = coder.MAX_VECTOR  # of each component, in vector units

_BEYOND = 1 << 14  # no value of a field
_END_BITS = 5  # how many more a coded field has than its decisions, on average
# Bits of each context's decision: [0 or 1, contexts].
_COST = -np.log2([1 - coder.INITIAL / 256, coder.INITIAL / 256]).astype(np.float32)


def _class_costs() -> np.ndarray:
    """float32 [kinds, spreads, classes]: bits of differences, with sign and remainder."""
    zero, other = _COST[:, coder.OTHER : coder.OTHER + 3 * SPREADS].reshape(2, 3, SPREADS, 1)
    stop, on = _COST[:, coder.CLASS :].reshape(2, SPREADS, CLASSES - 2)
    before = np.cumsum(np.pad(on, ((0, 0), (1, 0))), 1)
    raw = np.arange(1, CLASSES)  # the sign and all bits below the leading one
    return np.concatenate([zero, other + before + np.pad(stop, ((0, 0), (0, 1))) + raw], -1)


def _which_costs() -> np.ndarray:
    """float32 [5, 5]: bits of choosing a candidate, by their number and its place."""
    costs = np.zeros((5, 5), np.float32)
    for count in range(2, 5):
        first = coder.WHICH + (count - 1) * (count - 2) // 2
        for place in range(count):
            costs[count, place] = _COST[1, first : first + place].sum()
            if place < count - 1:
                costs[count, place] += _COST[0, first + place]
    return costs


_CLASS_COSTS, _WHICH_COSTS = _class_costs(), _which_costs()


def is_alone(field: np.ndarray | jax.Array | None) -> bool:
    """Whether a picture is predicted from nothing at all, as after a scene cut.

    Args:
      field: int16 [..., blocks down, blocks across, 3]; None: it has no references.
    """
    return field is None or not np.asarray(field)[..., 2].any()


def field_bits(field: jax.Array) -> jax.Array:
    """About how many bits the coded field has: its syntax under probabilities that do not adapt.

    Args:
      field: int16 [batch, blocks down, blocks across, 3].

    Returns:
      float32 [batch], without gradients.
    """
    batch, down, across, _ = field.shape
    field = jnp.asarray(field, jnp.int32)
    edges = ((0, 0), (0, -down % ROOT), (0, -across % ROOT), (0, 0))
    # Equal in all that is within the picture, for nodes of 1, 2, 4 and 8 blocks.
    low = jnp.pad(field, edges, constant_values=_BEYOND)
    high = jnp.pad(field, edges, constant_values=-_BEYOND)
    uniform = [jnp.ones(low.shape[:3], bool)]
    for _ in range(3):
        low, high = -_largest(-low), _largest(high)
        uniform.append((low >= high).all(-1))
    rows, columns = uniform[0].shape[1:]
    inside = (np.arange(rows) < down)[:, None] & (np.arange(columns) < across)
    reached, leaves = jnp.ones_like(uniform[3]), [jnp.zeros(())] * 4
    sizes, flags = jnp.zeros(uniform[0].shape, jnp.int32), [jnp.zeros(())] * 4
    for level in (3, 2, 1, 0):
        size = 1 << level
        reached &= inside[::size, ::size]
        leaves[level], flags[level] = reached & uniform[level], reached
        sizes += size * _spread_out(leaves[level], size)
        reached = _spread_out(reached & ~uniform[level], 2)
    # To look at neighbours: a row above, a column on the left, a node on the right.
    frame = ((0, 0), (1, 0), (1, ROOT))
    sizes = jnp.pad(sizes, frame)
    blocks = jnp.pad(field, (*edges[:1], (1, edges[1][1]), (1, edges[2][1] + ROOT), (0, 0)))
    bits = jnp.full(batch, _END_BITS, jnp.float32)
    for level in range(4):
        costs = jnp.where(leaves[level], _leaf_bits(blocks, level, across), 0)
        if level:
            costs += jnp.where(
                flags[level] & _has_flag(rows, columns, level, down, across),
                _split_bits(sizes, uniform[level], level),
                0,
            )
        bits += costs.sum((1, 2))
    return jax.lax.stop_gradient(bits)


def _largest(x: jax.Array) -> jax.Array:
    """Of each 2 x 2 positions: [b, h, w, c] to [b, h / 2, w / 2, c]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def _spread_out(x: jax.Array, size: int) -> jax.Array:
    return jnp.repeat(jnp.repeat(x, size, 1), size, 2)


def _around(x: jax.Array, level: int) -> tuple[jax.Array, ...]:
    """What is at each node's first block, to its left, above it, and above on its right.

    `x` has a row more above, a column more on the left and `ROOT` more on the right.
    """
    size = 1 << level
    across = x.shape[2] - ROOT - 1
    here = x[:, 1::size, 1 : 1 + across : size]
    left = x[:, 1::size, 0:across:size]
    up = x[:, :-1:size, 1 : 1 + across : size]
    up_right = x[:, :-1:size, 1 + size : 1 + size + across : size]
    return here, left, up, up_right


def _has_flag(rows: int, columns: int, level: int, down: int, across: int) -> np.ndarray:
    """Nodes with more than one block within the picture."""
    size = 1 << level
    height = np.minimum(size, down - np.arange(0, rows, size))
    width = np.minimum(size, across - np.arange(0, columns, size))
    return height[:, None] * width > 1


def _split_bits(sizes: jax.Array, uniform: jax.Array, level: int) -> jax.Array:
    _, left, up, _ = _around(sizes, level)
    size = 1 << level
    smaller = ((left > 0) & (left < size)).astype(int) + ((up > 0) & (up < size))
    first = coder.SPLIT + 3 * (level - 1)
    return jnp.asarray(_COST[:, first : first + 3])[(~uniform).astype(int), smaller]


def _leaf_bits(blocks: jax.Array, level: int, across: int) -> jax.Array:
    """Bits of each node as a leaf, without split flags: float32 [b, nodes down, nodes across]."""
    here, *near = _around(blocks, level)
    size, (rows, columns) = 1 << level, here.shape[1:3]
    y, x = np.arange(rows)[:, None], np.arange(columns)
    up_right = _up_right_coded(y, x, ROOT // size) & (size * (x + 1) < across)
    coded = x > 0, y > 0, up_right
    moved = [(b[..., 2] == 1) & c for b, c in zip(near, coded, strict=True)]
    none = sum(((b[..., 2] == 0) & c).astype(int) for b, c in zip(near[:2], coded, strict=False))
    first = coder.MOVED + 3 * level
    bits = jnp.asarray(_COST[:, first : first + 3])[here[..., 2], none]

    near, here_moved, here = [b[..., :2] for b in near], here[..., 2] == 1, here[..., :2]
    first = jnp.zeros_like(here)
    for vector, exists in zip(near[::-1], moved[::-1], strict=True):
        first = jnp.where(exists[..., None], vector, first)
    near = [jnp.where(m[..., None], b, first) for b, m in zip(near, moved, strict=True)]
    stack = jnp.sort(jnp.stack(near), 0)
    median, apart = stack[1], stack[2] - stack[0]

    found, count, place = jnp.zeros(moved[0].shape, bool), 0, 0
    kept = []
    for vector, exists in zip(
        [median, *near], [moved[0] | moved[1] | moved[2], *moved], strict=True
    ):
        new = exists
        for other, valid in kept:
            new &= ~(valid & (other == vector).all(-1))
        kept.append((vector, new))
        count = count + new.astype(int)
        found |= new & (vector == here).all(-1)
        place = place + (~found & new).astype(int)
    flag = jnp.where(count > 0, jnp.asarray(_COST[:, coder.MERGE + level])[found.astype(int)], 0)
    choice = jnp.asarray(_WHICH_COSTS)[count, place]

    difference = jnp.abs(here - median)
    classes = sum((difference >= 1 << k).astype(int) for k in range(CLASSES - 1))
    spread = sum((apart > limit).astype(int) for limit in coder.SPREAD_LIMITS)
    kind = 1 + (classes[..., 0] > 0)
    costs = jnp.asarray(_CLASS_COSTS)
    vector = (
        costs[0, spread[..., 0], classes[..., 0]] + costs[kind, spread[..., 1], classes[..., 1]]
    )
    return bits + jnp.where(here_moved, flag + jnp.where(found, choice, vector), 0)


def _up_right_coded(y: np.ndarray, x: np.ndarray, nodes: int) -> np.ndarray:
    """Whether the node above on the right comes before node (y, x), `nodes` per side of a root."""

    def place(y, x):
        return sum((x >> i & 1) << 2 * i | (y >> i & 1) << 2 * i + 1 for i in range(3))

    row, column = y % nodes, x % nodes
    before = (column < nodes - 1) & (place(row - 1, column + 1) < place(row, column))
    return (y > 0) & ((row == 0) | before)
