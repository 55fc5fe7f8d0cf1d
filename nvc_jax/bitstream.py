"""The `.nvc` container: a header, one packet per coded unit, and an index at the end.

`docs/bitstream.md` describes the format byte by byte. What shaped it:

* A unit may have as little as a hundred bytes, so a packet costs 13 (one frame) or 14 bytes (a
  pair), checksums included: what can be derived (unit number, display frames in order) is not
  stored, but goes into the checksum, so that a packet in the wrong place is noticed all the same.
* It is written as a stream: nothing is known of the clip's length until the end, so the frame
  count stands in the index. A file that was cut off decodes up to the cut.
* Nothing in a file is believed before it is checked: every size is held against the bytes that are
  there before memory is taken.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nvc_jax.entropy.calibration import (
    CALIBRATED,
    ENTROPY_MODES,
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
)
from nvc_jax.errors import NvcError, StreamError
from nvc_jax.files import replacing, writing
from nvc_jax.schedule import MODES, Schedule

MAGIC = b"\x8bNVC"
VERSION = 4
OLDEST_VERSION = 1  # that is still read: 1 has only mode 0, 1 and 2 no short groups, 3 no motion
END_MAGIC = b"CVN\x8b"

MAX_SIDE = 16384  # pixels, width and height
MAX_NAME_BYTES = 64
MAX_HEADER_BYTES = 512
MAX_UNIT_FRAMES = 8
MAX_LEVELS = 8  # of a schedule's hierarchy
QP_LIMIT = 127  # a qp of 0..63 plus its offset
MAX_ACCESS_POINTS = 2**20  # later ones are not listed; decoding then starts at the last one listed

# Tag of a packet: 11gerfff with g = the group is described, e = display frames written out,
# r = random access point, fff = frames - 1. Nothing else but the index may stand where a packet
# could.
_PACKET, _PACKET_MASK, _GROUP, _EXPLICIT, _RANDOM_ACCESS = 0xC0, 0xC0, 0x20, 0x10, 0x08
_INDEX = ord("I")
_MIN_PACKET_BYTES = 12  # one frame, no payload


class BrokenStream(StreamError):
    """A stream whose packets are intact up to some unit, and damaged or cut off there.

    Attributes:
        units: number of intact units before the damage, counted from where reading began.
        frames: number of frames in them.
    """

    def __init__(self, message: str, units: int, frames: int):
        super().__init__(message)
        self.units = units
        self.frames = frames


@dataclass(frozen=True)
class Header:
    """What a decoder must know before the first unit.

    Attributes:
        model: name of the codec, at most 64 bytes of UTF-8.
        fingerprint: 16 bytes that identify weights and integer tables together.
        width: in pixels, 1 to 16384, as `height`.
        fps: frames per second, numerator and denominator below 2**32.
        schedule: the coding order.
        colour: primaries, transfer and matrix (code points of ITU-T H.273; 2 = unspecified), and
            whether samples use the full range.
        entropy_mode: how scales choose an integer table: FLOAT, CALIBRATED or EXACT, see
            `nvc_jax.entropy.calibration`.
        margin_exponents: CALIBRATED only, 1 to 8 numbers from 5 to 20: the calibration margin is
            2**-exponent for units of each level of the schedule's hierarchy.
        version: of the format that it was read from.

    Raises:
        NvcError: if a value cannot be stored.
    """

    model: str
    fingerprint: bytes
    width: int
    height: int
    fps: Fraction
    schedule: Schedule
    colour: tuple[int, int, int, bool] = (2, 2, 2, False)
    entropy_mode: int = 0
    margin_exponents: tuple[int, ...] = ()
    version: int = VERSION

    def __post_init__(self):
        _require(
            1 <= len(self.model.encode()) <= MAX_NAME_BYTES and self.model.isprintable(),
            f"model name {self.model[:80]!r} must be 1 to {MAX_NAME_BYTES} printable bytes",
        )
        _require(
            len(self.fingerprint) == 16,
            f"the weights fingerprint has {len(self.fingerprint)} bytes, not 16",
        )
        _require(
            1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE,
            f"pictures of {self.width}x{self.height} pixels: both sides must be 1 to {MAX_SIDE}",
        )
        _require(
            self.fps > 0 and max(self.fps.as_integer_ratio()) < 2**32,
            f"a frame rate of {self.fps} frames per second cannot be stored",
        )
        _require(
            all(0 <= code < 256 for code in self.colour[:3]),
            f"colour description {self.colour} has a code outside 0..255",
        )
        _require(
            self.schedule.intra_period < 2**32,
            f"an intra period of {self.schedule.intra_period} frames cannot be stored",
        )
        _require(
            0 <= self.entropy_mode < len(ENTROPY_MODES)
            and (1 <= len(self.margin_exponents) <= MAX_LEVELS) == (self.entropy_mode == CALIBRATED)
            and all(LEAST_EXPONENT <= e <= LARGEST_EXPONENT for e in self.margin_exponents),
            f"unknown entropy settings: mode {self.entropy_mode}, "
            f"margin exponents {self.margin_exponents}",
        )


@dataclass(frozen=True)
class Packet:
    """One coded unit.

    Attributes:
        frames: display indices coded together, 1 to 8.
        qps: the qp that each frame was coded with, 0..127 (offset included).
        payload: entropy-coded bytes, of interest to the codec only.
        symbols_crc: CRC-32 of the decoded symbols, computed and checked by the codec.
        random_access: decoding can start at this unit.
        group: frames of the schedule's group that the unit begins, if fewer than the schedule
            says; else None.
        mode: of that group, in "mixed" streams, see `nvc_jax.schedule.MODES`; else None.
        damage: what is wrong with the payload, if anything, for people; it is then empty.
    """

    frames: tuple[int, ...]
    qps: tuple[int, ...]
    payload: bytes = field(repr=False)
    symbols_crc: int
    random_access: bool = False
    group: int | None = None
    mode: str | None = None
    damage: str | None = None


class AccessPoint(NamedTuple):
    """Where decoding can start: unit number, its first display frame, byte offset in the file."""

    unit: int
    frame: int
    offset: int


class Index(NamedTuple):
    """What the end of a complete stream says about it."""

    units: int
    frames: int
    access_points: tuple[AccessPoint, ...]


# Writing


@contextmanager
def write_stream(path: str | os.PathLike, header: Header) -> Iterator[StreamWriter]:
    """Writes a stream; use as `with write_stream(path, header) as out: out.write(packet)`.

    The file appears under its name only when everything was written: until then it has a temporary
    name beside it, and any exception removes it.

    Raises:
        NvcError: if the file cannot be written, or no packet was.
    """
    path = Path(path)
    with replacing(path) as hidden:
        with writing(path):
            file = open(hidden, "wb")  # noqa: SIM115 (a failing close must not hide the reason)
        try:
            writer = StreamWriter(file, path, header)
            yield writer
            writer.finish()
        finally:
            with suppress(OSError):
                file.close()


class StreamWriter:
    """Appends packets to a file, see `write_stream`."""

    def __init__(self, file: BinaryIO, path: Path, header: Header):
        self._file = file
        self._path = path
        self._header = header
        self._units = self._frames = self._next_frame = self._size = 0
        self._points: list[AccessPoint] = []
        self._append(_header_bytes(header))
        self._first = self._size

    def write(self, packet: Packet) -> int:
        """Appends one unit and returns its size in the file, in bytes.

        Raises:
            NvcError: if a value cannot be stored, or the file not be written.
        """
        data = _packet_bytes(packet, self._units, self._next_frame, self._header)
        if packet.random_access and len(self._points) < MAX_ACCESS_POINTS:
            self._points.append(AccessPoint(self._units, packet.frames[0], self._size))
        self._append(data)
        self._units += 1
        self._frames += len(packet.frames)
        self._next_frame = packet.frames[-1] + 1
        return len(data)

    def finish(self) -> None:
        """Appends the index; no packet can follow."""
        if not self._units:
            raise NvcError(f"{self._path}: not written, because there were no frames")
        index = Index(self._units, self._frames, tuple(self._points))
        self._append(_index_bytes(index, self._first))
        with writing(self._path):
            self._file.flush()

    def _append(self, data: bytes) -> None:
        with writing(self._path):
            self._file.write(data)
        self._size += len(data)


def _header_bytes(header: Header) -> bytes:
    body = bytearray()
    for name in (header.model, header.schedule.name):
        encoded = name.encode()
        body += bytes([len(encoded)]) + encoded
    body += header.fingerprint
    for value in (
        header.width,
        header.height,
        *header.fps.as_integer_ratio(),
        header.schedule.gop,
        header.schedule.intra_period,
    ):
        body += varint(value)
    body += bytes([*header.colour, header.entropy_mode])
    body += bytes([len(header.margin_exponents), *header.margin_exponents])
    data = MAGIC + bytes([VERSION]) + varint(len(body)) + body
    return data + _u32(zlib.crc32(data))


def _packet_bytes(packet: Packet, unit: int, next_frame: int, header: Header) -> bytes:
    frames, qps, payload = packet.frames, packet.qps, packet.payload
    _require(
        1 <= len(frames) <= MAX_UNIT_FRAMES and len(frames) == len(qps),
        f"unit {unit} has {len(frames)} frames and {len(qps)} qps; "
        f"1 to {MAX_UNIT_FRAMES} frames with one qp each can be stored",
    )
    _require(
        all(0 <= frame < 2**32 for frame in frames),
        f"unit {unit} codes frames {frames}: more than can be counted",
    )
    _require(
        all(0 <= qp <= QP_LIMIT for qp in qps), f"unit {unit} has qps {qps} outside 0..{QP_LIMIT}"
    )
    _require(0 <= packet.symbols_crc < 2**32, f"unit {unit} has a checksum of more than 32 bits")
    _require(
        len(payload) <= _max_payload_bytes(header, len(frames)),
        f"unit {unit} has {len(payload)} bytes, far more than its picture",
    )
    tag = _PACKET | (_RANDOM_ACCESS if packet.random_access else 0) | (len(frames) - 1)
    explicit = b""
    if frames != tuple(range(next_frame, next_frame + len(frames))):
        tag |= _EXPLICIT
        explicit = b"".join(map(varint, frames))
    if packet.group is not None or packet.mode is not None:
        size, mode = packet.group, packet.mode
        _require(size is None or 0 < size < 64, f"unit {unit} begins a group of {size} frames")
        _require(
            mode is None or (mode in MODES and header.schedule.name == "mixed"),
            f"unit {unit} begins a group in the mode {mode}, of schedule {header.schedule.name}",
        )
        tag |= _GROUP
        explicit = bytes([(size or 0) | MODES.index(mode or MODES[0]) << 6]) + explicit
    head = bytes([tag]) + explicit + bytes(qps) + varint(len(payload)) + _u32(packet.symbols_crc)
    head += bytes([_crc8(head)])
    return head + payload + _u32(_packet_crc(unit, frames[0], head, payload))


def _index_bytes(index: Index, first_offset: int) -> bytes:
    body = bytearray(varint(index.units) + varint(index.frames))
    body += varint(len(index.access_points))
    last = AccessPoint(0, 0, first_offset)
    for point in index.access_points:
        body += varint(point.unit - last.unit)
        body += varint(point.frame)
        body += varint(point.offset - last.offset)
        last = point
    block = bytes([_INDEX]) + varint(len(body)) + body
    block += _u32(zlib.crc32(block))
    return block + _u32(len(block)) + END_MAGIC


# Reading


def read_header(path: str | os.PathLike) -> Header:
    """The header of a stream.

    Raises:
        StreamError: if the file cannot be read, is no `.nvc` stream, comes from a newer version,
            or is damaged there.
    """
    with open_stream(path) as stream:
        return stream.header


@contextmanager
def open_stream(path: str | os.PathLike) -> Iterator[Stream]:
    """Opens a stream for reading; use as `with open_stream(path) as stream:`.

    A damaged or missing end does not matter here: `stream.index` is then None, and reading the
    packets ends in an error that says so.

    Raises:
        StreamError: as `read_header`.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StreamError(f"{path}: not a file; give one .nvc file")
        file = open(path, "rb")  # noqa: SIM115 (closed below; only the opening is guarded here)
    except OSError as error:
        raise StreamError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        yield Stream(_Source(file, path))


class Stream:
    """An open stream.

    Attributes:
        header: what the file says before the first unit.
        index: what it says after the last one; None when the end is missing or damaged.
    """

    header: Header
    index: Index | None

    def __init__(self, source: _Source):
        self._source = source
        self.header = _read_header(source)
        self._first = source.tell()
        self.index = _find_index(source, self._first)

    @property
    def frame_count(self) -> int | None:
        """Number of frames, or None when the file was cut off and does not tell."""
        return self.index.frames if self.index else None

    def access_point(self, frame: int) -> AccessPoint:
        """The last unit at or before `frame` at which decoding can start.

        Raises:
            StreamError: if the stream has no index, or no such unit.
        """
        if self.index is None:
            raise StreamError(
                f"{self._source.path}: the index at the end is missing or damaged, so the file "
                "can only be decoded from its beginning; copy or encode it again"
            )
        points = [point for point in self.index.access_points if point.frame <= frame]
        if not points or frame >= self.index.frames:
            raise StreamError(
                f"{self._source.path}: nothing to start from for frame {frame} "
                f"(the stream has {self.index.frames} frames)"
            )
        return max(points, key=lambda point: point.frame)

    def next_access_point(self, unit: int) -> AccessPoint | None:
        """The first listed unit after `unit` at which decoding can start; None if the index is
        missing, damaged, or lists none."""
        points = self.index.access_points if self.index else ()
        place = bisect_right(points, unit, key=lambda point: point.unit)
        return points[place] if place < len(points) else None

    def packets(
        self, start: AccessPoint | None = None, salvage: bool = False
    ) -> Iterator[tuple[int, Packet]]:
        """Unit numbers and packets in coding order, one in memory at a time.

        Starts at the first unit, or at `start`. Every packet handed out is as it was written, but
        with `salvage` those too of which only the payload is damaged: see `Packet.damage`.

        Raises:
            BrokenStream: after the last such packet, if the file is damaged or cut off there.
        """
        for unit, packet, _ in self._packets(start, salvage):
            yield unit, packet

    def _packets(
        self, start: AccessPoint | None = None, salvage: bool = False
    ) -> Iterator[tuple[int, Packet, int]]:
        """As `packets`, with the size of each in the file."""
        source = self._source
        first, next_frame, offset = start or AccessPoint(0, 0, self._first)
        unit, frames = first, 0
        intact_units = intact_frames = 0
        try:
            while True:
                place = f"unit {unit}"
                source.seek(offset)
                tag = source.read(1)[0]
                if tag & _PACKET_MASK != _PACKET:
                    break
                # No unit reaches into one that the index lists. This bounds what is read in vain
                # where an index leads into damage again and again.
                following = self.next_access_point(unit)
                end = following.offset if following else source.size
                try:
                    packet = _read_packet(source, self.header, tag, unit, next_frame, end)
                    intact_units += 1
                    intact_frames += len(packet.frames)
                except _DamagedPayload as error:
                    if not (salvage and self._goes_on_behind(error, unit, following)):
                        raise
                    reason = self._complaint(error, place, intact_units, intact_frames)
                    packet = replace(error.packet, damage=reason)
                    source.seek(error.end)
                size = source.tell() - offset
                yield unit, packet, size
                offset += size
                unit += 1
                frames += len(packet.frames)
                next_frame = packet.frames[-1] + 1
            if tag != _INDEX:
                raise _Unreadable("no unit begins like this", offset)
            place = "the index"
            source.seek(offset)
            index = _read_index(source, self._first, offset)
            if source.tell() != source.size:
                raise _Unreadable("the file goes on after its end", source.tell())
            if index.units != unit or (start is None and index.frames != frames):
                raise _Unreadable(
                    f"the index speaks of {index.units} units with {index.frames} frames", offset
                )
        except _Unreadable as error:
            reason = self._complaint(error, place, intact_units, intact_frames)
            raise BrokenStream(reason, intact_units, intact_frames) from None

    def _goes_on_behind(
        self, damaged: _DamagedPayload, unit: int, following: AccessPoint | None
    ) -> bool:
        """Whether it makes sense to read on: eight bits alone vouch for a head's size and frames.

        Args:
            following: the next access point that the index lists, if any.
        """
        source = self._source
        if following and following.unit == unit + 1 and following.offset != damaged.end:
            return False
        if self.index and max(damaged.packet.frames) >= self.index.frames:
            return False
        if damaged.end == source.size:
            return False
        source.seek(damaged.end)
        tag = source.read(1)[0]
        return tag & _PACKET_MASK == _PACKET or tag == _INDEX

    def _complaint(self, error: _Unreadable, place: str, units: int, frames: int) -> str:
        what = "cut off" if error.truncated else "damaged"
        return (
            f"{self._source.path}: {what} at {place}, byte {error.offset}: {error}; {units} units "
            f"({frames} frames) before it are intact. To get the rest, copy or encode the file "
            "again."
        )


def stream_info(path: str | os.PathLike) -> dict:
    """Everything that a file says without its model, in values that JSON can hold.

    Reads the whole file and checks every checksum of the container. `error` is None, or what is
    wrong with the file; everything else then describes the intact part. `bpp` counts every byte of
    the file; `container_bytes` are those outside the payloads.

    Raises:
        StreamError: as `read_header`.
    """
    with open_stream(path) as stream:
        units, error = [], None
        try:
            for unit, packet, size in stream._packets():
                units.append(
                    {
                        "unit": unit,
                        "frames": list(packet.frames),
                        "qp": list(packet.qps),
                        "bytes": size,
                        "payload_bytes": len(packet.payload),
                        "random_access": packet.random_access,
                        "group": packet.group,
                        "mode": packet.mode,
                        "symbols_crc": packet.symbols_crc,
                    }
                )
        except BrokenStream as broken:
            error = str(broken)
        header = stream.header
        frames = sum(len(unit["frames"]) for unit in units)
        size = stream._source.size
        primaries, transfer, matrix, full_range = header.colour
        return {
            "file": str(path),
            "error": error,
            "version": header.version,
            "model": header.model,
            "fingerprint": header.fingerprint.hex(),
            "width": header.width,
            "height": header.height,
            "fps": str(header.fps),
            "colour": {
                "primaries": primaries,
                "transfer": transfer,
                "matrix": matrix,
                "full_range": full_range,
            },
            "schedule": asdict(header.schedule),
            "entropy_mode": ENTROPY_MODES[header.entropy_mode],
            "margin_exponents": list(header.margin_exponents),
            "frames": frames,
            "seconds": float(frames / header.fps),
            "file_bytes": size,
            "container_bytes": size - sum(unit["payload_bytes"] for unit in units),
            "bpp": 8 * size / (frames * header.width * header.height) if frames else None,
            "bits_per_second": float(8 * size * header.fps / frames) if frames else None,
            "units": units,
        }


class _Unreadable(Exception):
    """What is wrong with the bytes at `offset`; `truncated` if only that there are too few."""

    def __init__(self, message: str, offset: int, truncated: bool = False):
        super().__init__(message)
        self.offset = offset
        self.truncated = truncated


class _DamagedPayload(_Unreadable):
    """A packet, without its payload, of which nothing else is wrong; it ends before byte `end`."""

    def __init__(self, packet: Packet, offset: int, end: int):
        super().__init__("the checksum of the unit is wrong", offset)
        self.packet = packet
        self.end = end


class _Source:
    """A file that never hands out fewer bytes than asked for."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.tell = file.tell
        self.seek = file.seek

    def read(self, count: int) -> bytes:
        offset = self.tell()
        try:
            data = self._file.read(count) if count <= self.size - offset else b""
        except OSError as error:
            raise _Unreadable(f"reading failed: {error.strerror or error}", offset) from error
        if len(data) != count:
            raise _Unreadable(f"the file ends at byte {self.size}", offset, True)
        return data

    def varint(self, largest: int) -> int:
        """A LEB128 number from 0 to `largest`."""
        offset = self.tell()
        value = shift = 0
        while True:
            byte = self.read(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if value > largest:
                raise _Unreadable(f"a number is larger than {largest}", offset)
            if byte < 0x80:
                break
            if shift >= 70:
                raise _Unreadable("a number has no end", offset)
        if byte == 0 and shift > 7:
            raise _Unreadable("a number is written in more bytes than it needs", offset)
        return value

    def u32(self) -> int:
        return struct.unpack("<I", self.read(4))[0]

    def checked_since(self, start: int) -> None:
        """Reads a CRC-32 and holds it against the bytes from `start` to here."""
        end = self.tell()
        self.seek(start)
        expected = zlib.crc32(self.read(end - start))
        if self.u32() != expected:
            raise _Unreadable("the checksum is wrong", start)


def _read_header(source: _Source) -> Header:
    path = source.path
    source.seek(0)
    magic = source.read(min(len(MAGIC), source.size))
    if not magic or magic != MAGIC[: len(magic)]:
        raise StreamError(f"{path}: not a .nvc stream; write one with `nvc encode`")
    try:
        source.seek(len(MAGIC))
        version = source.read(1)[0]
        if not OLDEST_VERSION <= version <= VERSION:
            remedy = "update nvc_jax" if version > VERSION else "use an older nvc_jax"
            raise StreamError(
                f"{path}: written in version {version} of the format, this program reads versions "
                f"{OLDEST_VERSION} to {VERSION}; {remedy}, or encode the video again"
            )
        end = source.varint(MAX_HEADER_BYTES) + source.tell()
        here = source.tell()
        source.read(end - here)
        source.checked_since(0)
        source.seek(here)
        names = [source.read(source.read(1)[0]).decode() for _ in range(2)]
        fingerprint = source.read(16)
        width, height, numerator, denominator, gop, period = (
            source.varint(2**32 - 1) for _ in range(6)
        )
        *codes, full_range, mode, levels = source.read(6)
        exponents = tuple(source.read(levels))
        if source.tell() != end or full_range > 1 or denominator == 0:
            raise _Unreadable("a header cannot look like this", here)
        header = Header(
            model=names[0],
            fingerprint=fingerprint,
            width=width,
            height=height,
            fps=Fraction(numerator, denominator),
            schedule=Schedule(names[1], gop, period),
            colour=(*codes, bool(full_range)),
            entropy_mode=mode,
            margin_exponents=exponents,
            version=version,
        )
    except _Unreadable as error:
        what = "cut off" if error.truncated else "damaged"
        raise StreamError(
            f"{path}: {what} in the header, at byte {error.offset}: {error}; nothing can be "
            "decoded. Copy or encode the file again."
        ) from None
    except UnicodeDecodeError:
        raise StreamError(f"{path}: damaged in the header: a name is not UTF-8") from None
    except NvcError as error:
        if isinstance(error, StreamError):
            raise
        raise StreamError(
            f"{path}: the header asks for what this version of nvc_jax cannot do: {error}"
        ) from None
    source.seek(end + 4)
    return header


def _read_packet(
    source: _Source, header: Header, tag: int, unit: int, next_frame: int, limit: int
) -> Packet:
    """The packet whose tag was read just now; it must end at byte `limit` at the latest."""
    start = source.tell() - 1
    count = (tag & 0b111) + 1
    group, mode = _read_group(source, header) if tag & _GROUP else (None, None)
    frames = tuple(range(next_frame, next_frame + count))
    if tag & _EXPLICIT:
        frames = tuple(source.varint(2**32 - 1) for _ in range(count))
    qps = tuple(source.read(count))
    size = source.varint(_max_payload_bytes(header, count))
    symbols_crc = source.u32()
    end = source.tell()
    source.seek(start)
    head = source.read(end - start + 1)
    if head[-1] != _crc8(head[:-1]) or max(qps) > QP_LIMIT:
        raise _Unreadable("the checksum of the unit's header is wrong", start)
    if limit < source.tell() + size + 4 <= source.size:
        raise _Unreadable(f"the unit goes beyond byte {limit}, where another begins", start)
    payload = source.read(size)
    packet = Packet(frames, qps, payload, symbols_crc, bool(tag & _RANDOM_ACCESS), group, mode)
    if source.u32() != _packet_crc(unit, frames[0], head, payload):
        raise _DamagedPayload(replace(packet, payload=b""), start, source.tell())
    return packet


def _read_group(source: _Source, header: Header) -> tuple[int | None, str | None]:
    """What a packet says about the group that it begins: (frames, mode)."""
    (value,) = source.read(1)
    size, mode = value & 0x3F or None, value >> 6
    if header.schedule.name == "mixed" and mode < len(MODES):
        return size, MODES[mode]
    if mode or not size:
        raise _Unreadable("a group cannot look like this", source.tell() - 1)
    return size, None


def _find_index(source: _Source, first_offset: int) -> Index | None:
    """The index, found from the end of the file; None if anything there is not as it should be."""
    try:
        source.seek(max(source.size - 8, 0))
        offset = source.size - 8 - source.u32()
        if offset < first_offset:
            return None
        source.seek(offset)
        return _read_index(source, first_offset, offset)
    except _Unreadable:
        return None


def _read_index(source: _Source, first_offset: int, offset: int) -> Index:
    """The index at `offset`, which is where `source` stands, and the trailer after it."""
    if source.read(1)[0] != _INDEX:
        raise _Unreadable("not an index", offset)
    size = source.varint(32 + 20 * MAX_ACCESS_POINTS)
    body = source.tell()
    source.read(size)
    source.checked_since(offset)
    end = source.tell()
    if source.u32() != end - offset or source.read(4) != END_MAGIC:
        raise _Unreadable("the last 8 bytes are wrong", end)
    after = source.tell()
    source.seek(body)
    units, frames = source.varint(2**32), source.varint(2**35)
    if not units <= frames <= units * MAX_UNIT_FRAMES or (
        units * _MIN_PACKET_BYTES > offset - first_offset
    ):
        raise _Unreadable(f"the index speaks of {units} units with {frames} frames", offset)
    points = []
    last = AccessPoint(0, 0, first_offset)
    for _ in range(source.varint(min(units, MAX_ACCESS_POINTS))):
        more_units, frame, more_bytes = (source.varint(n) for n in (units, 2**32 - 1, offset))
        point = AccessPoint(last.unit + more_units, frame, last.offset + more_bytes)
        if (
            point.unit >= units
            or point.offset >= offset
            or more_bytes < more_units * _MIN_PACKET_BYTES
            or (points and not more_units)
        ):
            raise _Unreadable("an index cannot look like this", offset)
        points.append(point)
        last = point
    if source.tell() != body + size:
        raise _Unreadable("an index cannot look like this", offset)
    source.seek(after)
    return Index(units, frames, tuple(points))


# Numbers and checksums


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise NvcError(message)


def _max_payload_bytes(header: Header, frames: int) -> int:
    """Far above what any codec writes, and a bound on what a stream can make us read at once."""
    return 65536 + 8 * header.width * header.height * frames


def varint(value: int) -> bytes:
    """Unsigned LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(data) + bytes([value])


def read_varint(data: bytes) -> tuple[int, int]:
    """(value, bytes it takes) of the `varint` of at most 5 bytes that data begins with.

    Raises:
        StreamError: there is none.
    """
    value = 0
    for place, byte in enumerate(data[:5]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, place + 1
    raise StreamError("the data ends within a number, or the number is too large")


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _crc8(data: bytes) -> int:
    """CRC-8 with polynomial 0x07, initial value 0: finds any damage within eight bits."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x107) if crc & 0x80 else crc << 1
    return crc


def _packet_crc(unit: int, first_frame: int, head: bytes, payload: bytes) -> int:
    """CRC-32 of a packet, with the unit number and first frame that the file does not repeat."""
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QQ", unit, first_frame) + head))
