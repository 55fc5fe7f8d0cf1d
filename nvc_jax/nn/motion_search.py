"""Motion search: where blocks of a picture are in a reference, from coarse to fine.

Minimises squared differences plus bits times a weight, as encoders of video standards do (Sullivan
and Wiegand 1998). All displacements are looked at for blocks of 16x16 at 1/4 of the size and, five
times as far, for blocks of 32x32 at 1/8, then those near a few candidates at 1/2 of the size, then
near what neighbours have found at the full size, and at last halves and quarters of a sample. On
every scale blocks try their neighbours' vectors, on two colours of a chequerboard (iterated
conditional modes, Besag 1986); whole and fractional vectors are then shared by nodes of a quadtree
where that costs less. Nothing is sequential, so it runs on any device, also inside of training
steps.

What makes it fast on CPUs: errors of all displacements near a block's vector, its "window", are
computed once, with the blocks on the last axes, which compilers turn into vector instructions.
What neighbours and nodes try is then looked up there. Compilers would also compute small arrays
anew wherever they are used, again and again in chains of decisions: barriers keep them.

Inside of this module vectors are int32 [..., 2, rows, columns], down and across, in quarters of a
sample.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax.nn.compensation import PHASES, TAPS, interpolation_kernel
from nvc_jax.nn.materialize import materialized, one_by_one
from nvc_jax.nn.motion import BLOCK, MAX_VECTOR

keep = lax.optimization_barrier

LEVELS = 3  # of merging: blocks of 16, 32, 64
ROOT = 1 << LEVELS
# Half of windows, in samples at 1/8, at 1/4 and at 1/2 of the size ...
COARSEST_REACH, COARSE_REACH, MIDDLE_REACH = 20, 8, 3
WHOLE_REACH, QUARTER_REACH = 2, 2  # ... in whole samples, and in quarters of one
# How far beyond the picture blocks may be looked for, in samples.
BEYOND = 64
MARGIN = BEYOND + TAPS
# Bits of a node's vector: like the median of neighbours; like another one; a start, and for each
# doubling of the difference. Bits of not being one node.
MEDIAN_BITS, MERGED_BITS, NEW_BITS, DOUBLING_BITS = 1.0, 2.5, 4.0, 1.6
SPLIT_BITS = 1.0
# Of a pair of neighbours that differ, and for each doubling of how much.
PAIR_BITS, PAIR_DOUBLING_BITS = 3.0, 1.0
ROUNDS = 2  # of merging
# Blocks are coded on their own if what changes inside of them is more than this share smaller than
# what changes inside of the difference, and that repays so many bits for the mean.
NONE_SHARE, NONE_BITS = 0.65, 24.0
# Share of all changes that prediction has to spare, or nothing is predicted: what is found behind a
# scene cut is chance.
SPARED_SHARE = 0.2
# Coarse pictures have false friends: there, bits count at least a little.
COARSE_WEIGHT = 0.18 * (10 / 255) ** 2
# Squared errors of a block count in full while they are so small that coding would leave them.
# Larger ones are coded, which takes 32 bits for each doubling, so they count as their logarithm.
# The knee, where both have the same slope, is 32 / log(2) bits' worth.
KNEE_BITS = 46.0
LEAST_WEIGHT = 1e-7  # of equals, the shorter vector
OUTSIDE = 1e9  # error of what is not in a window


def search(
    picture: jax.Array,
    reference: jax.Array,
    weight: jax.Array,
    previous: jax.Array | None = None,
) -> jax.Array:
    """Finds motion.

    Args:
      picture, reference: float32 [b, h, w], luma in 0..1, sides multiples of 16. Beyond its border
        a reference goes on as it ends.
      weight: float32 [b], what a bit of motion is worth as a sum of squared differences. 0.115
        times the squared quantiser step is about right.
      previous: int16 [b, h/8, w/8, 3], a field whose vectors are tried as well, or None.

    Returns:
      int16 [b, h/8, w/8, 3], see `nvc_jax.nn.motion`. No gradients. All zero but for 1s, a copy,
      where no other motion is worth its bits.
    """
    picture, reference, weight = lax.stop_gradient((picture, reference, weight))
    if previous is None:
        b, h, w = picture.shape
        previous = jnp.zeros((b, h // BLOCK, w // BLOCK, 3), jnp.int16)
    return one_by_one(_search)(picture, reference, weight, previous)


class _Windows(NamedTuple):
    """Errors of displacements near vectors of blocks.

    Attributes:
      errors: float32 [(2 reach + 1)^2 + 1, rows, columns], row by row, and `OUTSIDE`.
      centre: [2, rows, columns].
      unit: of displacements, a power of two, in quarters of a sample.
    """

    errors: jax.Array
    centre: jax.Array
    unit: int

    @property
    def places(self) -> np.ndarray:
        """int32 [2, (2 reach + 1)^2]."""
        side = round((len(self.errors) - 1) ** 0.5)
        return _places(side // 2, self.unit)


def _search(picture, reference, weight, previous):
    h, w = picture.shape
    rows, columns = h // BLOCK, w // BLOCK
    weight = jnp.maximum(weight, LEAST_WEIGHT)
    before = jnp.moveaxis(previous[..., :2], -1, 0).astype(jnp.int32)
    limited = partial(_limited, height=h, width=w)
    field = limited(_coarsely(picture, reference, jnp.maximum(weight, COARSE_WEIGHT), before))

    blocks = keep(_cells(picture, BLOCK))
    unmoved = _square_error(_cells(reference, BLOCK), blocks)
    unmoved = _as_coded(unmoved, weight)
    plane = keep(jnp.pad(reference, MARGIN, mode="edge"))
    near = partial(_whole_windows, plane, blocks, weight)
    propagate = partial(_propagated, plane, blocks, weight, before, limited)
    field = propagate(field)
    field = propagate(limited(_nearest(near(field), weight)))
    field = _unified(partial(_errors_at, plane, blocks, weight), limited, weight, field)
    windows = near(field)
    field, _ = _settled(windows, unmoved, weight)
    field = limited(field[:, :rows, :columns])

    windows = _quarter_windows(_doubled(reference), blocks, weight, field)
    field, costs = _settled(windows, unmoved, weight)
    copied = _grid(unmoved, "constant").sum() + weight * MEDIAN_BITS * costs.size
    field = jnp.where(copied <= costs.sum(), 0, field)
    field = keep(field[:, :rows, :columns])
    used = _predicted(plane, blocks, field, weight)
    return jnp.moveaxis(jnp.concatenate([field * used, used[None]]), 0, -1).astype(jnp.int16)


def _coarsely(picture, reference, weight, before):
    """Vectors of blocks, multiples of 8, from pictures at 1/8, 1/4 and 1/2 of the size."""
    half = keep(_halved(picture, reference))
    quarter = keep(_halved(*half))
    eighth = keep(_halved(*quarter))
    # Of blocks of 16x16, which share windows at half size.
    rows, columns = (side // 16 for side in picture.shape)
    far = _spread(_everywhere(*eighth, weight, COARSEST_REACH, 8), 2)[:, :rows, :columns]
    centres = [_everywhere(*quarter, weight, COARSE_REACH, 4), far]
    height, width = picture.shape
    centres = [_limited(_spread(c, 2), height, width)[:, ::2, ::2] // 8 * 8 for c in centres]
    windows = _half_windows(*half, weight, jnp.stack(centres))
    costs = []
    for window in windows:
        # Eight samples a side say more than four.
        errors = window.errors[:-1]
        around = (errors + _spread(_pooled(errors), 2) / 2) / 3
        costs.append(around + _window_bits(window, windows[0].centre) * weight)
    best = _least(jnp.concatenate(costs))
    places = windows[0].places
    which, place = jnp.divmod(best, places.shape[1])
    centre = sum((which == i) * window.centre for i, window in enumerate(windows))
    field = centre + jnp.asarray(places)[:, place]
    before = before // 8 * 8

    def errors(vectors):
        found = [_looked_up(window, vectors) for window in windows]
        return jnp.min(jnp.stack(found), 0)

    return _swept(errors, field, weight, before)


def _everywhere(picture, reference, weight, reach, smaller):
    """Best vectors of 4x4 blocks with what is around them, in pictures so much smaller."""
    count = 2 * (reach // 4) + 1
    sides = [(0, -side % 4) for side in picture.shape]
    picture, reference = (jnp.pad(plane, sides, mode="edge") for plane in (picture, reference))
    own = _cells(picture, 4)
    cells = _cells(jnp.pad(reference, reach, mode="edge"), 4)
    rows, columns = own.shape[2:]
    # What is around every block, [4 count, 4 count, rows, columns].
    patches = [
        [cells[:, :, i : i + rows, j : j + columns] for j in range(count)] for i in range(count)
    ]
    patches = jnp.stack([jnp.stack(line, 2) for line in patches])
    patches = keep(patches.transpose(0, 1, 3, 2, 4, 5).reshape(4 * count, 4 * count, rows, columns))
    places = _places(reach, PHASES * smaller)
    errors = smaller**2 * _square_errors(patches, own)
    errors = keep(errors.reshape(-1, rows, columns))
    bits = weight * DOUBLING_BITS * _doublings(places).sum(0)[:, None, None]
    return jnp.asarray(places)[:, _least(_smooth(errors) / 2 + bits)]


def _half_windows(picture, reference, weight, centres):
    """Windows at half size of blocks of 4x4, around centres [k, 2, rows / 2, columns / 2]."""
    own = _cells(picture, 8)
    plane = jnp.pad(reference, MARGIN // 2, mode="edge")
    size = 8 + 2 * MIDDLE_REACH
    start = _grid_places(centres.shape[-2:], 8) + MARGIN // 2 - MIDDLE_REACH
    patches = _patches(plane, start + centres // 8, size)
    count = 2 * MIDDLE_REACH + 1

    def part(i, j):
        theirs = patches[i : i + size - 4, j : j + size - 4]
        return _square_errors(theirs, own[i : i + 4, j : j + 4, None])

    errors = 4 * jnp.stack([jnp.stack([part(i, j) for j in (0, 4)], -1) for i in (0, 4)], -2)
    # [count, count, k, rows / 2, columns / 2, 2, 2]
    k, rows, columns = errors.shape[2:5]
    errors = errors.transpose(2, 0, 1, 3, 5, 4, 6).reshape(k, count**2, 2 * rows, 2 * columns)
    errors = keep(_as_coded(errors, weight))
    return [_Windows(_closed(e), _spread(c, 2), 8) for e, c in zip(errors, centres, strict=True)]


def _whole_windows(plane, blocks, weight, field):
    start = _grid_places(field.shape[-2:], BLOCK) + MARGIN - WHOLE_REACH
    patches = _patches(plane, start + field // PHASES, BLOCK + 2 * WHOLE_REACH)
    errors = _as_coded(_square_errors(patches, blocks), weight)
    return _Windows(_closed(errors.reshape(-1, *errors.shape[2:])), field, PHASES)


def _quarter_windows(plane, blocks, weight, field):
    """Windows in quarters of a sample around whole vectors, from a plane of twice the size.

    Errors at quarters lie on parabolas through those at halves and whole samples: errors change
    more slowly than pictures.
    """
    start = 2 * (_grid_places(field.shape[-2:], BLOCK) + MARGIN) - 1
    patches = _patches(plane, start + field // 2, 2 * BLOCK + 1)
    errors = [
        [_square_error(patches[i : i + 15 : 2, j : j + 15 : 2], blocks) for j in range(3)]
        for i in range(3)
    ]
    errors = keep(jnp.stack([jnp.stack(line) for line in errors]))
    for axis in (0, 1):
        a, b, c = (lax.index_in_dim(errors, i, axis, keepdims=False) for i in range(3))
        left, right = 0.375 * a + 0.75 * b - 0.125 * c, 0.375 * c + 0.75 * b - 0.125 * a
        errors = keep(jnp.stack([a, left, b, right, c], axis))
    errors = _as_coded(jnp.maximum(errors, 0), weight).reshape(-1, *field.shape[-2:])
    return _Windows(_closed(errors), field, 1)


def _as_coded(errors, weight):
    """What squared errors of blocks amount to once coded, as squared errors, see `KNEE_BITS`."""
    knee = KNEE_BITS * weight
    return knee * float(np.log(2)) * _doublings(errors / knee)


def _closed(errors):
    """Errors with one row more, for what is not in the window."""
    return keep(jnp.concatenate([errors, jnp.full_like(errors[:1], OUTSIDE)]))


def _nearest(windows, weight):
    """The best of each window."""
    cost = windows.errors[:-1] + weight * _window_bits(windows, windows.centre)
    return windows.centre + jnp.asarray(windows.places)[:, materialized(_least(cost))]


def _window_bits(windows, predicted):
    """Bits of a window's vectors' differences, [places, rows, columns]."""
    apart = windows.centre - predicted
    down, across = windows.places[:, :, None, None]
    return DOUBLING_BITS * (_doublings(apart[0] + down) + _doublings(apart[1] + across))


def _looked_up(windows, vectors):
    """Errors [k, rows, columns] of vectors [k, 2, rows, columns]."""
    side = round((len(windows.errors) - 1) ** 0.5)
    apart = vectors - windows.centre
    place = (apart >> windows.unit.bit_length() - 1) + side // 2
    inside = ((apart & windows.unit - 1) == 0) & (place >= 0) & (place < side)
    place = jnp.where(_of_both(jnp.logical_and, inside), place[:, 0] * side + place[:, 1], side**2)
    return _taken(windows.errors, place)


def _taken(rows, index):
    """rows[index[..., i, j], i, j] of rows [k, h, w]."""
    _, h, w = rows.shape
    flat = keep(index * (h * w) + jnp.arange(h * w, dtype=jnp.int32).reshape(h, w))
    return keep(rows.reshape(-1).at[flat].get(mode="promise_in_bounds"))


def _propagated(plane, blocks, weight, before, limited, field):
    """Every block's best of neighbours' vectors, however far apart."""
    around = jnp.stack(_neighbours(field))
    others = jnp.stack([jnp.zeros_like(field), (before + PHASES // 2) // PHASES * PHASES])
    candidates = keep(limited(jnp.concatenate([field[None], around, others])))
    errors = _errors_at(plane, blocks, weight, candidates)
    return _chosen(candidates, errors + weight * _pair_bits(candidates, around))


def _errors_at(plane, blocks, weight, vectors):
    """Errors [k, rows, columns] of whole vectors [k, 2, rows, columns], however far apart."""
    starts = _grid_places(vectors.shape[-2:], BLOCK) + MARGIN + vectors // PHASES
    theirs = _slices(plane, starts, BLOCK).reshape(*starts[:, 0].shape, BLOCK**2)
    ours = blocks.transpose(2, 3, 0, 1).reshape(*vectors.shape[-2:], BLOCK**2)
    # A sum over the last axis is slow on CPUs, a product with ones is not.
    ones = jnp.ones(BLOCK**2)
    errors = jnp.dot(jnp.square(theirs - ours), ones, precision=lax.Precision.HIGHEST)
    return _as_coded(errors, weight)


def _unified(errors: Callable, limited: Callable, weight, field):
    """Nodes of 16 and of 32 whose blocks have one whole vector, if that is cheaper.

    Windows say nothing of vectors that are far apart, as those of neighbours are by chance where
    much is alike.
    """
    rows, columns = field.shape[-2:]
    edges = [(0, -side % 4) for side in (rows, columns)]

    def errors_of(vectors):
        inside = limited(vectors[..., :rows, :columns])
        return jnp.pad(errors(inside), [(0, 0), *edges])

    field = nodes = jnp.pad(field, [(0, 0), *edges], mode="edge")
    costs = errors_of(field[None])[0] + weight * _vector_bits(field, *_predictors(field, 1))
    for size in (2, 4):
        predictors = _predictors(field, size)
        candidates = keep(jnp.stack([*_parts(nodes), predictors[-1] // PHASES * PHASES]))
        costs = keep(_pooled(costs) + weight * SPLIT_BITS)
        field, costs, nodes = _joined(errors_of, candidates, predictors, field, costs, weight)
    return keep(limited(field[:, :rows, :columns]))


def _settled(windows, unmoved, weight):
    """Vectors within windows that are cheap together: (field, costs of roots), whole roots."""
    windows = windows._replace(
        errors=jnp.concatenate([_grid(windows.errors[:-1], "constant"),
                                jnp.full_like(_grid(windows.errors[:1], "edge"), OUTSIDE)]),
        centre=_grid(windows.centre, "edge"),
    )  # fmt: skip
    unmoved = _grid(unmoved, "constant")

    def errors(vectors):
        still = _of_both(jnp.logical_and, vectors == 0)
        return jnp.where(still, unmoved, _looked_up(windows, vectors))

    def one_round(_, state):
        return _merged(errors, windows, _swept(errors, state[0], weight), weight)

    nothing = jnp.zeros([side // ROOT for side in unmoved.shape])
    return lax.fori_loop(0, ROUNDS, one_round, keep((_nearest(windows, weight), nothing)))


def _swept(errors, field, weight, *others):
    """Blocks of one colour, then those of the other, try their neighbours' vectors and zero."""
    rows, columns = field.shape[-2:]
    colours = jnp.asarray(np.add.outer(np.arange(rows), np.arange(columns)) % 2)

    def sweep(colour, field):
        around = keep(jnp.stack(_neighbours(field)))
        candidates = [field[None], around, jnp.zeros_like(field)[None], *(v[None] for v in others)]
        candidates = keep(jnp.concatenate(candidates))
        costs = errors(candidates) + weight * _pair_bits(candidates, around)
        return jnp.where(colours == colour, _chosen(candidates, costs), field)

    return lax.fori_loop(0, 2, sweep, keep(field))


def _merged(errors: Callable, windows, field, weight):
    """Nodes of 16, 32, 64: one vector for all blocks of a node, if that is cheaper.

    Returns (field, costs [roots down, roots across]).
    """
    costs = errors(field[None])[0] + weight * _vector_bits(field, *_predictors(field, 1))
    sums, nodes, low, high = windows.errors[:-1], field, windows.centre, windows.centre
    for level in range(1, LEVELS + 1):
        size = 1 << level
        sums, costs = keep((_pooled(sums), _pooled(costs) + weight * SPLIT_BITS))
        low, high = keep((_of_parts(jnp.minimum, low), _of_parts(jnp.maximum, high)))
        predictors = _predictors(field, size)
        median = predictors[-1]
        # The best for all, if their windows are the same.
        node = _Windows(_closed(sums), low, windows.unit)
        bits = _window_bits(node, median)
        place = _least(keep(sums + weight * bits))
        best = low + jnp.asarray(windows.places)[:, place]
        parts = _parts(nodes)
        best = jnp.where(_of_both(jnp.logical_and, low == high), best, parts[0])
        candidates = keep(jnp.stack([*parts, jnp.zeros_like(best), median, best]))
        field, costs, nodes = _joined(errors, candidates, predictors, field, costs, weight)
    return field, costs


def _joined(errors: Callable, candidates, predictors, field, costs, weight):
    """Nodes that take the best of their candidates, if that is cheaper than what they cost.

    Returns (field, costs of nodes, each node's best).
    """
    size = field.shape[-1] // candidates.shape[-1]
    together = errors(keep(_spread(candidates, size)))
    for _ in range(size.bit_length() - 1):
        together = _pooled(together)
    together = keep(together + weight * _vector_bits(candidates, *predictors))
    nodes = _chosen(candidates, together)
    least = together.min(0)
    cheaper = keep(least <= costs)
    costs = jnp.where(cheaper, least, costs)
    field = keep(jnp.where(_spread(cheaper, size), _spread(nodes, size), field))
    return field, costs, nodes


def _predicted(plane, blocks, field, weight):
    """Whether prediction is better than none, int32 [rows, columns]: of 16x16, without means."""
    starts = _grid_places(field.shape[-2:], BLOCK) + MARGIN + ((field + 2) >> 2)
    moved = _patches(plane, starts, BLOCK)

    def changes(x):
        return _pooled(jnp.square(x - x.mean((0, 1))).sum((0, 1)))

    inter, own = changes(blocks - moved), changes(blocks)
    used = NONE_SHARE * inter <= own + weight * NONE_BITS
    spared = jnp.where(used, jnp.maximum(own - inter, 0), 0) + weight
    used &= spared.sum() >= SPARED_SHARE * own.sum()
    return _spread(used.astype(jnp.int32), 2)


def _limited(vectors, height, width):
    """Vectors that point at most `BEYOND` samples beyond the picture."""
    rows, columns = vectors.shape[-2:]
    place = PHASES * BLOCK * np.indices((rows, columns))
    far, most = PHASES * BEYOND, MAX_VECTOR // (2 * BLOCK) * 2 * BLOCK
    side = PHASES * np.array([height, width]).reshape(2, 1, 1)
    # Fractions are found around whole vectors, at most half a sample away.
    low = np.maximum(-place - far + PHASES * BLOCK, -most)
    high = np.minimum(side - place + far - 2 * PHASES * BLOCK, most)
    return jnp.clip(vectors, low, high)


def _neighbours(field):
    """To the left, above, to the right, below; at borders the block itself."""
    left = jnp.concatenate([field[..., :1], field[..., :-1]], -1)
    right = jnp.concatenate([field[..., 1:], field[..., -1:]], -1)
    up = jnp.concatenate([field[..., :1, :], field[..., :-1, :]], -2)
    down = jnp.concatenate([field[..., 1:, :], field[..., -1:, :]], -2)
    return left, up, right, down


def _pair_bits(vectors, around):
    """Bits [k, rows, columns] of vectors [k, 2, rows, columns] beside those around."""
    bits = 0
    for other in around:
        apart = jnp.abs(vectors - other)
        doublings = _of_both(jnp.add, _doublings(apart))
        differ = _of_both(jnp.logical_or, apart > 0)
        bits += jnp.where(differ, PAIR_BITS + PAIR_DOUBLING_BITS * doublings, 0)
    return bits


def _predictors(field, size):
    """Vectors to the left of nodes, above them, above and to the right, and their median."""
    left, up, _, _ = _neighbours(field)
    up = up[..., ::size, :]
    right = jnp.concatenate([up[..., size::size], up[..., -1:]], -1)
    left, up = left[..., ::size, ::size], up[..., ::size]
    median = jnp.maximum(jnp.minimum(left, up), jnp.minimum(jnp.maximum(left, up), right))
    return keep((left, up, right, median))


def _vector_bits(vectors, left, up, right, median):
    new = NEW_BITS + DOUBLING_BITS * _of_both(jnp.add, _doublings(vectors - median))
    other = [_of_both(jnp.logical_and, vectors == v) for v in (left, up, right)]
    bits = jnp.where(other[0] | other[1] | other[2], MERGED_BITS, new)
    return jnp.where(_of_both(jnp.logical_and, vectors == median), MEDIAN_BITS, bits)


def _doublings(x):
    """About the logarithm to base 2 of 1 + |x|: linear between powers, which is a bit pattern."""
    number = 1 + jnp.abs(jnp.asarray(x, jnp.float32))
    return lax.bitcast_convert_type(number, jnp.int32).astype(jnp.float32) * 2.0**-23 - 127


def _least(costs):
    """Index of the least of costs [k, ...], which are not negative; nearly equal ones are equal.

    The index takes the place of the last bits, because minima are much faster than their indices.
    """
    bits = (1 << (len(costs) - 1).bit_length()) - 1
    index = jnp.arange(len(costs), dtype=jnp.int32).reshape(-1, *(1,) * (costs.ndim - 1))
    number = lax.bitcast_convert_type(keep(costs), jnp.int32)
    return keep(((number & ~bits) | index).min(0) & bits)


def _chosen(candidates, costs):
    """The candidates [k, 2, rows, columns] of least cost [k, rows, columns]."""
    best = _least(costs)
    return keep(jnp.stack([_taken(candidates[:, i], best) for i in range(2)]))


def _places(reach, unit):
    axis = np.arange(-reach, reach + 1, dtype=np.int32) * unit
    return np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)


def _grid_places(shape, size):
    """int32 [2, rows, columns], where blocks begin."""
    return (size * np.indices(shape)).astype(np.int32)


def _halved(*planes):
    """Means of 2x2 samples."""

    def halved(x):
        x = keep(x[::2] + x[1::2])
        return (x[:, ::2] + x[:, 1::2]) / 4

    return tuple(map(halved, planes))


def _doubled(plane):
    """[h, w] -> [2 (h + 2 MARGIN), 2 (w + 2 MARGIN)], with halves of a sample."""
    before, behind = TAPS // 2 - 1, TAPS // 2
    x = jnp.pad(plane, (MARGIN + before, MARGIN + behind), mode="edge")
    for axis in (0, 1):
        size = x.shape[axis] - TAPS + 1
        parts = [lax.slice_in_dim(x, k, k + size, axis=axis) for k in range(TAPS)]
        half = sum(float(k) * p for k, p in zip(interpolation_kernel()[2], parts, strict=True))
        x = jnp.stack([parts[before], half], axis + 1)
        shape = [x.shape[0] * 2, x.shape[2]] if axis == 0 else [x.shape[0], x.shape[1] * 2]
        x = keep(x.reshape(shape))
    return x


def _cells(plane, size):
    """[h, w] -> [size, size, h / size, w / size]."""
    h, w = plane.shape
    return plane.reshape(h // size, size, w // size, size).transpose(1, 3, 0, 2)


def _slices(plane, starts, size):
    """Slices [n, size, size] of a plane, from starts [..., 2, rows, columns]."""
    starts = materialized(jnp.moveaxis(starts, -3, -1).reshape(-1, 2))

    def take(at):
        return lax.dynamic_slice(plane, (at[0], at[1]), (size, size))

    return materialized(jax.vmap(take)(starts))


def _patches(plane, starts, size):
    """Slices [size, size, ..., rows, columns] of a plane, from starts [..., 2, rows, columns]."""
    shape = starts.shape[:-3] + starts.shape[-2:]
    return keep(_slices(plane, starts, size).transpose(1, 2, 0).reshape(size, size, *shape))


def _square_error(theirs, ours):
    """Sums over the first two axes, written out so that compilers make one loop of them."""
    return sum(jnp.square(theirs[i, j] - ours[i, j]) for i, j in np.ndindex(ours.shape[:2]))


def _square_errors(patches, blocks):
    """Of all displacements: [n + m, n + m, ...], [n, n, ...] -> [m + 1, m + 1, ...]."""
    n, count = len(blocks), len(patches) - len(blocks) + 1
    total = 0
    for i, j in np.ndindex(n, n):
        total += jnp.square(patches[i : i + count, j : j + count] - blocks[i, j])
    return keep(total)


def _smooth(x):
    """Every position with halves of its neighbours' values, along both of the last axes."""
    for axis in (x.ndim - 2, x.ndim - 1):
        edges = [(0, 0)] * x.ndim
        edges[axis] = (1, 1)
        padded, size = keep(jnp.pad(x, edges, mode="edge")), x.shape[axis]
        before, here, after = (lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))
        x = here + (before + after) / 2
    return x


def _grid(x, mode):
    """Rows and columns of whole roots."""
    edges = [(0, -side % ROOT) for side in x.shape[-2:]]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + edges, mode=mode)


def _of_both(combine, x):
    """Of down and across, [..., 2, rows, columns]. Reductions over two are slow on CPUs."""
    return combine(x[..., 0, :, :], x[..., 1, :, :])


def _parts(x):
    return [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]


def _of_parts(combine, x):
    a, b, c, d = _parts(x)
    return combine(combine(a, b), combine(c, d))


def _pooled(x):
    return _of_parts(jnp.add, x)


def _spread(x, size):
    return jnp.repeat(jnp.repeat(x, size, -2), size, -1)
