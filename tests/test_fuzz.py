"""Hostile input: every outcome is a decoded video, or one line and exit status 2.

The targets are in fuzz_stream.py, which is a coverage-guided fuzzer when it runs by itself.
"""

import os
import subprocess
import sys
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import fuzz_stream
import pytest
from conftest import noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvc_jax import bitstream, cli, codec, conceal, schedule, unit_program
from nvc_jax.entropy.calibration import CALIBRATED
from nvc_jax.errors import NvcError
from nvc_jax.video import WRITABLE, Colour, VideoInfo, open_video, write_video

WIDTH, HEIGHT = 37, 23
STREAMS = fuzz_stream.streams()

seldom = st.sampled_from([False] * 3 + [True])
interesting = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\x00", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\xff\x0f", b"I", b"\xc8"]),
)


@st.composite
def damaged(draw, data: bytes, first: int = 0) -> bytes:
    """`data` after one to four edits behind its byte `first`."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(first, len(data)))
        kind = draw(st.sampled_from(["replace", "insert", "delete", "repeat", "cut", "flip"]))
        new, length = b"", draw(st.integers(0, 40))
        if kind in ("replace", "insert"):
            new = draw(interesting)
            length = len(new) if kind == "replace" else 0
        elif kind == "repeat":
            new, length = data[at : at + length] * 2, length
        elif kind == "cut" and draw(seldom):
            length = len(data)
        elif at < len(data):
            new, length = bytes([data[at] ^ 1 << draw(st.integers(0, 7))]), 1
        data = data[:at] + new + data[at + length :]
    return data


@settings(max_examples=1000)
@given(st.sampled_from(STREAMS).flatmap(damaged), seldom)
def test_damaged_streams(data, as_it_is):
    fuzz_stream.container(bytes([as_it_is]) + data)


@settings(max_examples=500)
@given(st.binary(max_size=300), st.sampled_from(STREAMS), seldom)
def test_anything_behind_a_header(data, stream, as_it_is):
    header = stream[: 5 + 1 + stream[5] + 4]
    fuzz_stream.container(bytes([as_it_is]) + header + data)


@settings(max_examples=1500)
@given(st.binary(min_size=6, max_size=6), st.binary(max_size=120))
def test_any_payload(choice, data):
    fuzz_stream.host_coder(choice + data)


@settings(max_examples=1000)
@given(st.sampled_from(fuzz_stream.element_lists()).flatmap(damaged))
def test_any_list_of_elements(data):
    fuzz_stream.element_list(data)


@given(st.sampled_from(fuzz_stream.payloads_with_motion()).flatmap(damaged))
def test_any_payload_with_motion(data):
    fuzz_stream.payload_with_motion(data)


def test_found_by_coverage():
    """A first unit of impossible frames was described differently with and without concealment."""
    header = bitstream.Header("m", bytes(16), 16, 16, Fraction(25), schedule.all_intra())
    with bitstream.write_stream(fuzz_stream.PATH, header) as out:
        out.write(bitstream.Packet((29, 2120, 109, 2), (30,) * 4, bytes(57), 0, False))
    data = fuzz_stream.PATH.read_bytes()
    for stream in (data, data[:-1]):
        fuzz_stream.container(b"\x01" + stream)


def test_the_targets_notice_what_they_are_for(monkeypatch):
    """Concealment that forgets its pictures, and a coder that fails in a way of its own."""
    data = bytearray(STREAMS[0])
    data[len(data) // 2] ^= 1
    fuzz_stream.container(b"\x01" + data)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(conceal, "repeat", lambda *_: ())
        fuzz_stream.container(b"\x01" + data)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(fuzz_stream.coder, "finish_decode", lambda *_: 1 / 0)
        fuzz_stream.host_coder(b"\x01" + bytes(5))
    with_motion = fuzz_stream.payloads_with_motion()[-1]
    fuzz_stream.payload_with_motion(with_motion)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(fuzz_stream.motion, "encode", lambda *_: b"")
        fuzz_stream.payload_with_motion(with_motion)
    elements = fuzz_stream.element_lists()[4]
    fuzz_stream.element_list(elements)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(fuzz_stream.calibration, "write_flags", lambda *_: b"")
        fuzz_stream.element_list(elements)


BOUNDS = """\
import numpy as np
import fuzz_stream
rng = np.random.default_rng(int(__import__("sys").argv[1]))
for kind in range(4):
    for _ in range(150):
        size = rng.integers(0, 120)
        fuzz_stream.host_coder(bytes([64 * rng.integers(2) + kind]) + rng.bytes(5 + size))
"""


def test_the_compiled_loops_stay_inside_their_arrays(tmp_path):
    """numba checks every index, and raises."""
    environ = os.environ | {
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path),  # what is kept elsewhere was compiled without checks
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", BOUNDS, "1"], capture_output=True, text=True, env=environ
    )
    assert (done.returncode, done.stderr) == (0, "")


# The whole command


@pytest.fixture(scope="module")
def stream(prepared):
    """(a valid stream of six units, where its first packet begins)."""
    # The mode with the most to parse.
    unit_codec = prepared("ui2c", WIDTH, HEIGHT, CALIBRATED, (6,))
    order = codec.schedule_for(unit_codec.model, 4)
    info = VideoInfo(WIDTH, HEIGHT, 25)
    header = codec.make_header(unit_codec, info, order)
    with bitstream.write_stream(fuzz_stream.PATH, header) as out:
        first = out._size
        for unit in codec.encode(unit_codec, noise(WIDTH, HEIGHT, 11), 10, order):
            out.write(unit.packet)
    return fuzz_stream.PATH.read_bytes(), first


@pytest.fixture
def outcome(prepare_once, tmp_path, monkeypatch, small_models_shipped, capsys):
    """outcome(data, name of the output, options...) decodes and returns (status, frames)."""
    monkeypatch.chdir(tmp_path)

    def decode(data, output, *options):
        Path("in.nvc").write_bytes(data)
        Path(output).unlink(missing_ok=True)
        status = cli.main(["decode", "in.nvc", output, *options])
        captured = capsys.readouterr()
        assert captured.err.count("\n") == (status != 0) and captured.err[:5] in ("", "nvc: ")
        assert status in (0, 2) and {p.name for p in Path().iterdir()} <= {"in.nvc", output}
        assert Path(output).exists() or status == 2
        frames = len(list(open_video(output)[1])) if Path(output).exists() else None
        return status, frames

    return decode


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), sealed=seldom, conceal=st.booleans())
def test_decoding_damaged_files(stream, outcome, data, sealed, conceal):
    whole, first = stream
    mangled = data.draw(damaged(whole, first))
    mangled = fuzz_stream.seal(mangled) if sealed else mangled
    status, frames = outcome(mangled, "out.y4m", *["--conceal"] * conceal)
    assert (status, frames) == (0, 11) or status == 2 or sealed
    assert mangled != whole or status == 0
    if frames is not None:
        assert frames <= 8 * len(mangled) / 12


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decoding_damaged_headers(stream, outcome, data):
    """Under a valid checksum. Larger pictures than the stream's are refused: they would be slow."""
    whole, first = stream
    mangled = fuzz_stream.seal(data.draw(damaged(whole[:first])) + whole[first:])
    with pytest.MonkeyPatch.context() as patch:
        # Smaller ones compile a program of their own.
        patch.setattr(unit_program, "prepare", _only_this_size(unit_program.prepare))
        with suppress(_OtherSizeError):
            outcome(mangled, "out.y4m", "--max-pixels", str(WIDTH * HEIGHT))


class _OtherSizeError(Exception):
    pass


def _only_this_size(prepare):
    def checked(model, width, height, *how):
        if (width, height) != (WIDTH, HEIGHT):
            raise _OtherSizeError
        return prepare(model, width, height, *how)

    return checked


@pytest.mark.parametrize("ending", WRITABLE)
def test_every_colour_and_rate_that_a_header_can_hold(tmp_path, ending):
    """Goes into the file, or is refused."""
    values = (0, 1, 2, 3, 9, 14, 15, 18, 22, 23, 100, 255)
    colours = [(2,) * k + (value,) + (2,) * (2 - k) for k in range(3) for value in values]
    infos = [VideoInfo(16, 16, Fraction(25), Colour(*codes, True)) for codes in colours]
    huge = 2**32 - 1
    for fps in (Fraction(huge), Fraction(1, huge), Fraction(huge, huge - 1), Fraction(huge, 7)):
        infos.append(VideoInfo(16, 16, fps))
    (picture,) = noise(16, 16, 1)
    written = 0
    for number, info in enumerate(infos):
        path = tmp_path / f"{number}{ending}"
        try:
            with write_video(path, info) as out:
                out.write(picture)
                out.write(picture)
            assert path.stat().st_size
            written += 1
        except NvcError as error:
            assert str(path) in str(error) and "cannot be written" in str(error)
            assert not list(tmp_path.glob(f"*{number}{ending}"))
    assert written > len(infos) / 2


def test_a_thousand_losses(stream, outcome):
    """Each costs what a unit costs."""
    header = bitstream.read_header(fuzz_stream.PATH)
    with bitstream.write_stream("damaged.nvc", header) as out:
        for unit in range(2000):
            frames = (2 * unit, 2 * unit + 1)
            out.write(bitstream.Packet(frames, (99, 99), bytes(40), 0, unit % 2 == 0))
    data = Path("damaged.nvc").read_bytes()
    Path("damaged.nvc").unlink()
    assert outcome(data, "out.y4m", "--conceal") == (2, None)
