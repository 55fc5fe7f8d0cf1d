"""The host coder of motion fields: int16 [blocks down, blocks across, 3] to bytes and back.

Integers only, so every machine writes and reads the same bytes. A quadtree of nodes from 64x64
pixels down to single blocks says where the field is constant; each leaf is "none", or it takes the
vector of a neighbour (merge, as in HEVC), or it differs from the median of three neighbours (as in
H.263). Binary decisions go through a range coder (Martin 1979, with 32 bits and carries) under
probabilities that adapt at two rates (as in VVC). docs/bitstream.md describes every bit.

The code is exact: `decode` accepts what `encode` writes and nothing else, so that damage does not
pass as another spelling of a field. A damaged field can still be another legal one: the container's
checksums are what guarantees integrity.
"""

import numpy as np

from nvc_jax.entropy.coder import compiled
from nvc_jax.errors import StreamError

MAX_VECTOR = 2047  # of each component, in vector units
ROOT = 8  # blocks of the largest node, in each direction
CLASSES = 13  # of magnitudes: 0, 1, 2..3, 4..7, ..., up to 2 * MAX_VECTOR
# How far neighbours are apart in a component: 0, 1..2, 3..8, 9..32, more.
SPREAD_LIMITS = (0, 2, 8, 32)
SPREADS = 5

SLOW, FAST = 7, 4  # an estimate takes up 1/128, the other 1/16 of each decision
EVEN = -1  # in place of a context: probability one half, not adapted

# Where the contexts of each kind of decision begin.
SPLIT = 0  # node sizes 2, 4, 8 x smaller neighbours 0, 1, 2
MOVED = SPLIT + 9  # node sizes 1, 2, 4, 8 x neighbours with "none" 0, 1, 2
MERGE = MOVED + 12  # node sizes
WHICH = MERGE + 4  # the first of 2, the first and second of 3, the first to third of 4 candidates
OTHER = WHICH + 6  # down, across after down as predicted, across after another x spreads
CLASS = OTHER + 3 * SPREADS  # spreads x classes but the first and last
# Probabilities of 1 that estimates start from, in units of 2^-8: fitted to searched fields of
# training clips, kept from the extremes where there was little to fit to.
_CLASS_ROWS = (
    (115, 141, 154, 141, 87, 48, 48, 48, 48, 48, 48),
    (115, 87, 115, 141, 72, 48, 48, 48, 48, 48, 48),
    (184, 141, 102, 115, 87, 48, 48, 48, 48, 48, 48),
    (212, 212, 184, 141, 72, 48, 48, 48, 48, 48, 48),
    (236, 225, 225, 200, 154, 72, 48, 48, 48, 48, 48),
)
INITIAL = np.array(
    (44, 115, 169, 72, 141, 200, 115, 212, 236)
    + 4 * (250, 190, 110)
    + (154, 184, 200, 240)
    + (102, 102, 72, 141, 102, 48)
    + (169, 184, 212, 225, 225, 236, 240, 240, 240, 240, 141, 154, 184, 212, 225)
    + sum(_CLASS_ROWS, ())
)

# The range coder's state. `code` is what the encoder adds up, modulo 2^32, or how far the decoder's
# word lies above that.
_CODE, _RANGE, _POSITION, _DECODING = range(4)
_OK, _LIMIT, _RESPELT = range(3)
# Of a block, at most: fewer than 64 decisions of at most 10 bits each.
_MAX_BYTES = 80


@compiled
def _bit(bit, context, coder):
    """Codes a decision, or decodes and returns it."""
    estimates, state, data = coder
    span = state[_RANGE]
    bound = span >> 1
    if context != EVEN:
        slow, fast = estimates[context, 0], estimates[context, 1]
        # Probability of 1, in units of 2^-16.
        bound = (span >> 16) * ((np.int64(slow) + np.int64(fast)) >> 1)
    if state[_DECODING]:
        bit = np.int64(state[_CODE] < bound)
    if bit:
        state[_RANGE] = bound
    else:
        state[_RANGE] = span - bound
        if state[_DECODING]:
            state[_CODE] -= bound
        else:
            state[_CODE] += bound
            if state[_CODE] >> 32:
                state[_CODE] &= 0xFFFFFFFF
                _carry(data, state[_POSITION])
    if context != EVEN:
        if bit:
            estimates[context, 0] += (65535 - estimates[context, 0]) >> SLOW
            estimates[context, 1] += (65535 - estimates[context, 1]) >> FAST
        else:
            estimates[context, 0] -= estimates[context, 0] >> SLOW
            estimates[context, 1] -= estimates[context, 1] >> FAST
    while state[_RANGE] < 1 << 24:
        position = state[_POSITION]
        if state[_DECODING]:
            byte = np.int64(data[position]) if position < data.size else 0
            state[_CODE] = state[_CODE] << 8 | byte
        else:
            data[position] = state[_CODE] >> 24
            state[_CODE] = (state[_CODE] & 0xFFFFFF) << 8
        state[_POSITION] = position + 1
        state[_RANGE] <<= 8
    return bit


@compiled
def _carry(data, position):
    """Adds one to the last of the bytes written so far."""
    position -= 1
    while data[position] == 255:
        data[position] = 0
        position -= 1
    data[position] += 1


@compiled
def _difference(value, kind, apart, coder):
    """Codes how far a component is from its prediction; the neighbours are `apart` in it."""
    spread = 0
    for limit in SPREAD_LIMITS:
        spread += apart > limit
    context = OTHER + kind * SPREADS + spread
    if not _bit(np.int64(value != 0), context, coder):
        return 0
    magnitude, known, k = abs(value), 1, 1
    context = CLASS + spread * (CLASSES - 2) - 1
    while k < CLASSES - 1 and _bit(np.int64(magnitude >> k > 0), context + k, coder):
        k += 1
    negative = _bit(np.int64(value < 0), EVEN, coder)
    for i in range(k - 2, -1, -1):
        known = known << 1 | _bit(magnitude >> i & 1, EVEN, coder)
    return -known if negative else known


@compiled
def _uniform(field, y, x, height, width):
    for i in range(y, y + height):
        for j in range(x, x + width):
            for k in range(3):
                if field[i, j, k] != field[y, x, k]:
                    return False
    return True


@compiled
def _candidates(field, sizes, y, x, size, near):
    """Vectors of left, up and up-right, their median first, each once: into `near`.

    Returns (candidates, of left and up those with "none", how far apart they are in down, across).
    """
    across, found, none = field.shape[1], 0, 0
    for k in range(3):
        i, j = (y, x - 1) if k == 0 else (y - 1, x) if k == 1 else (y - 1, x + size)
        if i < 0 or j < 0 or j >= across or sizes[i, j] == 0:
            continue
        if field[i, j, 2]:
            found += 1
            near[found, 0], near[found, 1] = field[i, j, 0], field[i, j, 1]
        else:
            none += k < 2
    if found == 0:
        near[0, 0] = near[0, 1] = 0
        return 0, none, 0, 0
    # One that is missing or "none" counts as the first of those there are.
    second, third = 2 if found > 1 else 1, 3 if found > 2 else 1
    a0, b0, c0 = near[1, 0], near[second, 0], near[third, 0]
    a1, b1, c1 = near[1, 1], near[second, 1], near[third, 1]
    near[0, 0] = max(min(a0, b0), min(max(a0, b0), c0))
    near[0, 1] = max(min(a1, b1), min(max(a1, b1), c1))
    count = 1
    for k in range(1, found + 1):
        if _place(near, count, near[k, 0], near[k, 1]) == count:
            near[count, 0], near[count, 1] = near[k, 0], near[k, 1]
            count += 1
    return count, none, max(a0, b0, c0) - min(a0, b0, c0), max(a1, b1, c1) - min(a1, b1, c1)


@compiled
def _place(near, count, down, across):
    """Where the candidates have a vector; `count` if nowhere."""
    for k in range(count):
        if near[k, 0] == down and near[k, 1] == across:
            return k
    return count


@compiled
def _leaf(field, sizes, y, x, level, near, coder):
    """Codes block (y, x) of `field`, or decodes it into there. Returns a status."""
    count, none, apart0, apart1 = _candidates(field, sizes, y, x, 1 << level, near)
    v0, v1 = np.int64(field[y, x, 0]), np.int64(field[y, x, 1])
    moved = _bit(np.int64(field[y, x, 2]), MOVED + 3 * level + none, coder)
    if not moved:
        return _OK
    place = _place(near, count, v0, v1)
    if count and _bit(np.int64(place < count), MERGE + level, coder):
        context, k = WHICH + (count - 1) * (count - 2) // 2, 0
        while k < count - 1 and _bit(np.int64(place > k), context + k, coder):
            k += 1
        v0, v1 = near[k, 0], near[k, 1]
    else:
        d0 = _difference(v0 - near[0, 0], 0, apart0, coder)
        d1 = _difference(v1 - near[0, 1], 1 + (d0 != 0), apart1, coder)
        v0, v1 = near[0, 0] + d0, near[0, 1] + d1
        if abs(v0) > MAX_VECTOR or abs(v1) > MAX_VECTOR:
            return _LIMIT
        if _place(near, count, v0, v1) < count:
            return _RESPELT
    field[y, x, 0], field[y, x, 1], field[y, x, 2] = v0, v1, 1
    return _OK


@compiled
def _walk(field, coder):
    """Codes the field into `data`, or decodes it from there. Returns a status."""
    down, across, _ = field.shape
    sizes = np.zeros((down, across), np.uint8)  # of the node that a block is in; 0: not yet coded
    near = np.zeros((4, 2), np.int64)
    decoding = coder[1][_DECODING]
    roots = -(-across // ROOT)
    for root in range(-(-down // ROOT) * roots):
        place = 0  # of blocks in the root, in Z-order
        while place < ROOT * ROOT:
            y, x = root // roots * ROOT, root % roots * ROOT
            for i in range(3):
                x += (place >> 2 * i & 1) << i
                y += (place >> 2 * i & 2) >> 1 << i
            level = 3
            while place & ((1 << 2 * level) - 1):
                level -= 1
            # The nodes that begin here, from the largest, until one is a leaf.
            while level and y < down and x < across:
                size = 1 << level
                height, width = min(size, down - y), min(size, across - x)
                if height * width == 1:
                    break
                smaller = (x > 0 and sizes[y, x - 1] < size) + (y > 0 and sizes[y - 1, x] < size)
                split = not (decoding or _uniform(field, y, x, height, width))
                context = SPLIT + 3 * (level - 1) + smaller
                if not _bit(np.int64(split), context, coder):
                    break
                level -= 1
            size = 1 << level
            place += size * size
            if y >= down or x >= across:
                continue
            status = _leaf(field, sizes, y, x, level, near, coder)
            if status != _OK:
                return status
            for i in range(y, min(y + size, down)):
                for j in range(x, min(x + size, across)):
                    sizes[i, j] = size
                    for k in range(3):
                        field[i, j, k] = field[y, x, k]
    if decoding:
        for level in range(1, 4):
            for y in range(0, down, 1 << level):
                for x in range(0, across, 1 << level):
                    size = 1 << level
                    height, width = min(size, down - y), min(size, across - x)
                    if sizes[y, x] < size and _uniform(field, y, x, height, width):
                        return _RESPELT
    return _OK


def encode(field: np.ndarray) -> bytes:
    """Codes a motion field.

    Args:
      field: int16 [blocks down, blocks across, 3]: down and across in units of 1/PRECISION pixel,
        within -MAX_VECTOR..MAX_VECTOR, and 1; or 0, 0, 0 for "none".

    Raises:
      ValueError: the field is not like that.
    """
    field = np.asarray(field)
    if field.dtype != np.int16 or field.ndim != 3 or field.shape[2] != 3 or not field.size:
        raise ValueError(
            f"a motion field is int16 [blocks down, blocks across, 3], not {field.dtype} "
            f"{list(field.shape)}"
        )
    vectors, moved = field[..., :2].astype(np.int32), field[..., 2]
    if (np.abs(vectors) > MAX_VECTOR).any():
        raise ValueError(f"a motion field has vectors beyond {MAX_VECTOR}")
    if ((moved != 0) & (moved != 1)).any() or vectors[moved == 0].any():
        raise ValueError("a motion field's blocks are (down, across, 1), or (0, 0, 0) for none")
    return coded(field)


def coded(field: np.ndarray) -> bytes:
    """`encode` without its checks; stops at a vector beyond the limit."""
    data = np.empty(_MAX_BYTES * field[..., 0].size + 8, np.uint8)
    state = np.array([0, 1 << 32, 0, 0], np.int64)
    _walk(np.array(field, order="C"), (_estimates(), state, data))
    # As few bytes more as name a number that the last interval holds.
    low, span, position, _ = (int(x) for x in state)
    size = next(n for n in range(5) if _ceil(low, 32 - 8 * n) < low + span)
    last = _ceil(low, 32 - 8 * size)
    if last >> 32:
        _carry(data, position)
    return data[:position].tobytes() + (last & 0xFFFFFFFF).to_bytes(4, "big")[:size]


def decode(data: bytes, down: int, across: int) -> np.ndarray:
    """Decodes a motion field.

    Args:
      data: what `encode` returned.
      down, across: blocks, at least 1 each.

    Returns:
      int16 [down, across, 3].

    Raises:
      StreamError: `encode` returns such bytes for no field of this size.
    """
    field = np.zeros((down, across, 3), np.int16)
    state = np.array([int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 1 << 32, 4, 1], np.int64)
    status = _walk(field, (_estimates(), state, np.frombuffer(bytearray(data), np.uint8)))
    offset, span, position, _ = (int(x) for x in state)
    size = len(data) - (position - 4)
    if status == _LIMIT:
        raise StreamError(f"a unit's motion is damaged: a vector is beyond {MAX_VECTOR}")
    if status == _OK and not 0 <= size <= 4:
        raise StreamError("a unit's motion is damaged: it does not end where its last block does")
    # The last interval's number in the data has to be the one that the encoder chooses.
    if status == _OK:
        last = int.from_bytes(data[position - 4 :].ljust(4, b"\0"), "big")
        low = last - offset
        shorter = size > 0 and _ceil(low, 40 - 8 * size) < low + span
        if not shorter and _ceil(low, 32 - 8 * size) == last:
            return field
    raise StreamError("a unit's motion is damaged: no encoder writes it so")


def _estimates() -> np.ndarray:
    return np.repeat(INITIAL[:, None] << 8, 2, 1).astype(np.uint16)


def _ceil(value: int, bits: int) -> int:
    """The next multiple of 2^bits."""
    return -(-value >> bits) << bits
