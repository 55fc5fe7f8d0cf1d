"""The container: what is written comes back, and whatever happens to a file is noticed."""

import json
import re
import tracemalloc
import zlib
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax import bitstream, schedule
from nvc_jax.bitstream import BrokenStream, Header, Packet
from nvc_jax.entropy import coder
from nvc_jax.entropy.tables import CdfTables
from nvc_jax.errors import NvcError, StreamError

u32 = st.integers(0, 2**32 - 1)
names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=16)
protections = st.one_of(
    st.sampled_from([(0, ()), (2, ())]),
    st.lists(st.integers(5, 20), min_size=1, max_size=8).map(lambda e: (1, tuple(e))),
)
headers = st.builds(
    lambda protection, **others: Header(
        **others, entropy_mode=protection[0], margin_exponents=protection[1]
    ),
    protection=protections,
    model=names,
    fingerprint=st.binary(min_size=16, max_size=16),
    width=st.integers(1, 16384),
    height=st.integers(1, 16384),
    fps=st.builds(Fraction, st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1)),
    schedule=st.one_of(
        st.just(schedule.all_intra()),
        st.integers(0, 2**31 - 1).map(lambda pairs: schedule.two_frame(2 * pairs)),
    ),
    colour=st.tuples(*[st.integers(0, 255)] * 3, st.booleans()),
)


@st.composite
def packets(draw, frames=None):
    if frames is None:
        frames = tuple(draw(st.lists(u32, min_size=1, max_size=8)))
    qps = tuple(draw(st.lists(st.integers(0, 127), min_size=len(frames), max_size=len(frames))))
    return Packet(frames, qps, draw(st.binary(max_size=300)), draw(u32), draw(st.booleans()))


@pytest.mark.parametrize("group", [None, 1, 63])
@pytest.mark.parametrize("mode", [*schedule.MODES, None])
def test_groups_are_described(tmp_path, mode, group):
    order = schedule.mixed(64) if mode else schedule.hierarchical(64)
    header = Header("uni", bytes(16), 64, 48, Fraction(25), order)
    packet = Packet((0,), (32,), b"abc", 7, True, group, mode)
    write(tmp_path / "a.nvc", header, [packet])
    assert read(tmp_path / "a.nvc")[2] == [(0, packet)]


@pytest.mark.parametrize(
    "order, value", [(schedule.hierarchical(64), 0x45), (schedule.mixed(64), 0xC5)]
)
def test_groups_that_cannot_be_are_refused(tmp_path, order, value):
    """A mode where there are none, and a fourth one, in a head whose checksum is right."""
    header = Header("uni", bytes(16), 64, 48, Fraction(25), order)
    mode = "ra" if order.name == "mixed" else None
    write(tmp_path / "a.nvc", header, [Packet((0,), (32,), b"", 7, True, 5, mode)])
    data = bytearray((tmp_path / "a.nvc").read_bytes())
    head = data.index(bytes([0xE8, 5, 32, 0, 7, 0, 0, 0]))
    data[head + 1] = value
    data[head + 8] = bitstream._crc8(data[head : head + 8])
    (tmp_path / "a.nvc").write_bytes(data)
    intact, error = read_intact(tmp_path / "a.nvc")
    assert not intact and "a group cannot look like this" in str(error)


@pytest.mark.parametrize("group, mode", [(None, "ld"), (0, None), (64, None)])
def test_groups_that_nobody_could_read_are_not_written(tmp_path, group, mode):
    header = Header("uni", bytes(16), 64, 48, Fraction(25), schedule.hierarchical(64))
    packet = Packet((0,), (32,), b"abc", 7, True, group, mode)
    with pytest.raises(NvcError, match="unit 0 begins a group"):
        write(tmp_path / "a.nvc", header, [packet])


PAIRS = Header("ui2c-nano", bytes(range(16)), 64, 48, Fraction(30000, 1001), schedule.two_frame(4))


def pair(number, payload=None, random_access=None):
    payload = bytes([number] * (20 + 3 * number)) if payload is None else payload
    starts = number % 2 == 0 if random_access is None else random_access
    return Packet((2 * number, 2 * number + 1), (32, 36), payload, 1000 + number, starts)


def write(path, header, content):
    with bitstream.write_stream(path, header) as out:
        return [out.write(packet) for packet in content]


def read(path):
    with bitstream.open_stream(path) as stream:
        return stream.header, stream.index, list(stream.packets())


def read_intact(path):
    """Packets before the damage, and the error."""
    intact, error = [], None
    try:
        with bitstream.open_stream(path) as stream:
            for _, packet in stream.packets():
                intact.append(packet)
    except StreamError as caught:
        error = caught
    return intact, error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streams")


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "clip.nvc"
    write(path, PAIRS, map(pair, range(5)))
    return path


@given(headers, st.lists(packets(), min_size=1, max_size=6))
def test_streams_come_back_as_written(folder, header, content):
    path = folder / "any.nvc"
    sizes = write(path, header, content)
    found, index, numbered = read(path)
    assert found == header == bitstream.read_header(path)
    assert [packet for _, packet in numbered] == content
    assert [unit for unit, _ in numbered] == list(range(len(content)))
    assert index.units == len(content)
    assert index.frames == sum(len(packet.frames) for packet in content)
    assert len(index.access_points) == sum(packet.random_access for packet in content)
    info = bitstream.stream_info(path)
    assert info["error"] is None
    assert [unit["bytes"] for unit in info["units"]] == sizes


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_reading_starts_at_every_access_point(folder, starts, data):
    path = folder / "seek.nvc"
    content = [pair(number, random_access=start) for number, start in enumerate(starts)]
    write(path, PAIRS, content)
    with bitstream.open_stream(path) as stream:
        for point in stream.index.access_points:
            assert list(stream.packets(point)) == list(enumerate(content))[point.unit :]
        frame = data.draw(st.integers(0, 2 * len(content) - 1))
        possible = [unit for unit, start in enumerate(starts) if start and 2 * unit <= frame]
        if possible:
            point = stream.access_point(frame)
            assert (point.unit, point.frame) == (possible[-1], 2 * possible[-1])
        else:
            with pytest.raises(StreamError, match="nothing to start from"):
                stream.access_point(frame)


def test_a_packet_costs_14_bytes_for_a_pair_and_13_for_a_frame(tmp_path):
    payload = bytes(500)
    assert write(tmp_path / "pair.nvc", PAIRS, [pair(0, payload)]) == [514]
    one = Packet((0,), (20,), payload, 7, True)
    assert write(tmp_path / "one.nvc", PAIRS, [one]) == [513]


def test_truncation_anywhere_keeps_what_is_before_it(sample, tmp_path):
    data = sample.read_bytes()
    info = bitstream.stream_info(sample)
    with bitstream.open_stream(sample) as stream:
        start = stream.access_point(0).offset
    ends = list(accumulate((unit["bytes"] for unit in info["units"]), initial=start))[1:]
    cut = tmp_path / "cut.nvc"
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        intact, error = read_intact(cut)
        expected = sum(end <= size for end in ends)
        assert intact == [pair(number) for number in range(expected)]
        assert str(cut) in str(error)
        if size == 0:
            assert "not a .nvc stream" in str(error)
        else:
            assert "cut off" in str(error) and f"byte {size}" in str(error)
        if isinstance(error, BrokenStream):
            assert (error.units, error.frames) == (expected, 2 * expected)
            assert f"{expected} units ({2 * expected} frames)" in str(error)
        else:
            assert expected == 0


def test_every_flipped_bit_is_noticed(sample, tmp_path):
    data = sample.read_bytes()
    damaged = tmp_path / "damaged.nvc"
    written = [pair(number) for number in range(5)]
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            damaged.write_bytes(flipped)
            intact, error = read_intact(damaged)
            assert isinstance(error, StreamError)
            assert intact == written[: len(intact)]


@settings(max_examples=300)
@given(st.data())
def test_any_other_damage_is_noticed(folder, data):
    path = folder / "mangled.nvc"
    written = [pair(number) for number in range(5)]
    write(path, PAIRS, written)
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before)))
    until = data.draw(st.integers(at, len(before)))
    after = before[:at] + data.draw(st.binary(max_size=40)) + before[until:]
    path.write_bytes(after)
    intact, error = read_intact(path)
    assert intact == written[: len(intact)]
    assert (error is None) == (after == before)


@given(st.binary(max_size=200))
def test_other_files_are_refused(folder, data):
    path = folder / "other.nvc"
    path.write_bytes(data)
    with pytest.raises(StreamError, match=r"not a \.nvc stream|cut off|damaged|update"):
        bitstream.read_header(path)


def test_exchanged_units_are_noticed(tmp_path):
    path = tmp_path / "clip.nvc"
    content = [pair(number, bytes([number] * 20), random_access=True) for number in range(3)]
    first, second, _ = write(path, PAIRS, content)
    data = path.read_bytes()
    with bitstream.open_stream(path) as stream:
        start = stream.access_point(0).offset
    swapped = data[start + first : start + first + second] + data[start : start + first]
    path.write_bytes(data[:start] + swapped + data[start + first + second :])
    intact, error = read_intact(path)
    assert intact == [] and "checksum of the unit" in str(error)


def with_checksum(data):
    return data + zlib.crc32(data).to_bytes(4, "little")


def header_with(body):
    return with_checksum(bitstream.MAGIC + bytes([1, len(body)]) + body)


GOOD_BODY = b"\x01m\x09two_frame" + bytes(16) + b"\x10\x10\x19\x01\x02\x00\x02\x02\x02\x00\x00\x00"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"\x10\x10\x19", b"\x00\x10\x19", "pictures of 0x16 pixels"),
        (b"\x10\x10\x19", b"\xff\xff\x03\x10\x19", "both sides must be 1 to 16384"),
        (b"\x10\x10\x19", b"\xff\xff\xff\xff\x7f\x10\x19", "larger than"),
        (b"\x10\x10\x19", b"\x90\x00\x10\x19", "more bytes than it needs"),
        (b"\x19\x01", b"\x19\x00", "cannot look like this"),
        (b"\x19\x01", b"\x00\x01", "frame rate of 0"),
        (b"two_frame", b"six_frame", "unknown schedule 'six_frame'"),
        (b"\x02\x00\x02\x02", b"\x02\x03\x02\x02", "intra period 3"),
        (b"\x01m", b"\x01\xff", "not UTF-8"),
        (b"\x01m", b"\x00", "model name ''"),
        (b"\x01m", b"\x01\x1b", "model name"),
        (b"\x01m", b"\xffm", "cut off|cannot look like this"),
        (b"\x00\x00\x00", b"\x02\x00\x00", "cannot look like this"),
        (b"\x00\x00\x00", b"\x00\x01\x00", "unknown entropy settings: mode 1"),
        (b"\x00\x00\x00", b"\x00\x03\x00", "unknown entropy settings: mode 3"),
        (b"\x00\x00\x00", b"\x00\x01\x01\x04", "margin exponents"),
        (b"\x00\x00\x00", b"\x00\x01\x09" + 9 * b"\x0a", "margin exponents"),
        (b"\x00\x00\x00", b"\x00\x01\x02\x0a", "cannot look like this|cut off"),
        (b"\x00\x00\x00", b"\x00\x00", "cannot look like this|cut off"),
        (b"\x00\x00\x00", b"\x00\x00\x00\x00", "cannot look like this"),
    ],
)
def test_impossible_headers_are_refused(tmp_path, old, new, words):
    path = tmp_path / "clip.nvc"
    start, found, end = GOOD_BODY.rpartition(old)
    assert found
    path.write_bytes(header_with(start + new + end))
    with pytest.raises(StreamError, match=words):
        bitstream.read_header(path)


def test_hand_made_header_is_accepted(tmp_path):
    path = tmp_path / "clip.nvc"
    path.write_bytes(header_with(GOOD_BODY))
    assert bitstream.read_header(path).fps == 25


@pytest.mark.parametrize("version", [0, bitstream.VERSION + 1, 255])
def test_other_versions_say_which_program_they_need(sample, version):
    """Whatever follows the version, which may look different there."""
    for rest in (sample.read_bytes()[5:], b"", bytes(50), b"\xff" * 50):
        sample.write_bytes(bitstream.MAGIC + bytes([version]) + rest)
        remedy = "update nvc_jax" if version else "use an older nvc_jax"
        complaint = (
            rf"version {version} of the format, .* versions 1 to {bitstream.VERSION}; {remedy}"
        )
        with pytest.raises(StreamError, match=complaint):
            bitstream.read_header(sample)


@pytest.mark.parametrize("size", [2**20, 2**31, 2**40, 2**63, 2**70])
def test_huge_declared_payloads_cost_nothing(tmp_path, size):
    path = tmp_path / "clip.nvc"
    huge = Header("m", bytes(16), 16384, 16384, Fraction(25), schedule.all_intra())
    packet = b"\xc8\x20" + bitstream.varint(size) + bytes(4)
    packet += bytes([bitstream._crc8(packet)])
    path.write_bytes(bitstream._header_bytes(huge) + packet + bytes(1000))
    tracemalloc.start()
    with bitstream.open_stream(path) as stream, pytest.raises(BrokenStream) as caught:
        list(stream.packets())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 and caught.value.units == 0


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff\xff\xff\x0f" * 2 + b"\xff\xff\x3f" + b"\x01" * 10,  # a million points, not there
        b"\x01\x02\x01\x00\x00\xff\xff\xff\xff\x0f",  # a point behind the end
        b"\x01\x02\x01\x01\x00\x00",  # a unit that does not exist
        b"\x01\x02\x01\x00\x00\x00\x00",  # something left over
        b"\x01\x02\x02\x00\x00\x00\x00\x00\x00",  # more points than units
        b"\x02\x02\x02\x00\x00\x00\x00\x00\x0c",  # a unit twice
        b"\x02\x02\x02\x00\x00\x00\x01\x00\x0b",  # units closer together than possible
        b"\x03\x03\x00",  # more units than fit into the file
        b"\x02\x01\x00",  # more units than frames
        b"\x01\x09\x00",  # more frames than fit into the units
        b"\xff" * 40,
    ],
)
def test_impossible_indices_are_refused(tmp_path, body):
    path = tmp_path / "clip.nvc"
    write(path, PAIRS, [pair(0)])
    data = path.read_bytes()
    data = data[: len(data) - 8 - int.from_bytes(data[-8:-4], "little")]
    block = with_checksum(b"I" + bytes([len(body)]) + body)
    path.write_bytes(data + block + len(block).to_bytes(4, "little") + bitstream.END_MAGIC)
    with bitstream.open_stream(path) as stream:
        assert stream.index is None and stream.frame_count is None
        with pytest.raises(StreamError, match="index at the end is missing or damaged"):
            stream.access_point(0)
        with pytest.raises(BrokenStream, match="1 units"):
            list(stream.packets())


@pytest.mark.parametrize("units", [0, 2, 3])
def test_an_index_that_miscounts_is_noticed(tmp_path, units):
    path = tmp_path / "clip.nvc"
    write(path, PAIRS, [pair(0, random_access=False)])
    data = path.read_bytes()
    data = data[: len(data) - 8 - int.from_bytes(data[-8:-4], "little")]
    block = with_checksum(b"I\x03" + bytes([units, 2, 0]))
    path.write_bytes(data + block + len(block).to_bytes(4, "little") + bitstream.END_MAGIC)
    with bitstream.open_stream(path) as stream, pytest.raises(BrokenStream, match="speaks of"):
        list(stream.packets())


def test_no_unit_reaches_into_an_access_point(tmp_path):
    """An index that leads into damage again and again makes nobody read the file again and again.

    Here every listed point is the head of a packet that claims the rest of the file.
    """
    path = tmp_path / "clip.nvc"
    count, size = 2000, 40_000
    data = bytearray(bitstream._header_bytes(Header("m", bytes(16), 99, 99, Fraction(25),
                                                    schedule.all_intra())))  # fmt: skip
    first = len(data)
    points = []
    for number in range(count):
        points.append(bitstream.AccessPoint(number, number, len(data)))
        head = b"\xc8\x20" + bitstream.varint(size) + bytes(4)
        data += head + bytes([bitstream._crc8(head)]) + bytes(4)
    data += bytes(size)
    data += bitstream._index_bytes(bitstream.Index(count, count, tuple(points)), first)
    path.write_bytes(data)
    with bitstream.open_stream(path) as stream:
        assert len(stream.index.access_points) == count
        read, reading = 0, stream._source._file.read

        class Counting:
            def read(self, count):
                nonlocal read
                read += count
                return reading(count)

        stream._source._file = Counting()
        point = stream.index.access_points[0]
        while point:
            with pytest.raises(BrokenStream):
                list(stream.packets(point))
            point = stream.next_access_point(point.unit)
        assert read < 4 * len(data)


def test_the_next_access_point(sample):
    with bitstream.open_stream(sample) as stream:
        units = [point.unit for point in stream.index.access_points]
        assert units == [0, 2, 4]
        found = [stream.next_access_point(unit) for unit in range(-1, 5)]
        assert [point and point.unit for point in found] == [0, 2, 2, 4, 4, None]
    sample.write_bytes(sample.read_bytes()[:-1])
    with bitstream.open_stream(sample) as stream:
        assert stream.next_access_point(0) is None


def test_info_describes_the_file(sample):
    info = bitstream.stream_info(sample)
    size = sample.stat().st_size
    assert json.loads(json.dumps(info)) == info
    assert info["file_bytes"] == size
    assert (info["frames"], info["fps"], info["width"]) == (10, "30000/1001", 64)
    assert info["bpp"] == pytest.approx(8 * size / (10 * 64 * 48))
    assert info["container_bytes"] == size - sum(20 + 3 * number for number in range(5))
    assert info["schedule"] == {"name": "two_frame", "gop": 2, "intra_period": 4}
    assert [unit["frames"] for unit in info["units"]] == [[2 * k, 2 * k + 1] for k in range(5)]
    assert [unit["random_access"] for unit in info["units"]] == [True, False, True, False, True]


def test_info_of_a_cut_file_tells_what_is_left(sample):
    sample.write_bytes(sample.read_bytes()[:-60])
    info = bitstream.stream_info(sample)
    assert "cut off" in info["error"]
    assert info["frames"] == 2 * len(info["units"]) < 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, NvcError])
def test_a_failed_encode_leaves_the_old_file_alone(sample, error):
    before = sample.read_bytes()
    with pytest.raises(error), bitstream.write_stream(sample, PAIRS) as out:
        out.write(pair(0))
        raise error
    assert sample.read_bytes() == before
    assert list(sample.parent.iterdir()) == [sample]


def test_a_stream_without_frames_is_not_written(tmp_path):
    with pytest.raises(NvcError, match="no frames"):
        write(tmp_path / "clip.nvc", PAIRS, [])
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "clip.nvc"):
        with pytest.raises(NvcError, match=str(path)):
            write(path, PAIRS, [pair(0)])


@pytest.mark.parametrize(
    "packet",
    [
        Packet((), (), b"", 0),
        Packet(tuple(range(9)), (1,) * 9, b"", 0),
        Packet((0, 1), (1,), b"", 0),
        Packet((0,), (128,), b"", 0),
        Packet((-1,), (1,), b"", 0),
        Packet((2**32,), (1,), b"", 0),
        Packet((0,), (1,), b"", 2**32),
        Packet((0,), (1,), bytes(10**6), 0),
    ],
)
def test_packets_that_cannot_be_stored_are_refused(tmp_path, packet):
    with pytest.raises(NvcError, match="unit 0"):
        write(tmp_path / "clip.nvc", PAIRS, [packet])


@pytest.mark.parametrize(
    "change",
    [
        {"model": ""},
        {"model": "é" * 33},
        {"fingerprint": bytes(15)},
        {"width": 16385},
        {"height": 0},
        {"fps": Fraction(0)},
        {"fps": Fraction(2**32)},
        {"colour": (256, 2, 2, False)},
        {"schedule": schedule.two_frame(2**33)},
        {"entropy_mode": 1},
        {"entropy_mode": 3},
        {"entropy_mode": 0, "margin_exponents": (10,)},
        {"entropy_mode": 2, "margin_exponents": (10,)},
        {"entropy_mode": 1, "margin_exponents": (4,)},
        {"entropy_mode": 1, "margin_exponents": (10,) * 9},
    ],
)
def test_headers_that_cannot_be_stored_are_refused(change):
    values = {name: getattr(PAIRS, name) for name in PAIRS.__dataclass_fields__}
    with pytest.raises(NvcError):
        Header(**{**values, **change})


def test_unreadable_paths_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing.nvc"):
        with pytest.raises(StreamError, match=str(path)):
            bitstream.stream_info(path)


def test_the_documented_example_is_what_we_write(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "bitstream.md").read_text()
    documented = bytes.fromhex("".join(re.findall(r"^[0-9a-f]{4}  (.+)$", text, re.MULTILINE)))
    table = CdfTables(
        np.array([[0, 16384, 49152, 65520, 65536]], np.uint32),
        np.array([4], np.int32),
        np.array([-1], np.int32),
    )
    header = Header(
        "ui2c-nano", bytes(range(16)), 64, 48, Fraction(25), schedule.two_frame(), (1, 1, 1, False)
    )
    content = []
    for frames, qps, values in (
        ((0, 1), (32, 40), [0, 0, 1, -1, 0, 7, 0, 0, 1, 1, -1, 0]),
        ((2,), (32,), [0, 1]),
    ):
        symbols = np.array(values, "<i2")
        payload = coder.encode([(symbols, np.zeros(len(values), np.uint16))], coder.prepare(table))
        content.append(Packet(frames, qps, payload, zlib.crc32(symbols.tobytes()), not content))
    write(tmp_path / "tiny.nvc", header, content)
    assert (tmp_path / "tiny.nvc").read_bytes() == documented
