"""The host entropy coder: interleaved rANS over integer tables, numpy in, bytes or numpy out.

Integers only, so every machine writes and reads the same bytes. Asymmetric numeral systems are
Duda's (arXiv 1311.2540), interleaving is Giesen's (arXiv 1402.3392). A *unit* is coded in *steps*,
each a flat array of symbols with a table index per symbol; the decoder learns the indices of a
step only after decoding the one before, so it is called once per step and its whole state is an
array. Nothing here calls JAX: it is safe inside `jax.pure_callback`.

Payload of a unit
-----------------
    words of stream 0 | words of stream 1 | ... | trailer

A *word* is 32 bits, little-endian. The *trailer* is one little-endian integer of whole bytes, read
from its most significant bit downwards:

    0: one stream with one lane. The rest is its h (below). The trailer has 1 to 4 bytes, as many as
       leave whole words before it.
    1: then log2(lanes) in 2 bits, streams - 1 in 3 bits, for each stream except the last its number
       of words, and for each stream and each of its lanes h. Each of these numbers is written as n
       in 5 bits and its value in n bits. Zero bits fill up the last byte (the first in the file).

Stream s of S codes elements floor(s n / S) to floor((s + 1) n / S) of each step of n elements,
without those whose index is SKIP. The k-th coded element of a step in a stream belongs to lane
k mod lanes. Each lane is an integer x. Before the first step x is h if the stream has no words;
otherwise x = h 2^32 + word, each lane in turn taking the stream's next word. Decoding one element:

    slot = x mod 2^16;  entry = the one with start <= slot < start + frequency
    x = frequency floor(x / 2^16) + slot - start
    if x < 2^31 and the stream has words left: x = x 2^32 + next word

After an escape entry the same lane decodes the 16 bits of the value, as two's complement, by the
same rule with frequency 1 and start = slot. At the end every word has been used and every lane is
back at 2^12 (one lane per stream) or 2^31 (several). An empty payload is a unit in which nothing
was coded: one lane at 2^12, no words.

The final check finds most damage, but the last bits of a stream and units of a few bytes have
little redundancy: the container's checksums are what guarantees integrity.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from nvc_jax.entropy import tables as cdf_tables
from nvc_jax.entropy.tables import CdfTables
from nvc_jax.errors import NvcError, StreamError

SKIP = 0xFFFF
MAX_STREAMS = 8
MAX_LANES = 8
MAX_PAYLOAD_BYTES = 1 << 31

# What `status` returns.
OK = 0
BAD_PAYLOAD = 1  # the payload's trailer contradicts its length
BAD_INDEX = 2  # a table index that no table has

# The decoder's state, uint32: these three, then (position, end) of each stream in words, then
# (low, high) of each lane, MAX_LANES per stream.
_STATUS, _LANES, _STREAMS, _RANGES = 0, 1, 2, 3
_STATES = _RANGES + 2 * MAX_STREAMS
STATE_WORDS = _STATES + 2 * MAX_LANES * MAX_STREAMS

# A lane starts (and, decoded, ends) here. Starting a lone lane low saves two bytes, which matters
# in a unit of fifty; below 2^12 a lane's first symbol costs what the low start saves. Several lanes
# share one sequence of words, and must not be below the bound at which words are taken.
_START_ALONE, _START_SHARED = 1 << 12, 1 << 31
# One more lane or stream costs 5 bytes: at most 0.1 % of what it carries.
_MIN_LANE_BYTES = 6 << 10
_MIN_STREAM_BYTES = 4 * _MIN_LANE_BYTES
_MIN_STREAM_SYMBOLS = 1 << 16
_SAMPLES = 4096
_BLOCK = 2048
_MAX_TRAILER_BYTES = (6 + 36 * (MAX_STREAMS - 1 + MAX_STREAMS * MAX_LANES) + 7) // 8

_U16, _U32, _U47, _U48, _U63 = (np.uint64(n) for n in (16, 32, 47, 48, 63))
_ONE, _TOTAL = np.uint64(1), np.uint64(1 << 16)
_LOW15, _LOW16, _BOUND = np.uint64(0x7FFF), np.uint64(0xFFFF), np.uint64(1 << 31)


class PreparedTables(NamedTuple):
    """`CdfTables` arranged for the coder's inner loops, each of which reads one array of them.

    Attributes:
      bits: int32 [tables], expected code length of a symbol in 1/256 bit.
      encode: uint64; per table, a word
          position of its first entry | place of its escape << 32 | (offset + 32768) << 48
        then per entry two words, a multiplier and
          start | frequency << 16 | shift << 32
        which divide by the frequency (see `prepare`).
      decode: uint64; per table, two words
          position of its first cell << 6 | s
          position of its first entry
        then cells, then entries, both as words
          start | frequency << 16 | value << 32 | place in its table << 48 | is escape << 63.
        Cell c of a table is the entry that the middle of slots c 2^s to (c + 1) 2^s - 1 belongs to;
        most look-ups end there, the others walk to a neighbour.
    """

    bits: np.ndarray
    encode: np.ndarray
    decode: np.ndarray


def _jit(function: Callable) -> Callable:
    """Compiles without the interpreter lock, and remembers that on disk where that is possible."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return numba.njit(nogil=True)(function)


def _frozen(array, dtype) -> np.ndarray:
    """Flat, contiguous, read-only: one array type, so that each loop is compiled only once."""
    array = np.ascontiguousarray(array, dtype).reshape(-1)
    array.flags.writeable = False
    return array


def prepare(tables: CdfTables) -> PreparedTables:
    """Builds the look-up arrays of both directions, once per model.

    Raises:
      NvcError: the tables break a rule (see `tables.validate`).
    """
    cdf_tables.validate(tables)
    count = len(tables.size)
    size, offset = tables.size.astype(np.int64), tables.offset.astype(np.int64)
    first = np.cumsum(size) - size
    owner = np.repeat(np.arange(count), size)
    place = np.arange(len(owner)) - first[owner]
    escape = place == size[owner] - 1
    start = tables.cdf[owner, place].astype(np.int64)
    frequency = tables.cdf[owner, place + 1].astype(np.int64) - start

    # Only for choosing lanes and streams: log2 by linear interpolation between powers of two, which
    # keeps to integers.
    exponent = np.frexp(frequency)[1].astype(np.int64) - 1
    cost = (17 - exponent << 8) - ((frequency << 8) >> exponent) + escape * (16 << 8)
    bits = np.add.reduceat(cost * frequency, first) >> 16

    # x // f = (2 x m >> 64) >> s for x < 2^63, where s = ceil(log2 f), m = ceil(2^(63 + s) / f):
    # m < 2^64, and m / 2^(63 + s) exceeds 1 / f by less than 1 / 2^(63 + s), the quotient by less
    # than 2^-s <= 1 / f.
    shift, divisor = _pack(np.frexp(frequency - 1)[1]), _pack(frequency)
    whole, rest = np.divmod(np.uint64(1 << 63), divisor)
    multiplier = (whole << shift) + ((rest << shift) + divisor - _ONE) // divisor
    row = _pack(count + 2 * first, size - 1, offset + 32768, at=(0, 32, 48))
    entry = _pack(start, frequency, shift, at=(0, 16, 32))
    encode = np.concatenate([row, np.stack([multiplier, entry], axis=1).reshape(-1)])

    cell_bits = np.clip(np.frexp(size - 1)[1] + 1, 6, 9).astype(np.int64)
    cells = 1 << cell_bits
    first_cell = np.cumsum(cells) - cells
    owner_of_cell = np.repeat(np.arange(count), cells)
    width = 1 << 16 - cell_bits
    cell_start = (np.arange(len(owner_of_cell)) - first_cell[owner_of_cell]) * width[owner_of_cell]
    middle = cell_start + width[owner_of_cell] // 2
    found = np.searchsorted((owner << 16) + start, (owner_of_cell << 16) + middle, "right") - 1
    entry = _pack(
        start, frequency, (offset[owner] + place) & 0xFFFF, place, escape, at=(0, 16, 32, 48, 63)
    )
    rows = np.empty((count, 2), np.uint64)
    rows[:, 0] = _pack(2 * count + first_cell, at=(6,)) | _pack(16 - cell_bits)
    rows[:, 1] = 2 * count + len(owner_of_cell) + first
    decode = np.concatenate([rows.reshape(-1), entry[found], entry])
    return PreparedTables(
        *(_frozen(*a) for a in ((bits, np.int32), (encode, np.uint64), (decode, np.uint64)))
    )


def _pack(*fields: np.ndarray, at: tuple[int, ...] = (0,)) -> np.ndarray:
    """Packs non-negative integer fields into uint64, field k shifted to bit at[k]."""
    return functools.reduce(
        np.bitwise_or,
        (f.astype(np.uint64) << np.uint64(bit) for f, bit in zip(fields, at, strict=True)),
    )


@intrinsic
def _multiply_high(typing_context, a, b):
    """Upper 64 bits of a 64 x 64-bit product: one instruction that numba has no name for."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(128)
        a, b = (builder.zext(argument, wide) for argument in arguments)
        high = builder.lshr(builder.mul(a, b), ir.Constant(wide, 64))
        return builder.trunc(high, ir.IntType(64))

    return numba.uint64(numba.uint64, numba.uint64), generate


# The loops are written out: for each array that a helper in them would take, numba counts
# references, which makes them eight times slower. Unsigned positions keep numba from looking for
# negative ones. Elements that are not coded are sorted out in blocks beforehand, because a branch
# on them would often be mispredicted; a stream without any is spared that.


@_jit
def _survey(index, table_bits, distance):
    """(coded elements, their expected code length in 1/256 bit), from a sample."""
    coded, bits = 0, 0
    for i in range(0, len(index), distance):
        t = index[i]
        if t < len(table_bits):
            coded += 1
            bits += table_bits[t]
    return coded * distance, bits * distance


@_jit
def _count(index, first, stop, tables):
    """Number of coded elements among first..stop, or -1 if one names a table that is not there."""
    coded, bad = 0, 0
    for i in range(first, stop):
        t = index[np.uint64(i)]
        coded += t != SKIP
        bad += (t >= tables) & (t != SKIP)
    return -1 if bad else coded


@_jit
def _encode(symbols, index, first, stop, lanes, words, position, tables, lookup):
    """Codes elements first..stop of a step, last one first, as rANS has to.

    Updates `lanes` uint64 [lanes], writes `words` downwards from `position`; returns the new
    position, or -1 for a bad index.
    """
    left = _count(index, first, stop, tables)
    if left < 0:
        return -1
    order = np.empty(_BLOCK, np.uint32)
    sparse = left < stop - first
    mask = np.uint64(len(lanes) - 1)
    at = np.uint64(position)
    done = stop
    while left:
        low = max(done - _BLOCK, first)
        count = np.uint64(done - low)
        base = np.uint64(done - 1)
        if sparse:
            count = np.uint64(0)
            for j in range(done - 1, low - 1, -1):
                order[count] = j
                count += np.uint64(index[np.uint64(j)] != SKIP)
        done = low
        for k in range(count):
            left -= 1
            lane = np.uint64(left) & mask
            x = lanes[lane]
            i = base - np.uint64(k)
            if sparse:
                i = np.uint64(order[np.uint64(k)])
            t = np.uint64(index[i])
            r = lookup[t]
            place = np.uint64(np.int64(symbols[i]) + 32768) - (r >> _U48)
            last = r >> _U32 & _LOW16
            if place >= last:
                place = last
                words[at - _ONE] = np.uint32(x)
                if x >= _ONE << _U47:
                    at -= _ONE
                    x >>= _U32
                x = x << _U16 | np.uint64(np.uint16(symbols[i]))
            e = (r & np.uint64(0xFFFFFFFF)) + (place << _ONE)
            w = lookup[e + _ONE]
            frequency = w >> _U16 & _LOW16
            # Stored whether it counts or not, which needs no branch.
            words[at - _ONE] = np.uint32(x)
            if x >= frequency << _U47:
                at -= _ONE
                x >>= _U32
            quotient = _multiply_high(x << _ONE, lookup[e]) >> (w >> _U32)
            lanes[lane] = x + (w & _LOW16) + quotient * (_TOTAL - frequency)
    return np.int64(at)


@_jit
def _decode(words, state, first_stream, stop_stream, index, symbols, tables, lookup):
    """Decodes some streams' share of a step into `symbols` (zeros before), updating `state`."""
    streams = np.int64(state[_STREAMS])
    mask = np.uint64((state[_LANES] - 1) & (MAX_LANES - 1))
    n = len(index)
    order = np.empty(_BLOCK, np.uint32)
    lanes = np.empty(MAX_LANES, np.uint64)
    for s in range(first_stream, stop_stream):
        done, stop = s * n // streams, (s + 1) * n // streams
        coded = _count(index, done, stop, tables)
        sparse = coded < stop - done
        if coded < 0:
            state[_STATUS] = BAD_INDEX
            return
        at = np.uint64(state[_RANGES + 2 * s])
        end = np.uint64(min(np.int64(state[_RANGES + 2 * s + 1]), len(words)))
        home = _STATES + 2 * MAX_LANES * s
        for j in range(MAX_LANES):
            lanes[j] = np.uint64(state[home + 2 * j + 1]) << _U32 | np.uint64(state[home + 2 * j])
        next_lane = np.uint64(0)
        while done < stop:
            high = min(done + _BLOCK, stop)
            count = np.uint64(high - done)
            base = np.uint64(done)
            if sparse:
                count = np.uint64(0)
                for j in range(done, high):
                    order[count] = j
                    count += np.uint64(index[np.uint64(j)] != SKIP)
            done = high
            for k in range(count):
                lane = next_lane & mask
                next_lane += _ONE
                x = lanes[lane]
                i = np.uint64(k) + base
                if sparse:
                    i = np.uint64(order[np.uint64(k)])
                t = np.uint64(index[i])
                slot = x & _LOW16
                r = lookup[t << _ONE]
                w = lookup[(r >> np.uint64(6)) + (slot >> (r & np.uint64(63)))]
                # The first test covers both sides: below the start, the difference wraps around.
                if slot - (w & _LOW16) >= w >> _U16 & _LOW16:
                    e = lookup[(t << _ONE) + _ONE] + (w >> _U48 & _LOW15)
                    while slot < w & _LOW16:
                        e -= _ONE
                        w = lookup[e]
                    while slot - (w & _LOW16) >= w >> _U16 & _LOW16:
                        e += _ONE
                        w = lookup[e]
                x = (w >> _U16 & _LOW16) * (x >> _U16) + slot - (w & _LOW16)
                if x < _BOUND and at < end:
                    x = x << _U32 | np.uint64(words[at])
                    at += _ONE
                value = np.int16(w >> _U32)
                if w >> _U63:
                    value = np.int16(x)
                    x >>= _U16
                    if x < _BOUND and at < end:
                        x = x << _U32 | np.uint64(words[at])
                        at += _ONE
                symbols[i] = value
                lanes[lane] = x
        state[_RANGES + 2 * s] = at
        for j in range(MAX_LANES):
            state[home + 2 * j] = lanes[j] & np.uint64(0xFFFFFFFF)
            state[home + 2 * j + 1] = lanes[j] >> _U32


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """One pool per process: a forked child cannot use its parent's threads."""
    return ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="nvc-coder")


def _share(job: Callable, streams: int, elements: int, threads: int | None) -> list:
    """[job(first, stop), ...] over ranges of streams, in parallel if there is enough to do."""
    if streams == 1 or threads == 1 or elements < _MIN_STREAM_SYMBOLS:
        return [job(0, streams)]
    threads = min(threads or _cores(), streams)
    edges = [streams * k // threads for k in range(threads + 1)]
    pool = _pool(os.getpid())
    others = [pool.submit(job, *edges[k : k + 2]) for k in range(1, threads)]
    return [job(*edges[:2]), *(other.result() for other in others)]


def _worthwhile_streams(coded: int, code_bytes: int) -> int:
    streams = min(coded // _MIN_STREAM_SYMBOLS, code_bytes // _MIN_STREAM_BYTES, MAX_STREAMS)
    return 1 << max(streams, 1).bit_length() - 1  # a power of two: as many for each thread


def _worthwhile_lanes(stream_bytes: int) -> int:
    lanes = min(stream_bytes // _MIN_LANE_BYTES, MAX_LANES)
    return 1 << max(lanes, 1).bit_length() - 1


def encode(
    steps: Sequence[tuple[np.ndarray, np.ndarray]],
    tables: PreparedTables,
    streams: int | None = None,
    threads: int | None = None,
) -> bytes:
    """Codes a unit.

    Args:
      steps: (symbols int16 [n], table index uint16 [n]) in coding order, of any shapes (taken
        flat). Elements whose index is SKIP are not coded; they decode as 0.
      tables: from `prepare`.
      streams: 1..8 independent sub-streams; by default as many as the unit is worth.
      threads: at most so many threads (default: one per core); no influence on the result.

    Returns:
      The payload; its layout is in the module's documentation.

    Raises:
      NvcError: wrong dtypes or lengths, or an index that no table has.
    """
    flat = []
    for number, (symbols, index) in enumerate(steps):
        symbols, index = np.asarray(symbols), np.asarray(index)
        if symbols.dtype != np.int16 or index.dtype != np.uint16 or symbols.size != index.size:
            raise NvcError(
                f"coding step {number}: {symbols.size} symbols of {symbols.dtype} with "
                f"{index.size} indices of {index.dtype}; needs equally many int16 and uint16"
            )
        flat.append((_frozen(symbols, np.int16), _frozen(index, np.uint16)))
    if streams is not None and not 1 <= streams <= MAX_STREAMS:
        raise NvcError(f"{streams} coder streams were asked for; 1 to {MAX_STREAMS} are possible")

    coded = bits = 0
    for _, index in flat:
        # An odd distance visits every channel of the usual channel counts.
        distance = 1 if len(index) < _SAMPLES else len(index) // _SAMPLES | 1
        step_coded, step_bits = _survey(index, tables.bits, distance)
        coded, bits = coded + step_coded, bits + step_bits
    code_bytes = bits >> 11
    chosen = streams or _worthwhile_streams(coded, code_bytes)
    lanes = _worthwhile_lanes(code_bytes // chosen)
    start = _START_ALONE if lanes == 1 else _START_SHARED

    def code(first: int, stop: int) -> list[tuple[bytes, list[int]]]:
        return [_encode_stream(flat, tables, s, chosen, lanes, start) for s in range(first, stop)]

    parts = [part for share in _share(code, chosen, coded, threads) for part in share]
    words = b"".join(part for part, _ in parts)
    if lanes == chosen == 1:
        (high,) = parts[0][1]
        return words + _lone_trailer(high) if words or high != start else b""
    numbers = [len(part) // 4 for part, _ in parts[:-1]]
    numbers += [high for _, highs in parts for high in highs]
    return words + _trailer(lanes, chosen, numbers)


def _encode_stream(
    steps: list, tables: PreparedTables, stream: int, streams: int, lane_count: int, start: int
) -> tuple[bytes, list[int]]:
    """(words, h of each lane) of one stream; arrays in `steps` are flat."""
    lanes = np.full(lane_count, start, np.uint64)
    edges = [(stream * len(i) // streams, (stream + 1) * len(i) // streams) for _, i in steps]
    # At most 32 bits per element (an escape), the lanes' last words, and one that does not count.
    words = np.empty(sum(stop - first for first, stop in edges) + 2 * lane_count + 1, np.uint32)
    position = len(words)
    for (symbols, index), (first, stop) in zip(reversed(steps), reversed(edges), strict=True):
        position = _encode(
            symbols, index, first, stop, lanes, words, position,
            len(tables.bits), tables.encode,
        )  # fmt: skip
        if position < 0:
            table = int(index[(index != SKIP) & (index >= len(tables.bits))][0])
            raise NvcError(f"symbols use table {table}, but there are {len(tables.bits)} tables")
    highs = [int(x) for x in lanes]
    for lane in reversed(range(lane_count)):
        if highs[lane] >= _START_SHARED:
            position -= 1
            words[position] = highs[lane] & 0xFFFFFFFF
            highs[lane] >>= 32
    return words[position:].tobytes(), highs


def _lone_trailer(high: int) -> bytes:
    return high.to_bytes(high.bit_length() // 8 + 1, "little")


def _trailer(lanes: int, streams: int, numbers: list[int]) -> bytes:
    value, width = 1 << 5 | (lanes.bit_length() - 1) << 3 | streams - 1, 6
    for number in numbers:
        bits = number.bit_length()
        value, width = (value << 5 | bits) << bits | number, width + 5 + bits
    size = -(-width // 8)
    return (value << 8 * size - width).to_bytes(size, "little")


def _read_trailer(tail: bytes, payload_bytes: int) -> tuple[int, list[int], list[list[int]]]:
    """(lanes, words of each stream, h of each stream's lanes) from the payload's last bytes.

    Raises:
      StreamError: it does not fit the payload's length.
    """
    if payload_bytes == 0:
        return 1, [0], [[_START_ALONE]]
    if tail[-1] < 0x80:
        size = (payload_bytes - 1) % 4 + 1
        return 1, [payload_bytes // 4 - (size == 4)], [[int.from_bytes(tail[-size:], "little")]]
    value, left = int.from_bytes(tail, "little"), 8 * len(tail) - 1

    def take(bits: int) -> int:
        nonlocal left
        left -= bits
        if left < 0:
            raise StreamError("a unit's trailer is cut off")
        return value >> left & ((1 << bits) - 1)

    lanes, streams = 1 << take(2), take(3) + 1
    counts = [take(take(5)) for _ in range(streams - 1)]
    highs = [[take(take(5)) for _ in range(lanes)] for _ in range(streams)]
    words, rest = divmod(payload_bytes - len(tail) + left // 8, 4)
    counts.append(words - sum(counts))
    if rest or any(count < 0 or 0 < count < lanes for count in counts):
        raise StreamError("a unit's trailer contradicts its length")
    return lanes, counts, highs


def _as_words(payload: np.ndarray) -> np.ndarray:
    payload = np.ascontiguousarray(payload, np.uint8).reshape(-1)
    words = payload[: payload.size & ~3].view("<u4")
    return _frozen(words if words.flags.aligned else words.copy(), np.uint32)


def begin_decode(payload: np.ndarray, payload_bytes: int) -> np.ndarray:
    """The decoder's state before a unit's first step; never raises on bad data.

    Args:
      payload: uint8 [capacity], the payload and any padding; the same array is to be given to
        `decode_step`.
      payload_bytes: size of the payload.

    Returns:
      uint32 [STATE_WORDS].
    """
    state = np.zeros(STATE_WORDS, np.uint32)
    state[_LANES] = state[_STREAMS] = 1
    payload, payload_bytes = np.asarray(payload).reshape(-1), int(payload_bytes)
    if not 0 <= payload_bytes <= min(payload.size, MAX_PAYLOAD_BYTES):
        state[_STATUS] = BAD_PAYLOAD
        return state
    tail = payload[max(0, payload_bytes - _MAX_TRAILER_BYTES) : payload_bytes].tobytes()
    try:
        lanes, counts, highs = _read_trailer(tail, payload_bytes)
    except StreamError:
        state[_STATUS] = BAD_PAYLOAD
        return state
    state[_LANES], state[_STREAMS] = lanes, len(counts)
    words, position = _as_words(payload), 0
    for s, count in enumerate(counts):
        taken = lanes if count else 0
        state[_RANGES + 2 * s : _RANGES + 2 * s + 2] = position + taken, position + count
        home = state[_STATES + 2 * MAX_LANES * s :][: 2 * lanes].reshape(lanes, 2)
        if taken:
            home[:, 0], home[:, 1] = words[position : position + taken], highs[s]
        else:
            home[:, 0] = highs[s]
        position += count
    return state


def decode_step(
    payload: np.ndarray,
    state: np.ndarray,
    index: np.ndarray,
    tables: PreparedTables,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one step; a pure function that never raises on bad data.

    Args:
      payload: uint8 [capacity], as for `begin_decode`; not copied if capacity is a multiple of 4.
      state: uint32 [STATE_WORDS], from `begin_decode` or the step before.
      index: uint16 [n], table of each element, or SKIP.
      tables: from `prepare`.
      threads: at most so many threads (default: one per core); no influence on the result.

    Returns:
      symbols int16 [n], zeros if the status is (or becomes) bad, and the new state.
    """
    words, index = _as_words(payload), _frozen(index, np.uint16)
    state = np.array(state, np.uint32)
    symbols = np.zeros(index.size, np.int16)
    if state[_STATUS] == OK:

        def decode(first: int, stop: int) -> None:
            _decode(words, state, first, stop, index, symbols, len(tables.bits), tables.decode)

        _share(decode, int(state[_STREAMS]), index.size, threads)
        if state[_STATUS] != OK:
            symbols[:] = 0
    return symbols, state


def status(state: np.ndarray) -> int:
    """OK, BAD_PAYLOAD or BAD_INDEX."""
    return int(state[_STATUS])


def finish_decode(payload: np.ndarray, state: np.ndarray) -> None:
    """Checks that all steps of a unit were decoded and the payload was used up exactly.

    Raises:
      StreamError: the payload is damaged, or was decoded with other tables, indices or steps than
        it was coded with.
    """
    state = np.asarray(state)
    if status(state) == BAD_PAYLOAD:
        raise StreamError(
            "the coded data of a picture is damaged: its trailer contradicts its length "
            f"(buffer of {np.size(payload)} bytes)"
        )
    if status(state) == BAD_INDEX:
        raise StreamError(
            "a picture asks for a probability table that its model does not have; "
            "decode it with the model it was coded with"
        )
    lanes, streams = int(state[_LANES]), int(state[_STREAMS])
    ranges = state[_RANGES:_STATES].reshape(MAX_STREAMS, 2)[:streams]
    ends = state[_STATES:].reshape(MAX_STREAMS, MAX_LANES, 2)[:streams, :lanes]
    start = _START_ALONE if lanes == 1 else _START_SHARED
    if (ranges[:, 0] != ranges[:, 1]).any() or (ends != (start, 0)).any():
        raise StreamError(
            "the coded data of a picture does not end where its last symbol does: it is damaged, "
            "or this machine computed other probabilities than the one that coded it "
            "(re-encoding with a larger calibration margin helps against that)"
        )


def code_length_bits(
    steps: Sequence[tuple[np.ndarray, np.ndarray]], tables: PreparedTables
) -> float:
    """Ideal code length of a unit in bits: -log2 of the frequencies, 16 more for each escape."""
    bits = 0.0
    for symbols, index in steps:
        symbols, index = np.ravel(symbols), np.ravel(index)
        coded = index != SKIP
        row = tables.encode[index[coded]]
        first, last = row & np.uint64(0xFFFFFFFF), row >> _U32 & _LOW16
        place = symbols[coded].astype(np.int64) + 32768 - (row >> _U48).astype(np.int64)
        escape = (place < 0) | (place >= last)
        place = np.where(escape, last, place).astype(np.uint64)
        frequency = tables.encode[first + _ONE + (place << _ONE)] >> _U16 & _LOW16
        bits += 16.0 * (place.size + np.count_nonzero(escape)) - np.log2(frequency).sum()
    return float(bits)
