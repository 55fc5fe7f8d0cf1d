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
from nvc_jax.nn.motion import MAX_VECTOR

ROOT = 8  # blocks of the largest node, in each direction
CLASSES = 13  # of magnitudes: 0, 1, 2..3, 4..7, ..., up to 2 * MAX_VECTOR
SLOW, FAST = 7, 4  # an estimate takes up 1/128, the other 1/16 of each decision
SPREADS = 4

# Where the contexts of each kind of decision begin.
SPLIT = 0  # 3 node sizes x 0, 1, 2 smaller neighbours
MOVED = SPLIT + 9  # 0, 1, 2 neighbours with "none"
MERGE = MOVED + 3  # 4 node sizes x 1, 2, 3 candidates
WHICH = MERGE + 16  # the first of two, of three; the second of three
CLASS = WHICH + 6  # (down, across after down = 0, across after another) x spreads x 12 decisions
TOP = CLASS + 3 * SPREADS * (CLASSES - 1)  # highest bit below the leading one, per class
CONTEXTS = TOP + CLASSES
INITIAL = np.full((CONTEXTS, 2), 32768, np.uint16)

# The range coder's state. `code` is what the encoder adds up, modulo 2^32, or how far the decoder's
# word lies above that.
_CODE, _RANGE, _POSITION, _DECODING = range(4)
_OK, _LIMIT, _RESPELT = range(3)
# Of a block, at most: fewer than 64 decisions of at most 10 bits each.
_MAX_BYTES = 80


@compiled
def _bit(bit, context, estimates, state, data):
    """Codes a decision, or decodes and returns it. Contexts below 0: one half, never adapted."""
    span = state[_RANGE]
    bound = span >> 1
    if context >= 0:
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
    if context >= 0:
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
def _difference(value, kind, spread, estimates, state, data):
    """A component's difference to its prediction."""
    size, magnitude = 0, abs(value)
    while magnitude >> size:
        size += 1
    first, k = CLASS + (kind * SPREADS + spread) * (CLASSES - 1), 0
    while k < CLASSES - 1 and _bit(np.int64(size > k), first + k, estimates, state, data):
        k += 1
    if k == 0:
        return 0
    negative = _bit(np.int64(value < 0), -1, estimates, state, data)
    decoded = 1
    for i in range(k - 2, -1, -1):
        context = TOP + k if i == k - 2 else -1
        bit = _bit((magnitude >> i) & 1, context, estimates, state, data)
        decoded = decoded << 1 | bit
    return -decoded if negative else decoded


@compiled
def _uniform(field, y, x, height, width):
    for i in range(y, y + height):
        for j in range(x, x + width):
            for k in range(3):
                if field[i, j, k] != field[y, x, k]:
                    return False
    return True


@compiled
def _leaf(field, sizes, y, x, level, count, candidates, merge, estimates, state, data):
    """Codes the vector at (y, x) of `field`, or decodes it into there. Returns a status."""
    down, across, _ = field.shape
    still = 0
    found = 0
    # Left, up, up-right.
    for k in range(3):
        i, j = (y, x - 1) if k == 0 else (y - 1, x) if k == 1 else (y - 1, x + count)
        if i < 0 or j < 0 or j >= across or sizes[i, j] == 0:
            continue
        if field[i, j, 2] == 0:
            still += k < 2
            continue
        candidates[found, 0], candidates[found, 1] = field[i, j, 0], field[i, j, 1]
        found += 1
    moved = _bit(np.int64(field[y, x, 2]), MOVED + still, estimates, state, data)
    field[y, x, 2] = moved
    if not moved:
        return _OK
    p0, p1, s0, s1 = 0, 0, 0, 0
    if found > 0:
        a0, a1 = candidates[0, 0], candidates[0, 1]
        b0, b1, c0, c1 = a0, a1, a0, a1
        if found > 1:
            b0, b1 = candidates[1, 0], candidates[1, 1]
        if found > 2:
            c0, c1 = candidates[2, 0], candidates[2, 1]
        p0 = max(min(a0, b0), min(max(a0, b0), c0))
        p1 = max(min(a1, b1), min(max(a1, b1), c1))
        s0 = max(a0, b0, c0) - min(a0, b0, c0)
        s1 = max(a1, b1, c1) - min(a1, b1, c1)
    # The median and those that differ from it and from each other.
    distinct = 0
    if found > 0:
        merge[0, 0], merge[0, 1], distinct = p0, p1, 1
    for k in range(found):
        new = True
        for i in range(distinct):
            if merge[i, 0] == candidates[k, 0] and merge[i, 1] == candidates[k, 1]:
                new = False
        if new:
            merge[distinct, 0], merge[distinct, 1] = candidates[k, 0], candidates[k, 1]
            distinct += 1
    which = 0
    while which < distinct and (
        merge[which, 0] != field[y, x, 0] or merge[which, 1] != field[y, x, 1]
    ):
        which += 1
    if distinct > 0:
        context = MERGE + 4 * level + distinct - 1
        if _bit(np.int64(which < distinct), context, estimates, state, data):
            k = 0
            while k < distinct - 1 and _bit(
                np.int64(which > k),
                WHICH + (distinct - 2) * (distinct - 1) // 2 + k,
                estimates,
                state,
                data,
            ):
                k += 1
            field[y, x, 0], field[y, x, 1] = merge[k, 0], merge[k, 1]
            return _OK
    v0 = p0 + _difference(field[y, x, 0] - p0, 0, _spread(s0), estimates, state, data)
    kind = 1 + np.int64(v0 != p0)
    v1 = p1 + _difference(field[y, x, 1] - p1, kind, _spread(s1), estimates, state, data)
    if abs(v0) > MAX_VECTOR or abs(v1) > MAX_VECTOR:
        return _LIMIT
    for k in range(distinct):
        if merge[k, 0] == v0 and merge[k, 1] == v1:
            return _RESPELT
    field[y, x, 0], field[y, x, 1] = v0, v1
    return _OK


@compiled
def _spread(apart):
    return np.int64(apart > 0) + np.int64(apart > 2) + np.int64(apart > 8)


@compiled
def _walk(field, estimates, state, data):
    """Codes the field into `data`, or decodes it from there. Returns a status."""
    down, across, _ = field.shape
    sizes = np.zeros((down, across), np.uint8)  # of the leaf that a block is in; 0: not yet coded
    candidates = np.zeros((3, 2), np.int64)
    merge = np.zeros((4, 2), np.int64)
    for root in range(-(-down // ROOT) * -(-across // ROOT)):
        top, left = root // -(-across // ROOT) * ROOT, root % -(-across // ROOT) * ROOT
        place = 0  # of blocks in the root, in Z-order
        while place < ROOT * ROOT:
            y, x = top, left
            for i in range(3):
                x += (place >> 2 * i & 1) << i
                y += (place >> 2 * i + 1 & 1) << i
            level = 3
            while place & ((1 << 2 * level) - 1):
                level -= 1
            if y >= down or x >= across:
                place += 1 << 2 * level
                continue
            # The nodes that begin here, from the largest, until one is a leaf.
            while level > 0:
                size = 1 << level
                height, width = min(size, down - y), min(size, across - x)
                if height * width == 1:
                    break
                smaller = 0
                if x > 0:
                    smaller += sizes[y, x - 1] < size
                if y > 0:
                    smaller += sizes[y - 1, x] < size
                split = not state[_DECODING] and not _uniform(field, y, x, height, width)
                context = SPLIT + 3 * (level - 1) + smaller
                if not _bit(np.int64(split), context, estimates, state, data):
                    break
                level -= 1
            size = 1 << level
            status = _leaf(
                field, sizes, y, x, level, size, candidates, merge, estimates, state, data
            )
            if status != _OK:
                return status
            for i in range(y, min(y + size, down)):
                for j in range(x, min(x + size, across)):
                    sizes[i, j] = size
                    for k in range(3):
                        field[i, j, k] = field[y, x, k]
            place += size * size
    if state[_DECODING]:
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
    data = np.empty(_MAX_BYTES * moved.size + 8, np.uint8)
    state = np.array([0, 1 << 32, 0, 0], np.int64)
    _walk(np.array(field, order="C"), INITIAL.copy(), state, data)
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
    status = _walk(field, INITIAL.copy(), state, np.frombuffer(bytearray(data), np.uint8))
    if status == _LIMIT:
        raise StreamError(f"a unit's motion is damaged: a vector is beyond {MAX_VECTOR}")
    offset, span, position, _ = (int(x) for x in state)
    if status == _OK and not position - 4 <= len(data) <= position:
        raise StreamError("a unit's motion is damaged: it does not end where its last block does")
    # The number read, in the last interval, has to be the one that the encoder chooses.
    size = len(data) - (position - 4)
    last = int.from_bytes(data[len(data) - size :].ljust(4, b"\0"), "big") if size else 0
    low = last - offset
    shorter = size and _ceil(low, 40 - 8 * size) < low + span
    if status == _RESPELT or shorter or _ceil(low, 32 - 8 * size) != last:
        raise StreamError("a unit's motion is damaged: no encoder writes it so")
    return field


def _ceil(value: int, bits: int) -> int:
    """The next multiple of 2^bits."""
    return -(-value >> bits) << bits
