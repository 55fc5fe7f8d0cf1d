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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from nvc_jax.entropy import tables as cdf_tables
from nvc_jax.entropy.tables import CdfTables
from nvc_jax.errors import NvcError, OtherTables, StreamError
from nvc_jax.machine import cores

SKIP = 0xFFFF
MAX_STREAMS = 8
MAX_LANES = 4
MAX_PAYLOAD_BYTES = 1 << 31

# What `status` returns.
OK = 0
BAD_PAYLOAD = 1  # the payload's trailer contradicts its length
BAD_INDEX = 2  # a table index that no table has

# The decoder's state, uint32: status, number of lanes, number of streams, one unused, then a record
# per stream: position and end in the payload's words, and low and high half of each lane.
_STATUS, _LANES, _STREAMS, _HEADER = 0, 1, 2, 4
STATE_WORDS = _HEADER + MAX_STREAMS * (2 + 2 * MAX_LANES)

# A lane starts (and, decoded, ends) here. Starting a lone lane low saves two bytes, which matters
# in a unit of fifty; below 2^12 a lane's first symbol costs what the low start saves. Several lanes
# share one sequence of words, and must not be below the bound at which words are taken.
_START_ALONE, _START_SHARED = 1 << 12, 1 << 31
# One more lane or stream costs about 5 bytes: less than 0.1 % of what it carries.
_MIN_LANE_BYTES = 6 << 10
_MIN_STREAM_BYTES = MAX_LANES * _MIN_LANE_BYTES
_MIN_STREAM_SYMBOLS = 1 << 16
_SAMPLES = 4096
_MAX_TRAILER_BYTES = (6 + 36 * (MAX_STREAMS - 1 + MAX_STREAMS * MAX_LANES) + 7) // 8

_U6, _U16, _U32, _U47, _U48, _U63 = (np.uint64(n) for n in (6, 16, 32, 47, 48, 63))
_LOW6, _LOW15, _LOW16, _LOW32 = (np.uint64((1 << n) - 1) for n in (6, 15, 16, 32))
_ONE, _TWO, _THREE = (np.uint64(n) for n in (1, 2, 3))
_TOTAL, _BOUND = np.uint64(1 << 16), np.uint64(1 << 31)


class PreparedTables(NamedTuple):
    """`CdfTables` arranged for the coder's inner loops, each of which reads one array of them.

    Attributes:
      bits: int32 [tables], expected code length of a symbol in 1/256 bit.
      encode: uint64; per table, a word
          position of its first entry | place of its escape << 32 | offset << 48 (signed)
        then per entry four words,
          multiplier, frequency << 47, 65536 - frequency, start | shift << 32
        where multiplier and shift divide by the frequency (see `prepare`).
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


def compiled(function: Callable) -> Callable:
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
    cost = ((17 - exponent) << 8) - ((frequency << 8) >> exponent) + escape * (16 << 8)
    bits = np.add.reduceat(cost * frequency, first) >> 16

    # x // f = (2 x m >> 64) >> s for x < 2^63, where s = ceil(log2 f), m = ceil(2^(63 + s) / f):
    # m < 2^64, and m / 2^(63 + s) exceeds 1 / f by less than 1 / 2^(63 + s), the quotient by less
    # than 2^-s <= 1 / f.
    shift, divisor = _pack(np.frexp(frequency - 1)[1]), _pack(frequency)
    whole, rest = np.divmod(np.uint64(1 << 63), divisor)
    multiplier = (whole << shift) + ((rest << shift) + divisor - _ONE) // divisor
    row = _pack(count + 4 * first, size - 1, offset & 0xFFFF, at=(0, 32, 48))
    entry = np.stack(
        [multiplier, divisor << _U47, _TOTAL - divisor, _pack(start, shift, at=(0, 32))], axis=1
    )
    encode = np.concatenate([row, entry.reshape(-1)])

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
# negative ones. Elements that are not coded are taken out beforehand, because a branch on them
# would often be mispredicted. The lanes are a tuple that rotates, so they live in registers; its
# length is part of its type, so each number of lanes gets its own machine code.


@compiled
def _survey(index, table_bits, distance):
    """(coded elements, their expected code length in 1/256 bit), from a sample."""
    coded, bits = 0, 0
    for i in range(0, len(index), distance):
        t = index[i]
        if t < len(table_bits):
            coded += 1
            bits += table_bits[t]
    return coded * distance, bits * distance


@compiled
def _count(index, tables):
    """Number of coded elements, or -1 if one names a table that is not there."""
    coded, bad = 0, 0
    for i in range(len(index)):
        t = index[np.uint64(i)]
        coded += t != SKIP
        bad += (t >= tables) & (t != SKIP)
    return -1 if bad else coded


@compiled
def _compact(values, index, compact):
    """Copies the coded elements' values; compact has one element more, which is overwritten."""
    k = np.uint64(0)
    for i in range(len(index)):
        compact[k] = values[np.uint64(i)]
        k += np.uint64(index[np.uint64(i)] != SKIP)


@compiled
def _spread(compact, index, values):
    """The reverse, with 0 for the other elements; compact has one element more here too."""
    k = np.uint64(0)
    for i in range(len(index)):
        values[np.uint64(i)] = compact[k]
        k += np.uint64(index[np.uint64(i)] != SKIP)
    # By itself, or the compiler puts a branch into the first loop.
    for i in range(len(index)):
        values[np.uint64(i)] *= np.int16(index[np.uint64(i)] != SKIP)


@compiled
def _encode(symbols, index, lanes, words, position, lookup):
    """Codes some elements of a step, last one first, as rANS has to.

    lanes is a tuple of uint64. Writes `words` downwards from `position`; returns the new position
    and lanes.
    """
    for _ in range(-len(index) % len(lanes)):
        lanes = lanes[-1:] + lanes[:-1]
    at = np.uint64(position)
    for j in range(len(index) - 1, -1, -1):
        i = np.uint64(j)
        x = lanes[-1]
        row = lookup[np.uint64(index[i])]
        place = np.uint64(symbols[i] - (np.int64(row) >> 48))
        escape = row >> _U32 & _LOW16
        # Words are stored whether they count or not, which needs no branch.
        if place >= escape:
            place = escape
            words[at - _ONE] = np.uint32(x)
            if x >= _ONE << _U47:
                at -= _ONE
                x >>= _U32
            x = x << _U16 | np.uint64(np.uint16(symbols[i]))
        e = (row & _LOW32) + (place << _TWO)
        words[at - _ONE] = np.uint32(x)
        if x >= lookup[e + _ONE]:
            at -= _ONE
            x >>= _U32
        w = lookup[e + _THREE]
        quotient = _multiply_high(x << _ONE, lookup[e]) >> (w >> _U32)
        x += (w & _LOW16) + quotient * lookup[e + _TWO]
        lanes = (x,) + lanes[:-1]  # noqa: RUF005 (numba cannot unpack)
    return np.int64(at), lanes


@compiled
def _decode(words, position, end, lanes, index, symbols, lookup):
    """Decodes some elements of a step into `symbols`.

    lanes is a tuple of uint64. Reads words[position:end]; returns the new position and lanes.
    """
    at, end = np.uint64(position), np.uint64(min(end, len(words)))
    for j in range(len(index)):
        i = np.uint64(j)
        x = lanes[0]
        slot = x & _LOW16
        t = np.uint64(index[i]) << _ONE
        row = lookup[t]
        w = lookup[(row >> _U6) + (slot >> (row & _LOW6))]
        start, frequency = w & _LOW16, w >> _U16 & _LOW16
        # Unsigned: this covers both sides, and `step` may be 2^64 - 1.
        if slot - start >= frequency:
            e = lookup[t + _ONE] + (w >> _U48 & _LOW15)
            step = _ONE if slot > start else ~np.uint64(0)
            while slot - start >= frequency:
                e += step
                w = lookup[e]
                start, frequency = w & _LOW16, w >> _U16 & _LOW16
        x = frequency * (x >> _U16) + slot - start
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
        lanes = lanes[1:] + (x,)  # noqa: RUF005
    for _ in range(-len(index) % len(lanes)):
        lanes = lanes[1:] + lanes[:1]
    return np.int64(at), lanes


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """One pool per process: a forked child cannot use its parent's threads."""
    return ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="nvc-coder")


def _share(job: Callable, streams: int, elements: int, threads: int | None) -> list:
    """[job(first, stop), ...] over ranges of streams, in parallel if there is enough to do."""
    if streams == 1 or threads == 1 or elements < _MIN_STREAM_SYMBOLS:
        return [job(0, streams)]
    threads = min(threads or cores(), streams)
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
      The payload; its layout is in the module's documentation. At most 4 bytes per coded element
      (an escape, at its worst) and 512 more.

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

    def code(first: int, stop: int) -> list[tuple[np.ndarray, list[int]]]:
        return [_encode_stream(flat, tables, s, chosen, lanes, start) for s in range(first, stop)]

    parts = [part for share in _share(code, chosen, coded, threads) for part in share]
    words = [part for part, _ in parts]
    if lanes == chosen == 1:
        (high,) = parts[0][1]
        trailer = _lone_trailer(high) if len(words[0]) or high != start else b""
    else:
        highs = [high for _, highs in parts for high in highs]
        trailer = _trailer(lanes, chosen, [len(part) for part in words[:-1]] + highs)
    return b"".join([*words, trailer])


def _part(step: np.ndarray, stream: int, streams: int) -> np.ndarray:
    """What a stream codes of a step, a view."""
    return step[stream * len(step) // streams : (stream + 1) * len(step) // streams]


def _encode_stream(
    steps: list, tables: PreparedTables, stream: int, streams: int, lane_count: int, start: int
) -> tuple[np.ndarray, list[int]]:
    """(words, h of each lane) of one stream; arrays in `steps` are flat."""
    lanes = (start,) * lane_count
    parts = [(_part(s, stream, streams), _part(i, stream, streams)) for s, i in steps]
    # At most 32 bits per element (an escape), the lanes' last words, and one that does not count.
    words = np.empty(sum(len(index) for _, index in parts) + 2 * lane_count + 1, "<u4")
    position = len(words)
    for symbols, index in reversed(parts):
        coded = _count(index, len(tables.bits))
        if coded < 0:
            table = int(index[(index != SKIP) & (index >= len(tables.bits))][0])
            raise NvcError(f"symbols use table {table}, but there are {len(tables.bits)} tables")
        if coded < len(index):
            symbols, index = _coded(symbols, index, coded), _coded(index, index, coded)
        position, lanes = _encode(symbols, index, _unsigned(lanes), words, position, tables.encode)
    highs = list(lanes)
    for lane in reversed(range(lane_count)):
        if highs[lane] >= _START_SHARED:
            position -= 1
            words[position] = highs[lane] & 0xFFFFFFFF
            highs[lane] >>= 32
    return words[position:], highs


def _coded(values: np.ndarray, index: np.ndarray, coded: int) -> np.ndarray:
    """The values of the `coded` elements whose index is not SKIP."""
    compact = np.empty(coded + 1, values.dtype)
    _compact(values, index, compact)
    return _frozen(compact[:coded], values.dtype)


def _unsigned(lanes: Iterable[int]) -> tuple[np.uint64, ...]:
    """What numba takes for unsigned: it returns Python's integers, and takes those for signed."""
    return tuple(np.uint64(x) for x in lanes)


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
    if lanes > MAX_LANES:
        raise StreamError(f"a unit claims {lanes} lanes")
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
    for record, count, high in zip(_records(state), counts, highs, strict=True):
        end = position + count
        low = words[position : position + lanes].astype(np.uint64) if count else None
        record[:2] = position + lanes if count else position, end
        high = np.array(high, np.uint64)
        _lanes(state, record)[:] = high << _U32 | low if count else high
        position = end
    return state


def _records(state: np.ndarray) -> np.ndarray:
    """The streams' records, a view: [streams, 2 + 2 * MAX_LANES]."""
    return state[_HEADER:].reshape(MAX_STREAMS, -1)[: state[_STREAMS]]


def _lanes(state: np.ndarray, record: np.ndarray) -> np.ndarray:
    """The lanes in a stream's record, a view: uint64 [lanes]."""
    return record[2:].view("<u8")[: state[_LANES]]


def decode_step(
    payload: np.ndarray,
    state: np.ndarray,
    index: np.ndarray,
    tables: PreparedTables,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one step; a pure function that never raises on bad data.

    Args:
      payload: uint8 [capacity], as for `begin_decode`; copied each time if it does not start at a
        multiple of 4 in memory (arrays of their own always do).
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
        streams = len(_records(state))

        def decode(first: int, stop: int) -> None:
            for s in range(first, stop):
                part = _part(symbols, s, streams)
                _decode_stream(words, state, s, _part(index, s, streams), part, tables)

        _share(decode, streams, index.size, threads)
        if state[_STATUS] != OK:
            symbols[:] = 0
    return symbols, state


def _decode_stream(words, state, stream, index, symbols, tables) -> None:
    """Decodes one stream's part of a step into `symbols` and updates its record in `state`."""
    coded = _count(index, len(tables.bits))
    if coded < 0:
        state[_STATUS] = BAD_INDEX
        return
    record = _records(state)[stream]
    lanes = _lanes(state, record)
    skips = coded < len(index)
    values = np.zeros(coded + 1, np.int16) if skips else symbols
    coded_index = _coded(index, index, coded) if skips else index
    record[0], lanes[:] = _decode(
        words, int(record[0]), int(record[1]), _unsigned(lanes), coded_index, values, tables.decode
    )
    if skips:
        _spread(values, index, symbols)


def status(state: np.ndarray) -> int:
    """OK, BAD_PAYLOAD or BAD_INDEX."""
    return int(state[_STATUS])


def finish_decode(payload: np.ndarray, state: np.ndarray) -> None:
    """Checks that all steps of a unit were decoded and the payload was used up exactly.

    Raises:
      StreamError: the payload is damaged.
      OtherTables: it was decoded with other tables, indices or steps than it was coded with.
    """
    state = np.ascontiguousarray(state, np.uint32)
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
    start = _START_ALONE if state[_LANES] == 1 else _START_SHARED
    if any(r[0] != r[1] or (_lanes(state, r) != start).any() for r in _records(state)):
        raise OtherTables(
            "the coded data of a picture does not end where its last symbol does: it was coded "
            "under other probability tables"
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
        place = symbols[coded] - (row.astype(np.int64) >> 48)
        escape = (place < 0) | (place >= last)
        place = np.where(escape, last, place).astype(np.uint64)
        frequency = tables.encode[first + (place << _TWO) + _ONE] >> _U47
        bits += 16.0 * (place.size + np.count_nonzero(escape)) - np.log2(frequency).sum()
    return float(bits)
