"""Motion search: where blocks of a picture are in a reference, from coarse to fine.

Minimises squared differences plus bits times a weight, as encoders of video standards do (Sullivan
and Wiegand 1998): regions are looked for at 1/8 and 1/4 of the size, blocks of 8x8 near what their
regions and the unit before found, then merged into blocks of up to 64x64 where that costs less, and
at last each of these is moved by halves and quarters of a sample. Nothing is sequential, so it runs
on any device, also inside of training steps.

Errors of many displacements of all blocks are arrays with the blocks last: compilers for CPUs turn
those into vector instructions, and TPUs into full lanes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax.nn.compensation import blocks_at, interpolated, margin_of
from nvc_jax.nn.motion import BLOCK, MAX_VECTOR
from nvc_jax.nn.warp import halve

LEVELS = 3  # of merging: blocks of 16, 32, 64
COARSE = 8  # blocks of a coarse picture have so many samples on a side, whatever its scale
# Half the range of displacements at 1/8 and at 1/4 of the size, in samples there; of blocks.
REACH = {8: 6, 4: 6, 2: 3, 1: 1}
# Bits of a vector: same as a neighbour's; else a start, and for each doubling of a difference.
MERGED_BITS, NEW_BITS, DOUBLING_BITS = 1.0, 4.0, 1.6
SPLIT_BITS = 1.0
# A block is coded on its own if what changes inside of it is more than this share smaller than what
# changes inside of the difference, and that repays so many bits for its mean.
NONE_SHARE, NONE_BITS = 0.65, 24.0
LEAST_WEIGHT = 0.18 * (20 / 255) ** 2


def search(
    picture: jax.Array,
    reference: jax.Array,
    weight: jax.Array,
    previous: jax.Array | None = None,
) -> jax.Array:
    """Finds motion.

    Args:
      picture, reference: float32 [b, h, w], luma, sides multiples of 16.
      weight: float32 [b], what a bit of motion is worth as a sum of squared differences.
      previous: int16 [b, h/8, w/8, 3], a field whose vectors are tried as well, or None.

    Returns:
      int16 [b, h/8, w/8, 3], see `nvc_jax.nn.motion`. No gradients.
    """
    picture, reference, weight = lax.stop_gradient((picture, reference, weight))
    if previous is None:
        b, h, w = picture.shape
        previous = jnp.zeros((b, h // BLOCK, w // BLOCK, 3), jnp.int16)
    return jax.vmap(_search)(picture, reference, weight, previous)


def _search(picture, reference, weight, previous):
    h, w = picture.shape
    rows, columns = h // BLOCK, w // BLOCK
    blocks = _cut(picture)
    before = previous[..., :2].astype(jnp.int32)
    # Coarse pictures have false friends: there, bits count at least a little.
    start = _coarsely(picture, reference, jnp.maximum(weight, LEAST_WEIGHT), before)
    whole = interpolated(reference[None, None], margin_of(BLOCK))[0, :1]
    at_whole = partial(_errors_at, whole, blocks)

    def bits(field, vectors, level=0):
        """Of vectors [k, rows, columns, 2], one for all blocks of a node, if others are as they are
        in the field."""
        return _bits(vectors, *_neighbours(field, 1 << level))

    # Blocks of 8x8: the best of some candidates, and what is near it.
    candidates = jnp.stack([start, *_around(start), (before + 2) // 4 * 4, jnp.zeros_like(before)])
    cost = at_whole(candidates) + weight * DOUBLING_BITS * _length(candidates - start)
    field = _pick(candidates, cost)
    near, errors = _near(whole, blocks, field, REACH[1])
    field = _pick(near, errors + weight * DOUBLING_BITS * _length(near - start))

    # Nodes of 16, 32, 64: one of their parts' vectors for all, if that is cheaper.
    level_map = jnp.zeros((rows, columns), jnp.int32)
    cost = (at_whole(field[None]) + weight * bits(field, field[None]))[0]
    for level in range(1, LEVELS + 1):
        size = 1 << level
        parts = [(i, j) for i in (0, size // 2) for j in (0, size // 2)]
        candidates = jnp.stack(
            [_spread(_corner(field, size, *part), size, rows, columns) for part in parts]
            + [jnp.zeros_like(field)]
        )
        together = _pooled(at_whole(candidates), size)
        at_corner = bits(field, candidates, level)[:, ::size, ::size]
        together += weight * at_corner
        apart = _pooled(cost[None], size)[0] + weight * SPLIT_BITS
        best = jnp.argmin(together, 0)
        cheaper = jnp.min(together, 0) < apart
        # Nodes that reach over the border are always split.
        cheaper &= (size * (1 + jnp.arange(cheaper.shape[0])) <= rows)[:, None]
        cheaper &= size * (1 + jnp.arange(cheaper.shape[1])) <= columns
        merged = _spread(cheaper[..., None], size, rows, columns)
        best = _spread(best[..., None], size, rows, columns)[..., 0]
        chosen = jnp.take_along_axis(candidates, best[None, ..., None], 0)[0]
        field = jnp.where(merged, chosen, field)
        level_map = jnp.where(merged[..., 0], level, level_map)
        # A node's cost lies at its corner.
        corner = jnp.zeros((rows, columns)).at[::size, ::size].set(jnp.min(together, 0))
        cost = jnp.where(merged[..., 0], corner, cost)

    # Halves and quarters of a sample, for nodes as a whole; then what neighbours have.
    fine = interpolated(reference[None, None], margin_of(BLOCK))[0]
    at_fine = partial(_errors_at, fine, blocks)

    def choose(field, candidates):
        errors = _by_node(at_fine(candidates), level_map)
        return _pick(
            candidates, errors + weight * _by_node_bits(bits, field, candidates, level_map)
        )

    steps = jnp.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)])
    order = jnp.array([4, 0, 1, 2, 3, 5, 6, 7, 8])  # of equals, the one that stays
    for size in (2, 1):
        field = choose(field, field + size * steps[order][:, None, None])
    left, up, _ = _neighbours(field, 1)
    field = choose(field, jnp.stack([field, left, up, jnp.zeros_like(field)]))
    limited = jnp.clip(field, -MAX_VECTOR, MAX_VECTOR)
    used = _predicted(blocks, fine, limited, weight, level_map)
    return jnp.concatenate([limited * used, used], -1).astype(jnp.int16)


def _predicted(blocks, planes, field, weight, level_map):
    """Whether prediction is better than none, int32 [rows, columns, 1]: without their means."""
    rows, columns, _ = field.shape
    moved = blocks_at(planes, field, BLOCK).reshape(rows, columns, BLOCK**2)
    changes = partial(jnp.var, axis=-1)
    inter, own = _by_node(
        BLOCK**2 * jnp.stack([changes(blocks - moved), changes(blocks)]), level_map
    )
    return (NONE_SHARE * inter <= own + weight * NONE_BITS).astype(jnp.int32)[..., None]


def _around(field, far=1):
    """Every block's four neighbours at this distance; at borders those at the other border."""
    return [jnp.roll(field, shift, axis) for shift in (-far, far) for axis in (0, 1)]


def _coarsely(picture, reference, weight, before):
    """Vectors of blocks, found for 64x64, 32x32, and 16x16 around every block of 8x8."""
    rows, columns, _ = before.shape
    bottom, right = (-side % 64 for side in picture.shape)
    pad = partial(jnp.pad, pad_width=((0, bottom), (0, right)), mode="edge")
    pyramid = [(pad(picture), pad(reference))]
    for _ in range(3):
        pyramid.append(tuple(halve(p[None, ..., None])[0, ..., 0] for p in pyramid[-1]))
    vectors, found = None, []
    for level in (3, 2):
        scale = 1 << level
        ours, theirs = pyramid[level]
        blocks = _cut(ours)
        if vectors is None:
            centres = [jnp.zeros((*blocks.shape[:2], 2), jnp.int32)]
        else:
            finer = vectors.repeat(2, 0).repeat(2, 1)
            centres = [finer, jnp.zeros_like(finer)]
        planes = jnp.pad(theirs, margin_of(BLOCK + 2 * REACH[scale]), mode="edge")[None, None]
        candidates, costs = [], []
        for centre in centres:
            near, errors = _near(planes, blocks, centre // scale, REACH[scale])
            # Every sample stands for many.
            costs.append(
                errors * scale**2 + weight * DOUBLING_BITS * _length(near * scale - centre)
            )
            candidates.append(near * scale)
        vectors = _pick(jnp.concatenate(candidates), jnp.concatenate(costs))
        found.append(_spread(vectors, scale, rows, columns))
    ours, theirs = (halve(p[None, ..., None])[0, ..., 0] for p in (picture, reference))
    # 8x8 samples around every block of 4x4: less is like too much.
    edge = BLOCK // 4
    windows = blocks_at(
        jnp.pad(ours, margin_of(BLOCK), mode="edge")[None, None],
        jnp.zeros((rows, columns, 2), jnp.int32),
        BLOCK,
        edge,
    ).reshape(rows, columns, BLOCK**2)
    planes = jnp.pad(theirs, margin_of(BLOCK), mode="edge")[None, None]
    regions = found[-1]

    def cost(vectors, errors):
        return errors + weight * DOUBLING_BITS * _length(2 * vectors - regions)

    def best_of(candidates):
        candidates = jnp.stack(candidates) // 8 * 4
        field = _pick(candidates, cost(candidates, _errors_at(planes, windows, candidates, edge)))
        near, errors = _near(planes, windows, field, REACH[2], edge)
        return 2 * _pick(near, cost(near, errors))

    field = best_of([*found, *_around(regions, 4), before, jnp.zeros_like(before)])
    return best_of([field, *_around(field)])


def _cut(picture):
    """[h, w] -> [h/8, w/8, 64]."""
    h, w = picture.shape
    blocks = picture.reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK)
    return blocks.swapaxes(1, 2).reshape(h // BLOCK, w // BLOCK, BLOCK**2)


def _errors_at(planes, blocks, vectors, edge=0):
    """Squared differences of blocks [rows, columns, 64] at vectors [k, rows, columns, 2]."""
    moved = jax.vmap(lambda v: blocks_at(planes, v, BLOCK, edge))(vectors)
    apart = blocks - moved.reshape(*vectors.shape[:-1], BLOCK**2)
    # A sum over the last axis is slow on CPUs, a product with ones is not.
    ones = jnp.ones(BLOCK**2)
    return jnp.dot(jnp.square(apart), ones, precision=lax.Precision.HIGHEST)


def _near(planes, blocks, centre, reach, edge=0):
    """Squared differences at all whole displacements from vectors [rows, columns, 2].

    Returns:
      (vectors [k, rows, columns, 2], errors [k, rows, columns]), the centre's first.
    """
    rows, columns, _ = centre.shape
    size, count = BLOCK + 2 * reach, 2 * reach + 1
    planes = _extended(planes, size)
    patches = blocks_at(planes, centre, size, reach + edge)
    patches = patches.reshape(rows * columns, size, size).transpose(1, 2, 0)
    own = blocks.reshape(rows * columns, BLOCK, BLOCK).transpose(1, 2, 0)
    patches, own = lax.optimization_barrier((patches, own))

    def row(i):
        band = lax.dynamic_slice_in_dim(patches, i, BLOCK)
        return jnp.stack(
            [jnp.square(band[:, j : j + BLOCK] - own).sum((0, 1)) for j in range(count)]
        )

    errors = lax.map(row, jnp.arange(count)).reshape(-1, rows, columns)
    places = np.array(
        [(4 * i, 4 * j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    )
    order = np.argsort(np.abs(places).sum(1), kind="stable")  # of equals, the nearest
    return centre + jnp.asarray(places[order])[:, None, None], errors[order]


def _extended(planes, size):
    """Planes with the margin of blocks of this size, of planes with a smaller or the same."""
    more = margin_of(size) - margin_of(BLOCK)
    return jnp.pad(planes, ((0, 0), (0, 0), (more, more), (more, more)), mode="edge")


def _pick(candidates, costs):
    """The candidates [k, rows, columns, 2] of least cost [k, rows, columns], the first of equals."""
    best = jnp.argmin(costs, 0)
    return jnp.take_along_axis(candidates, best[None, ..., None], 0)[0]


def _length(difference):
    """Doublings that it takes to reach a difference of vectors, of both components."""
    return jnp.log2(1 + jnp.abs(difference).astype(jnp.float32)).sum(-1)


def _neighbours(field, size):
    """Vectors to the left of, above, and above and to the right of nodes; at borders the nearest."""
    rows, columns, _ = field.shape
    left = jnp.concatenate([field[:, :1], field[:, :-1]], 1)
    up = jnp.concatenate([left[:1], field[:-1]], 0)
    column = jnp.minimum(jnp.arange(columns) + size, columns - 1)
    right = jnp.concatenate([left[:1], field[:-1, column]], 0)
    return left, up, right


def _bits(vectors, left, up, right):
    median = jnp.maximum(jnp.minimum(left, up), jnp.minimum(jnp.maximum(left, up), right))
    merged = [jnp.all(vectors == v, -1) for v in (left, up, right)]
    new = NEW_BITS + DOUBLING_BITS * _length(vectors - median)
    return jnp.where(merged[0] | merged[1] | merged[2], MERGED_BITS, new)


def _spread(nodes, size, rows, columns):
    """Nodes' values for all of their blocks."""
    return nodes.repeat(size, 0).repeat(size, 1)[:rows, :columns]


def _corner(field, size, down, across):
    """Values [nodes down, nodes across, c] of a block in every node; at borders of the last there."""
    rows, columns, _ = field.shape
    row = jnp.minimum(jnp.arange(0, rows, size) + down, rows - 1)
    column = jnp.minimum(jnp.arange(0, columns, size) + across, columns - 1)
    return field[row][:, column]


def _pooled(x, size):
    """Sums over nodes: [k, rows, columns] -> [k, nodes down, nodes across]."""
    k, rows, columns = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % size), (0, -columns % size)))
    return x.reshape(k, -(-rows // size), size, -(-columns // size), size).sum((2, 4))


def _by_node(x, level_map):
    """Every block's sum over its node, [k, rows, columns]."""
    _, rows, columns = x.shape
    result = x
    for level in range(1, LEVELS + 1):
        size = 1 << level
        total = _pooled(x, size).repeat(size, 1).repeat(size, 2)[:, :rows, :columns]
        result = jnp.where(level_map == level, total, result)
    return result


def _by_node_bits(bits, field, candidates, level_map):
    """Every block's bits of its node's vector, which depend on the neighbours of its corner."""
    _, rows, columns, _ = candidates.shape
    result = bits(field, candidates)
    for level in range(1, LEVELS + 1):
        size = 1 << level
        own = bits(field, candidates, level)[:, ::size, ::size]
        own = own.repeat(size, 1).repeat(size, 2)[:, :rows, :columns]
        result = jnp.where(level_map == level, own, result)
    return result
