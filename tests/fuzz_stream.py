"""Four fuzz targets: functions that take any bytes and fail only when the program has a bug.

`tests/test_fuzz.py` feeds them with bytes from hypothesis. Run as a script, this file is a
coverage-guided fuzzer (`pip install -e ".[fuzz]"`):

    python tests/fuzz_stream.py container -runs=100000
    python tests/fuzz_stream.py list -runs=100000
    python tests/fuzz_stream.py motion -runs=100000
    python tests/fuzz_stream.py coder -runs=100000

Further options are libFuzzer's; a bug ends it with a traceback and leaves the input in `crash-*`.
"""

import itertools
import os
import struct
import sys
import tempfile
import types
import zlib
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from test_coder import make_tables, random_tables, sampled

from nvc_jax.entropy import coder
from nvc_jax.errors import StreamError
from nvc_jax.video import Planes

FUZZING = __name__ == "__main__"
if FUZZING:
    import atheris

# Not the coder: numba could not compile what the fuzzer would make of its loops.
with (
    atheris.instrument_imports(
        [f"nvc_jax.{name}" for name in ("bitstream", "schedule", "codec", "entropy.calibration")]
    )
    if FUZZING
    else nullcontext()
):
    from nvc_jax import bitstream, codec, conceal, schedule, unit_program
    from nvc_jax.entropy import calibration, motion

FOLDER = tempfile.TemporaryDirectory(prefix="nvc-fuzz-")
PATH = Path(FOLDER.name) / "any.nvc"


def readable(error: StreamError) -> None:
    """An error is one line, not too long, and says something."""
    assert 20 < len(str(error)) < 1000 and str(error).isprintable(), repr(str(error))


# The container, and decoding that goes on after damage


def seal(data: bytes) -> bytes:
    """Writes the right checksums to where a reader looks for them, so that it believes all else.

    Packets are counted from 0, as they are when reading from the start.
    """
    data = bytearray(data)
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def put(value, size=4):
        nonlocal at
        if at + size > len(data):
            raise IndexError
        data[at : at + size] = value.to_bytes(size, "little")
        at += size

    try:
        at = 5
        size = varint()
        at += size
        put(zlib.crc32(data[:at]))
        unit = next_frame = 0
        while data[at] >> 6 == 0b11:
            start, tag = at, data[at]
            at += 2 if tag & 32 else 1
            frames = [next_frame + k for k in range((tag & 7) + 1)]
            if tag & 16:
                frames = [varint() for _ in frames]
            at += len(frames)
            size = varint()
            at += 4
            put(bitstream._crc8(data[start:at]), 1)
            head, at = data[start:at], at + size
            place = struct.pack("<QQ", unit, frames[0])
            put(zlib.crc32(place + head + data[at - size : at]))
            unit, next_frame = unit + 1, frames[-1] + 1
        if data[at] == ord("I"):
            start, at = at, at + 1
            size = varint()
            at += size
            put(zlib.crc32(data[start:at]))
            put(at - start)
            put(int.from_bytes(bitstream.END_MAGIC, "little"))
    except (IndexError, OverflowError, struct.error):
        pass
    return bytes(data)


def streams() -> list[bytes]:
    """Valid streams to start from."""
    found = []
    for order, length in (
        (schedule.two_frame(4), 14),
        (schedule.two_frame(), 6),
        (schedule.all_intra(), 4),
        (schedule.hierarchical(4), 11),
        (schedule.hierarchical(3, closed=True), 8),
        (schedule.mixed(3), 9),
    ):
        # Calibrated, with margins for three levels: the longest header.
        header = bitstream.Header(
            "m",
            bytes(16),
            16,
            16,
            Fraction(25),
            order,
            (2, 2, 2, False),
            calibration.CALIBRATED,
            (9, 10, 11),
        )  # fmt: skip
        with bitstream.write_stream(PATH, header) as out:
            for packet in _packets(order, length):
                out.write(packet)
        found.append(PATH.read_bytes())
    return found


def _packets(order, length):
    """Of a clip; groups that may differ do."""
    frame = number = 0
    for mode in itertools.cycle(schedule.MODES):
        if frame == length:
            return
        size = schedule.group_size(order, frame)
        count, first = min(size, length - frame), number
        mode = mode if order.name == "mixed" else None
        for unit in schedule.units(order, frame, count, first, mode):
            payload, qps = bytes([number]) * (3 * number), (30,) * len(unit.frames)
            packet = bitstream.Packet(
                unit.frames, qps, payload, unit_program.symbols_crc(_symbols(payload))
            )
            if number == first:
                short = count if count < size and schedule.in_layers(order) else None
                packet = replace(packet, random_access=not unit.refs, group=short, mode=mode)
            yield packet
            number += 1
        frame += count


def _symbols(payload: bytes) -> list[np.ndarray]:
    return [np.frombuffer(payload, np.uint8).astype(np.int16)]


def _decode_unit(_, payload, refs, qps, unit):
    """In place of a model: payloads are their own symbols."""
    if payload[:1] == b"\xff":
        raise StreamError("the stand-in for a model refuses this")
    return unit_program.CodedUnit([_GREY] * len(qps), (), _symbols(payload), [], [], [], None)


_GREY = Planes(*(np.full((1, 1), 128, np.uint8) for _ in range(3)))
_MODEL = SimpleNamespace(module=SimpleNamespace(qp_rows=72))
_UNIT_CODEC = SimpleNamespace(model=_MODEL, width=1, height=1, entropy_mode=calibration.FLOAT)


def container(data: bytes) -> None:
    """Reads and decodes a stream in every way. Its checksums are made right first, if the first
    byte, which does not belong to it, is even."""
    data = data[1:] if data[:1] and data[0] % 2 else seal(data[1:])
    PATH.write_bytes(data)
    try:
        info = bitstream.stream_info(PATH)
    except StreamError as error:
        readable(error)
        return
    with bitstream.open_stream(PATH) as stream, mock.patch.object(
        codec, "decode_unit", _decode_unit
    ):  # fmt: skip
        index = stream.index
        if info["error"] is None:
            assert (index.units, index.frames) == (len(info["units"]), info["frames"])
        for point in (index.access_points if index else ())[:8]:
            try:
                number, packet = next(stream.packets(point))
                assert number == point.unit and len(packet.payload) < len(data)
                assert stream.access_point(point.frame).frame == point.frame
            except StreamError as error:
                readable(error)
            for wanted in (range(point.frame, point.frame + 2), range(point.frame + 1, 2**40)):
                frame = wanted.start
                for unit, pictures in codec.decode_part(_UNIT_CODEC, stream, point, wanted):
                    assert isinstance(unit, codec.Lost) or frame in unit.frames
                    frame += len(list(pictures))
                assert frame <= wanted.stop
        complaint = None
        try:
            for _ in codec.decode(_UNIT_CODEC, stream):
                pass
        except StreamError as error:
            readable(error)
            complaint = str(error)
        shown, losses = 0, []
        for unit, pictures in conceal.decode_concealing(_UNIT_CODEC, stream):
            if isinstance(unit, codec.Lost):
                assert unit.frame == shown
                losses.append(unit)
            else:
                assert unit.frames[0] == shown
            shown += len(list(pictures))
        reasons = [lost.reason for lost in losses]
        assert complaint in reasons if complaint else not reasons
        gop = stream.header.schedule.gop
        assert shown <= bitstream.MAX_UNIT_FRAMES * len(data) / 12 + gop
        assert index is None or shown >= index.frames


# The list of calibrated elements, in front of a unit's symbols


def element_list(data: bytes) -> None:
    """Splits a calibrated unit's payload. The first eight bytes are sizes of the coding steps."""
    sizes = [1 + size for size in struct.unpack("<4H", data[:8].ljust(8, b"\0"))]
    families = [None, *["gaussian"] * 3]
    steps = [SimpleNamespace(size=n, family=f) for n, f in zip(sizes, families, strict=True)]
    unit_codec = SimpleNamespace(entropy_mode=calibration.CALIBRATED, steps_of=lambda refs: steps)
    try:
        flags, payload = unit_program._split_payload(unit_codec, data[8:], ())
    except StreamError as error:
        readable(error)
        return
    assert data.endswith(payload) and flags.shape == (sum(sizes),)
    hyper, *steps = np.split(flags, np.cumsum(sizes)[:-1])
    assert not hyper.any()
    again = calibration.read_flags(calibration.write_flags(steps), sizes[1:])
    np.testing.assert_array_equal(again, np.concatenate(steps))


def element_lists() -> list[bytes]:
    """Inputs of `element_list` to start from."""
    rng, found = np.random.default_rng(0), []
    for share in (0, 0.002, 0.05, 0.9):
        for code in (calibration.RICE, calibration.FIXED):
            sizes = [9, *rng.integers(1, 400, 3).tolist()]
            flags = calibration.write_flags([rng.random(n) < share for n in sizes[1:]], code)
            header = struct.pack("<4H", *(size - 1 for size in sizes))
            found.append(header + bitstream.varint(len(flags)) + flags + b"symbols")
    return found


# The host coder

TABLES = [
    make_tables([[65535, 1], [1, 65535], [32768, 32768]], [0, -32768, 32766]),
    make_tables([[256] * 256, [1] * 200 + [65336]], [-128, 30_000]),
    random_tables(np.random.default_rng(1), 5, 40),
    random_tables(np.random.default_rng(2), 3, 3000),
]
PREPARED = [coder.prepare(tables) for tables in TABLES]
# The same loop without numba: it shows its branches to the fuzzer, and Python checks every index.
_INTERPRETED = types.FunctionType(coder._decode.py_func.__code__, vars(coder))


def payload_with_motion(data: bytes) -> None:
    """Reads what a unit's payload says about its reference. The first two bytes are its size.

    What comes out is within the limits, and the one field that is written like this.
    """
    if len(data) < 2:
        return
    width, height = (16 * (1 + byte % 16) for byte in data[:2])
    codec = SimpleNamespace(judge=None, search=True, width=width, height=height)
    unit = schedule.Unit((1,), (0,), 0, (0,), ())
    try:
        unit, rest = unit_program.read_references(codec, data[2:], (None,), unit)
    except StreamError as error:
        return readable(error)
    field = unit.motion
    assert field.shape == (height // 8, width // 8, 3) and field.dtype == np.int16
    assert np.abs(field[..., :2]).max() <= motion.MAX_VECTOR
    assert set(np.unique(field[..., 2])) <= {0, 1} and not field[field[..., 2] == 0].any()
    written = motion.encode(field)
    assert bitstream.varint(len(written)) + written + rest == data[2:]


def payloads_with_motion() -> list[bytes]:
    """Inputs of `payload_with_motion` to start from."""
    found, rng = [], np.random.default_rng(0)
    for rows, columns in ((1, 1), (2, 3), (7, 5), (16, 16)):
        for spread in (0, 3, 300):
            field = np.ones((2 * rows, 2 * columns, 3), np.int16)
            field[..., :2] = rng.integers(-spread, spread + 1, field[..., :2].shape)
            field[:rows] = field[0, 0]  # that nodes are shared by
            field[rng.random(field.shape[:2]) < 0.1] = 0
            data = motion.encode(field)
            found.append(bytes([columns - 1, rows - 1]) + bitstream.varint(len(data)) + data)
    return found


def host_coder(data: bytes) -> None:
    """Decodes a payload that is the bytes themselves, a valid one that they damage, or one whose
    trailer is valid and whose words they are. The first six bytes choose."""
    kind, which, seed, (a, b) = data[:1], data[1:2], data[2:4], (*data[4:6], 0, 0)[:2]
    kind, which, data = (*kind, 0)[0], (*which, 0)[0], data[6:]
    rng = np.random.default_rng(int.from_bytes(seed, "little"))
    tables, prepared = TABLES[which % len(TABLES)], PREPARED[which % len(TABLES)]
    sizes = rng.integers(0, 20, rng.integers(0, 4))
    steps = [sampled(rng, tables, n, rng.random() / 2, rng.random() / 4) for n in sizes]
    indices = [index for _, index in steps]
    payload, intact = data, False
    if kind % 4 == 1:
        payload = coder.encode(steps, prepared, streams=1 + b % 8)
        intact = not data
        at = a % (len(payload) + 1)
        payload = payload[:at] + data + payload[at + (b % 16 if data else 0) :]
    elif kind % 4 == 2:
        lanes, streams, words = 1 << a % 3, 1 + b % 8, len(data) // 4
        edges = np.sort(rng.integers(0, words + 1, streams - 1))
        counts = np.diff(edges, prepend=0).tolist()
        highs = [int(h) >> int(rng.integers(32)) for h in rng.integers(0, 2**31, lanes * streams)]
        payload = data[: 4 * words] + coder._trailer(lanes, streams, counts + highs)
    if kind & 64:
        for index in indices[-1:]:
            index[rng.random(index.size) < 0.1] = len(tables.size) + a
            intact = False

    symbols, state, complaint = _decoded(payload, indices, prepared, 0)
    for (expected, _), got in zip(steps, symbols, strict=True):
        assert got.shape == expected.shape and got.dtype == np.int16
        assert not intact or (got == expected).all()
    assert not (intact and complaint)
    if coder.status(state) == coder.BAD_PAYLOAD:
        assert not any(got.any() for got in symbols)
    for got, index in zip(symbols, indices, strict=True):
        assert not got[index == coder.SKIP].any()
    again = [_decoded(payload, indices, prepared, 255)]
    if kind & 128:
        with mock.patch.object(coder, "_decode", _INTERPRETED), np.errstate(over="ignore"):
            again.append(_decoded(payload, indices, prepared, 0))
    for others, other_state, other_complaint in again:
        assert complaint == other_complaint and (state == other_state).all()
        assert all((x == y).all() for x, y in zip(symbols, others, strict=True))


def _decoded(payload, indices, prepared, around: int):
    """(symbols, state, complaint); `around` stands in memory before and behind the payload."""
    buffer = np.full(len(payload) + 32, around, np.uint8)
    shifted = buffer[1:-7] if around else buffer[:-8]
    shifted[: len(payload)] = np.frombuffer(payload, np.uint8)
    state, symbols, complaint = coder.begin_decode(shifted, len(payload)), [], None
    for index in indices:
        decoded, state = coder.decode_step(shifted, state, index, prepared)
        symbols.append(decoded)
    try:
        coder.finish_decode(shifted, state)
    except StreamError as error:
        readable(error)
        complaint = str(error)
    assert set(np.delete(buffer, np.s_[bool(around) : bool(around) + len(payload)])) <= {around}
    return symbols, state, complaint


def payloads() -> list[bytes]:
    """Inputs of `host_coder` to start from."""
    return [bytes([kind, which, 7, 1, 3, 2]) + bytes(range(40)) * (kind % 4 != 1)
            for kind in (0, 1, 2, 65, 128, 129, 130) for which in range(4)]  # fmt: skip


def main() -> None:
    target = sys.argv[1]
    targets = {
        "container": (container, [bytes([odd]) + s for s in streams() for odd in (0, 1)]),
        "list": (element_list, element_lists()),
        "motion": (payload_with_motion, payloads_with_motion()),
        "coder": (host_coder, payloads()),
    }
    if target not in targets:
        sys.exit(f"give a target, one of {', '.join(targets)}, then libFuzzer's options")
    function, seeds = targets[target]
    for name in ("_read_trailer", "begin_decode", "decode_step", "_decode_stream", "finish_decode"):
        atheris.instrument_func(getattr(coder, name))
    atheris.instrument_func(_INTERPRETED)
    corpus = Path(FOLDER.name) / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / f"{number}").write_bytes(seed)
    options = ["-max_len=2048", "-len_control=0", "-timeout=20", "-use_value_profile=1"]
    # The fuzzer ends its process the hard way; another has to remove the folder.
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    atheris.Setup([sys.argv[0], *options, *sys.argv[2:], str(corpus)], function)
    atheris.Fuzz()


if FUZZING:
    main()
