"""The host entropy coder: everything comes back, sizes are near the ideal, damage is harmless."""

import concurrent.futures
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.benchmarks.coder import benchmark
from nvc_jax.entropy import coder
from nvc_jax.entropy.tables import CdfTables, validate
from nvc_jax.errors import NvcError, StreamError


def make_tables(frequencies, offsets) -> CdfTables:
    size = np.array([len(f) for f in frequencies], np.int32)
    cdf = np.full((len(size), size.max() + 1), 65536, np.uint32)
    for row, f in zip(cdf, frequencies, strict=True):
        row[: len(f) + 1] = np.concatenate([[0], np.cumsum(f)])
    return CdfTables(cdf, size, np.array(offsets, np.int32))


def random_tables(rng, count, max_size) -> CdfTables:
    frequencies, offsets = [], []
    for _ in range(count):
        size = int(rng.integers(2, max_size + 1))
        # From nearly uniform to one entry with nearly everything.
        weights = rng.exponential(size=size) ** rng.choice([0.1, 1, 5, 20])
        f = 1 + np.floor(weights / weights.sum() * (65536 - size)).astype(int)
        f[np.argmax(f)] += 65536 - f.sum()
        frequencies.append(f)
        offsets.append(int(rng.integers(-32768, 32768 - size + 2)))
    return make_tables(frequencies, offsets)


def gaussian_tables(levels=64, low=0.11, high=32.0):
    scales = np.exp(np.linspace(math.log(low), math.log(high), levels))
    frequencies, offsets = [], []
    for scale in scales:
        radius = max(1, math.ceil(4.3 * scale))
        edges = (np.arange(-radius, radius + 2) - 0.5) / scale / math.sqrt(2)
        pmf = np.diff([0.5 * math.erfc(-e) for e in edges])
        f = np.maximum(1, np.round(np.append(pmf, 0) * 65536)).astype(int)
        f[radius] += 65536 - f.sum()
        frequencies.append(f)
        offsets.append(-radius)
    return scales, make_tables(frequencies, offsets)


SCALES, GAUSSIAN = gaussian_tables()
PREPARED = coder.prepare(GAUSSIAN)


def gaussian_symbols(rng, n, mean_index):
    """mean_index None: all tables equally often; otherwise mostly the narrow ones."""
    if mean_index is None:
        index = rng.integers(0, len(SCALES), n)
    else:
        index = np.minimum(len(SCALES) - 1, rng.exponential(mean_index, n)).astype(int)
    symbols = np.round(rng.normal(size=n) * SCALES[index])
    return symbols.astype(np.int16), index.astype(np.uint16)


def sampled(rng, tables, n, skip, escapes):
    """Symbols drawn from their tables, a share `skip` not coded, a share `escapes` anything."""
    index = rng.integers(0, len(tables.size), n)
    draws = rng.integers(0, 65536, n)
    place = np.array(
        [np.searchsorted(tables.cdf[t], d, "right") - 1 for t, d in zip(index, draws, strict=True)]
    ).reshape(n)
    symbols = (tables.offset[index] + place).astype(np.int16)
    anything = (rng.random(n) < escapes) | (place == tables.size[index] - 1)
    symbols = np.where(anything, rng.integers(-32768, 32768, n), symbols).astype(np.int16)
    skipped = rng.random(n) < skip
    index = np.where(skipped, coder.SKIP, index).astype(np.uint16)
    return np.where(skipped, 0, symbols).astype(np.int16), index


def padded(payload: bytes, capacity=None) -> np.ndarray:
    buffer = np.zeros(capacity or (len(payload) + 7) // 4 * 4, np.uint8)
    buffer[: len(payload)] = np.frombuffer(payload, np.uint8)
    return buffer


def decode(payload: bytes, indices, prepared, buffer=None, **options):
    buffer = padded(payload) if buffer is None else buffer
    state = coder.begin_decode(buffer, len(payload))
    decoded = []
    for index in indices:
        symbols, state = coder.decode_step(buffer, state, index, prepared, **options)
        decoded.append(symbols)
    coder.finish_decode(buffer, state)
    return decoded


def assert_round_trip(steps, prepared, **options) -> bytes:
    payload = coder.encode(steps, prepared, **options)
    decoded = decode(payload, [index for _, index in steps], prepared)
    for (symbols, _), got in zip(steps, decoded, strict=True):
        np.testing.assert_array_equal(got, symbols)
    return payload


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from([0, 1, 2, 7, 64, 500]), min_size=0, max_size=5),
    max_size=st.sampled_from([2, 3, 20, 300]),
    skip=st.sampled_from([0, 0.3, 0.99, 1]),
    escapes=st.sampled_from([0, 0.01, 1]),
    streams=st.sampled_from([None, 1, 2, 3, 8]),
)
def test_every_unit_comes_back(seed, sizes, max_size, skip, escapes, streams):
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, int(rng.integers(1, 6)), max_size)
    steps = [sampled(rng, tables, n, skip, escapes) for n in sizes]
    prepared = coder.prepare(tables)
    payload = assert_round_trip(steps, prepared, streams=streams)
    bits = coder.code_length_bits(steps, prepared)
    assert len(payload) <= bits / 8 * 1.001 + 6 * (streams or 1)


def test_all_int16_values_come_back():
    symbols = np.arange(-32768, 32768).astype(np.int16)
    for index in (0, 63):
        steps = [(symbols, np.full(symbols.shape, index, np.uint16))]
        for streams in (1, 8):
            assert_round_trip(steps, PREPARED, streams=streams)


def test_wide_and_many_tables():
    rng = np.random.default_rng(5)
    wide = make_tables([[65536 - 32766] + [1] * 32766, [1] * 5 + [65531], [1, 65535]], [-9, 0, 7])
    validate(wide)
    symbols = rng.integers(-9, 32757, 3000).astype(np.int16)
    assert_round_trip([(symbols, rng.integers(0, 3, 3000).astype(np.uint16))], coder.prepare(wide))
    many = random_tables(rng, 8000, 12)
    assert_round_trip([sampled(rng, many, 5000, 0.2, 0.01)], coder.prepare(many))


@pytest.mark.parametrize("mean_index", [None, 8, 0.5])
def test_large_units_use_streams_and_come_back(mean_index):
    rng = np.random.default_rng(1)
    steps = [gaussian_symbols(rng, n, mean_index) for n in (1000, 300_000, 299_999, 7)]
    payload = assert_round_trip(steps, PREPARED)
    state = coder.begin_decode(padded(payload), len(payload))
    bits = coder.code_length_bits(steps, PREPARED)
    assert len(payload) <= bits / 8 * 1.001 + 4
    assert state[1] > 1 or bits / 8 < 13_000  # several lanes where that costs little


def test_bytes_do_not_depend_on_threads():
    steps = [gaussian_symbols(np.random.default_rng(2), 400_000, None)]
    payloads = {coder.encode(steps, PREPARED, threads=t) for t in (1, 2, 3, 8)}
    assert len(payloads) == 1
    (payload,) = payloads
    for threads in (1, 2, 3, 8):
        (got,) = decode(payload, [steps[0][1]], PREPARED, threads=threads)
        np.testing.assert_array_equal(got, steps[0][0])


def test_payload_is_frozen():
    """The layout that the module documents, decoded and written out by hand."""
    tables = make_tables([[16384, 32768, 8192, 8192]], [-1])
    steps = [(np.array([0, -1, 1, 100], np.int16), np.zeros(4, np.uint16))]
    payload = coder.encode(steps, coder.prepare(tables))
    x = 1 << 12
    for start, frequency in ((100, 1), (57344, 8192), (49152, 8192), (0, 16384), (16384, 32768)):
        x = (x // frequency << 16) + x % frequency + start
    assert payload == (x & 0xFFFFFFFF).to_bytes(4, "little") + (x >> 32).to_bytes(1, "little")


def decode_by_the_book(payload: bytes, indices, tables):
    """The module's documentation, word for word, with Python's integers."""
    bits = "".join(f"{byte:08b}" for byte in reversed(payload))
    used = 1

    def take(n):
        nonlocal used
        used += n
        return int("0" + bits[used - n : used], 2)

    lanes, streams = 1, 1
    if not payload:
        counts, highs = [0], [[1 << 12]]
    elif bits[0] == "0":
        size = (len(payload) - 1) % 4 + 1
        counts, highs = [], [[take(8 * size - 1)]]
    else:
        lanes, streams = 1 << take(2), take(3) + 1
        counts = [take(take(5)) for _ in range(streams - 1)]
        highs = [[take(take(5)) for _ in range(lanes)] for _ in range(streams)]
    end = len(payload) - math.ceil(used / 8) if payload else 0
    words = [int.from_bytes(payload[i : i + 4], "little") for i in range(0, end, 4)]
    counts += [len(words) - sum(counts)] * (len(counts) < streams)
    decoded = [np.zeros(index.size, np.int16) for index in indices]
    for s in range(streams):
        left = words[sum(counts[:s]) : sum(counts[: s + 1])]
        x = [h << 32 | left.pop(0) if counts[s] else h for h in highs[s]]

        def read(lane, start, frequency, x=x, left=left):
            x[lane] = frequency * (x[lane] >> 16) + x[lane] % 65536 - start
            if x[lane] < 1 << 31 and left:
                x[lane] = x[lane] << 32 | left.pop(0)

        for index, symbols in zip(indices, decoded, strict=True):
            part = range(s * index.size // streams, (s + 1) * index.size // streams)
            for k, i in enumerate(i for i in part if index[i] != coder.SKIP):
                t, lane = index[i], k % lanes
                place = np.searchsorted(tables.cdf[t], x[lane] % 65536, "right") - 1
                start, stop = (int(c) for c in tables.cdf[t, place : place + 2])
                read(lane, start, stop - start)
                symbols[i] = np.int64(tables.offset[t] + place).astype(np.int16)
                if place == tables.size[t] - 1:
                    symbols[i] = np.uint16(x[lane] % 65536).astype(np.int16)
                    read(lane, x[lane] % 65536, 1)
        assert not left
        assert set(x) == {1 << 12 if lanes == 1 else 1 << 31}
    return decoded


@pytest.mark.parametrize(
    ("sizes", "streams", "lanes"),
    [
        ((3, 50), 1, 1),
        ((300,), 3, 1),
        ((9, 16_001), 1, 2),
        ((30_000, 1), 1, 4),
        ((0, 30_000), 2, 2),
    ],
)
def test_payload_is_what_the_documentation_says(sizes, streams, lanes):
    rng = np.random.default_rng(10)
    tables = make_tables([[256] * 256, [1] * 200 + [65336]], [-128, 30_000])
    steps = []
    for n in sizes:
        index = np.where(rng.random(n) < 0.01, 1, 0)
        skipped = rng.random(n) < 0.02
        symbols = np.where(index == 1, rng.integers(-32768, 32768, n), rng.integers(-128, 128, n))
        index = np.where(skipped, coder.SKIP, index).astype(np.uint16)
        steps.append((np.where(skipped, 0, symbols).astype(np.int16), index))
    payload = assert_round_trip(steps, coder.prepare(tables), streams=streams)
    assert coder.begin_decode(padded(payload), len(payload))[1:3].tolist() == [lanes, streams]
    decoded = decode_by_the_book(payload, [index for _, index in steps], tables)
    for (symbols, _), got in zip(steps, decoded, strict=True):
        np.testing.assert_array_equal(got, symbols)


@pytest.mark.parametrize(("mean_index", "bits"), [(None, (2.8, 3.6)), (8, (0.35, 0.55))])
def test_overhead_is_at_most_a_thousandth(mean_index, bits):
    rng = np.random.default_rng(3)
    for n in (100_000, 150_000, 600_000):
        steps = [gaussian_symbols(rng, n, mean_index)]
        ideal = coder.code_length_bits(steps, PREPARED)
        assert bits[0] < ideal / n < bits[1]
        assert 8 * len(coder.encode(steps, PREPARED)) <= 1.001 * ideal


def test_small_units_stay_small():
    rng = np.random.default_rng(4)
    for n in (1, 10, 100, 1000, 10_000):
        for mean_index in (None, 8, 0.5):
            steps = [gaussian_symbols(rng, n, mean_index)]
            size = len(coder.encode(steps, PREPARED))
            assert size <= coder.code_length_bits(steps, PREPARED) / 8 + 4
    skipped = np.full(1000, coder.SKIP, np.uint16)
    assert coder.encode([(np.zeros(1000, np.int16), skipped)], PREPARED) == b""
    assert coder.encode([], PREPARED) == b""


def test_code_length_counts_escapes():
    tables = coder.prepare(make_tables([[32768, 16384, 16384]], [5]))
    step = np.array([5, 6, 7, -1, 9], np.int16), np.array([0, 0, 0, 0, coder.SKIP], np.uint16)
    assert coder.code_length_bits([step], tables) == 1 + 2 + 18 + 18


def test_shapes_and_read_only_inputs():
    rng = np.random.default_rng(6)
    symbols, index = gaussian_symbols(rng, 24, None)
    expected = coder.encode([(symbols, index)], PREPARED)
    symbols, index = symbols.reshape(1, 2, 3, 4), np.asfortranarray(index.reshape(1, 2, 3, 4))
    symbols.flags.writeable = False
    assert coder.encode([(symbols, index)], PREPARED) == expected
    assert index.flags.writeable
    buffer = padded(expected)
    buffer.flags.writeable = False
    (got,) = decode(expected, [index], PREPARED, buffer)
    np.testing.assert_array_equal(got, symbols.ravel())


def test_any_buffer_will_do():
    steps = [gaussian_symbols(np.random.default_rng(7), 300, None)]
    payload = coder.encode(steps, PREPARED)
    for capacity in range(len(payload), len(payload) + 5):
        (got,) = decode(payload, [steps[0][1]], PREPARED, padded(payload, capacity))
        np.testing.assert_array_equal(got, steps[0][0])
    shifted = np.zeros(len(payload) + 1, np.uint8)
    shifted[1:] = np.frombuffer(payload, np.uint8)
    (got,) = decode(payload, [steps[0][1]], PREPARED, shifted[1:])
    np.testing.assert_array_equal(got, steps[0][0])


def test_decoding_is_a_pure_function():
    rng = np.random.default_rng(8)
    steps = [gaussian_symbols(rng, n, None) for n in (100, 50_000)]
    payload = coder.encode(steps, PREPARED, streams=2)
    buffer = padded(payload)
    states = [coder.begin_decode(buffer, len(payload))]
    for symbols, index in steps:
        before = states[-1].copy()
        for _ in range(2):
            got, after = coder.decode_step(buffer, states[-1], index, PREPARED)
            np.testing.assert_array_equal(got, symbols)
            np.testing.assert_array_equal(states[-1], before)
        states.append(after)
    coder.finish_decode(buffer, states[-1])
    assert states[-1].shape == (coder.STATE_WORDS,)
    assert states[-1].dtype == np.uint32


def test_units_decode_in_parallel():
    units = [[gaussian_symbols(np.random.default_rng(s), 200_000, 8)] for s in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        payloads = list(pool.map(lambda u: coder.encode(u, PREPARED, streams=4), units))
        jobs = zip(payloads, units, strict=True)
        decoded = list(pool.map(lambda j: decode(j[0], [j[1][0][1]], PREPARED)[0], jobs))
    for unit, got in zip(units, decoded, strict=True):
        np.testing.assert_array_equal(got, unit[0][0])


def survives(payload: bytes, payload_bytes: int, indices) -> bool:
    """Decodes damaged data: must neither raise (but at the end) nor return anything odd."""
    buffer = padded(payload)
    state = coder.begin_decode(buffer, payload_bytes)
    for index in indices:
        symbols, state = coder.decode_step(buffer, state, index, PREPARED)
        assert symbols.shape == index.shape
        assert symbols.dtype == np.int16
        if coder.status(state) != coder.OK:
            assert not symbols.any()
    try:
        coder.finish_decode(buffer, state)
    except StreamError:
        return False
    return coder.status(state) == coder.OK


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    streams=st.sampled_from([None, 2, 8]),
    damage=st.sampled_from(["flip", "cut", "noise", "extend"]),
)
def test_damage_is_harmless(seed, streams, damage):
    rng = np.random.default_rng(seed)
    steps = [gaussian_symbols(rng, n, 30) for n in (20, 400, 3000)]
    payload = bytearray(coder.encode(steps, PREPARED, streams=streams))
    if damage == "flip":
        for _ in range(rng.integers(1, 5)):
            payload[rng.integers(len(payload))] ^= 1 << rng.integers(8)
    elif damage == "cut":
        del payload[rng.integers(len(payload)) :]
    elif damage == "noise":
        payload = bytearray(rng.bytes(rng.integers(0, 1000)))
    else:
        payload += rng.bytes(rng.integers(1, 9))
    survives(bytes(payload), len(payload), [index for _, index in steps])


@settings(max_examples=200)
@given(payload=st.binary(max_size=80), claimed=st.integers(-5, 100), n=st.integers(0, 300))
def test_any_bytes_are_harmless(payload, claimed, n):
    survives(payload, claimed, [np.arange(n, dtype=np.uint16) % 64])


def test_damage_is_noticed():
    rng = np.random.default_rng(9)
    for streams in (1, 4):
        steps = [gaussian_symbols(rng, 60_000, None)]
        payload = coder.encode(steps, PREPARED, streams=streams)
        indices = [steps[0][1]]
        assert survives(payload, len(payload), indices)
        flipped = bytearray(payload)
        flipped[len(payload) // 3] ^= 4
        assert not survives(bytes(flipped), len(payload), indices)
        assert not survives(payload[:-5], len(payload) - 5, indices)
        assert not survives(payload, len(payload), [])  # too few symbols
        assert not survives(payload, len(payload), [*indices, indices[0][:99]])  # too many
        other = indices[0].copy()
        other[30_000] ^= 1  # another table for one symbol
        assert not survives(payload, len(payload), [other])


def test_an_unknown_table_is_an_error():
    index = np.array([0, 64, 0], np.uint16)
    with pytest.raises(NvcError, match="table 64, but there are 64"):
        coder.encode([(np.zeros(3, np.int16), index)], PREPARED)
    payload = coder.encode([(np.arange(3, dtype=np.int16), index % 64)], PREPARED)
    buffer = padded(payload)
    state = coder.begin_decode(buffer, len(payload))
    for _ in range(2):  # stays bad
        symbols, state = coder.decode_step(buffer, state, index, PREPARED)
        assert coder.status(state) == coder.BAD_INDEX
        assert not symbols.any()
    with pytest.raises(StreamError, match="probability table"):
        coder.finish_decode(buffer, state)


def test_a_payload_longer_than_its_buffer_is_an_error():
    state = coder.begin_decode(np.zeros(8, np.uint8), 9)
    assert coder.status(state) == coder.BAD_PAYLOAD
    with pytest.raises(StreamError, match="damaged"):
        coder.finish_decode(np.zeros(8, np.uint8), state)


@pytest.mark.parametrize(
    ("symbols", "index", "options"),
    [
        (np.zeros(3, np.int32), np.zeros(3, np.uint16), {}),
        (np.zeros(3, np.int16), np.zeros(3, np.int32), {}),
        (np.zeros(3, np.int16), np.zeros(4, np.uint16), {}),
        (np.zeros(3, np.int16), np.zeros(3, np.uint16), {"streams": 9}),
    ],
)
def test_encode_refuses_what_it_cannot_code(symbols, index, options):
    with pytest.raises(NvcError):
        coder.encode([(symbols, index)], PREPARED, **options)


GOOD = make_tables([[3, 65533], [1, 2, 65533]], [0, -1])


def edited(field, position, value):
    array = getattr(GOOD, field).copy()
    array[position] = value
    return GOOD._replace(**{field: array})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (GOOD._replace(cdf=GOOD.cdf.astype(np.int64)), "cdf is int64"),
        (GOOD._replace(size=GOOD.size[:1]), "equally many"),
        (edited("size", 1, 1), "table 1 has a size"),
        (edited("size", 0, 4), "table 0 has a size"),
        (edited("size", 0, -3), "table 0 has a size"),
        (edited("offset", 0, 40000), "table 0 leaves"),
        (edited("offset", 1, -40000), "table 1 leaves"),
        (edited("cdf", (0, 0), 1), "table 0 does not start"),
        (edited("cdf", (1, 3), 65535), "table 1 does not sum"),
        (edited("cdf", (1, 1), 0), "table 1 has an entry"),
        (edited("cdf", (1, 2), 0), "table 1 has an entry"),
        (edited("cdf", (0, 3), 65537), "table 0 is not padded"),
    ],
)
def test_bad_tables_are_refused(tables, message):
    validate(GOOD)
    with pytest.raises(NvcError, match=message):
        coder.prepare(tables)


def test_no_place_for_a_cache_is_needed():
    """Where numba finds no folder for its cache, the coder compiles in memory."""
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    environment.pop("NUMBA_CACHE_DIR", None)
    code = """
import numpy as np
from nvc_jax.entropy import coder
coded, bits = coder._survey(np.zeros(3, np.uint16), np.ones(1, np.int32), 1)
assert (coded, bits) == (3, 3)
assert not coder._survey.stats.cache_path
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr


def test_benchmark_returns_numbers(capsys):
    result = benchmark(symbols=3000, repeats=1)
    for mix in ("uniform", "narrow"):
        numbers = result["mixes"][mix]
        assert numbers["encode_1_thread_msymbols_per_s"] > 0
        assert numbers["decode_2_threads_median_msymbols_per_s"] > 0
        assert 0 <= numbers["overhead_percent"] < 5
    assert "bits per symbol" in capsys.readouterr().out
