"""What a damaged stream still decodes to, with and without concealment, and what is said about it.

The stream of these tests has eight units; decoding can start at units 0, 2, 4 and 6.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_pictures, noise

from nvc_jax import bitstream, cli, codec, unit_program
from nvc_jax.entropy.calibration import FLOAT
from nvc_jax.video import VideoInfo, open_video

WIDTH, HEIGHT, UNITS = 37, 23, 8

pytestmark = pytest.mark.usefixtures("prepare_once", "quick_compilation")


@pytest.fixture(scope="module")
def coded(prepared):
    """(header, packets, reconstructions)."""
    unit_codec = prepared("ui2c", WIDTH, HEIGHT, FLOAT)
    schedule = codec.schedule_for(unit_codec.model, 4)
    header = codec.make_header(unit_codec, VideoInfo(WIDTH, HEIGHT, 25), schedule)
    units = list(codec.encode(unit_codec, noise(WIDTH, HEIGHT, 2 * UNITS), 20, schedule, True))
    return header, [u.packet for u in units], [r for u in units for r in u.recons]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, small_models_shipped):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def decode(capsys):
    """decode(options...) of clip.nvc -> (status, complaint, result, pictures or None)."""

    def run(*options):
        for name in ("out.y4m", "out.json"):
            Path(name).unlink(missing_ok=True)
        arguments = ["decode", "clip.nvc", "out.y4m", "--json", "out.json", *map(str, options)]
        status = cli.main(arguments)
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == (status != 0)
        result = json.loads(Path("out.json").read_text()) if Path("out.json").exists() else None
        pictures = list(open_video("out.y4m")[1]) if Path("out.y4m").exists() else None
        return status, complaint, result, pictures

    return run


def write(coded, mismatched=()) -> list[int]:
    """Writes clip.nvc, some units with wrong symbol checksums; returns where each packet begins."""
    header, packets, _ = coded
    offsets = []
    with bitstream.write_stream("clip.nvc", header) as out:
        offsets.append(out._size)
        for number, packet in enumerate(packets):
            wrong = packet.symbols_crc ^ 1
            if number in mismatched:
                packet = bitstream.Packet(
                    packet.frames, packet.qps, packet.payload, wrong, packet.random_access
                )
            offsets.append(offsets[-1] + out.write(packet))
    return offsets


def damage(*places):
    data = bytearray(Path("clip.nvc").read_bytes())
    for place in places:
        data[place] ^= 0x10
    Path("clip.nvc").write_bytes(data)


def concealed(recons, lost_units):
    """The reconstructions, where those of lost units repeat the picture before (or are grey)."""
    last, pictures = [np.full_like(p, 128) for p in recons[0]], []
    for frame, recon in enumerate(recons):
        last = last if frame // 2 in lost_units else recon
        pictures.append(last)
    return pictures


@pytest.mark.parametrize(
    "mismatched, lost",
    [
        ((1,), [(1, 1)]),
        ((2,), [(2, 2)]),
        ((0,), [(0, 2)]),
        ((0, 2, 4), [(0, 2), (2, 2), (4, 2)]),
        ((1, 7), [(1, 1), (7, 1)]),
        ((6,), [(6, 2)]),
        (range(1, 8), [(1, 1), (2, 2), (4, 2), (6, 2)]),
    ],
)
def test_a_symbol_mismatch(coded, decode, mismatched, lost):
    write(coded, mismatched)
    lost_units = {unit + k for unit, count in lost for k in range(count)}
    status, complaint, result, pictures = decode("--conceal")
    assert status == 2
    assert f"unit {mismatched[0]} (frames {2 * mismatched[0]}, " in complaint
    assert "arithmetic here differs" in complaint and "Decode it on" in complaint
    assert f"holds 16 frames, {2 * len(lost_units)} of them concealed" in complaint
    assert_same_pictures(pictures, concealed(coded[2], lost_units))
    assert result["frames_concealed"] == 2 * len(lost_units)
    assert result["frames"] == 16 - 2 * len(lost_units) and result["frames_in_stream"] == 16
    assert [(loss["unit"], loss["units"]) for loss in result["losses"]] == lost
    assert [(loss["frame"], loss["frames"]) for loss in result["losses"]] == [
        (2 * unit, 2 * count) for unit, count in lost
    ]
    assert all("does not decode to what was encoded" in loss["reason"] for loss in result["losses"])
    kept = [unit for unit in range(UNITS) if unit not in lost_units]
    assert [u["frames"] for u in result["units"]] == [[2 * k, 2 * k + 1] for k in kept]


def test_without_concealment_decoding_stops_and_keeps_what_it_has(coded, decode):
    write(coded, (3, 6))
    status, complaint, result, pictures = decode()
    assert status == 2 and "holds the 6 frames before" in complaint
    assert "with --conceal, decoding is tried again at frame 8" in complaint
    assert_same_pictures(pictures, coded[2][:6])
    assert (result["frames"], result["frames_concealed"], len(result["losses"])) == (6, 0, 1)
    write(coded, (7,))
    assert "--conceal" not in decode()[1]
    write(coded, (0, 2))
    status, complaint, _, pictures = decode()
    assert (status, pictures) == (2, None)
    assert "Nothing was written; with --conceal, decoding is tried again at frame 4" in complaint


@pytest.mark.parametrize("inside", [0, 2, 8, 40, -1])
@pytest.mark.parametrize("unit, lost", [(0, {0, 1}), (1, {1}), (4, {4, 5}), (5, {5}), (7, {7})])
def test_damage_of_the_container(coded, decode, unit, lost, inside):
    """Decoding goes on at the next access point that the index lists."""
    offsets = write(coded)
    damage(offsets[unit] + inside if inside >= 0 else offsets[unit + 1] - 1)
    status, complaint, result, pictures = decode("--conceal")
    assert status == 2 and f"damaged at unit {unit}, byte " in complaint
    assert f"{2 * len(lost)} of them concealed" in complaint
    assert_same_pictures(pictures, concealed(coded[2], lost))
    assert [loss["unit"] for loss in result["losses"]] == [unit]


def test_damage_in_many_places(coded, decode):
    """A mismatch, then damage of a unit that refers to it, and of one where decoding can start."""
    offsets = write(coded, (0, 7))
    damage(offsets[1] + 30, offsets[2] + 30, offsets[5] + 30)
    _, complaint, result, pictures = decode("--conceal")
    assert "lost in 4 places" in complaint
    assert_same_pictures(pictures, concealed(coded[2], {0, 1, 2, 3, 5, 7}))
    losses = [(loss["unit"], loss["units"]) for loss in result["losses"]]
    assert losses == [(0, 2), (2, 2), (5, 1), (7, 1)]
    assert "checksum of its symbols" in result["losses"][0]["reason"]


@pytest.mark.parametrize("options", [(), ("--conceal",)])
@pytest.mark.parametrize("units", [1, 4, 7])
def test_a_file_that_was_cut_off(coded, decode, units, options):
    offsets = write(coded)
    Path("clip.nvc").write_bytes(Path("clip.nvc").read_bytes()[: offsets[units] + 20])
    status, complaint, result, pictures = decode(*options)
    assert status == 2 and f"cut off at unit {units}" in complaint
    assert f"holds {2 * units} frames, 0 of them" in complaint or not options
    assert_same_pictures(pictures, coded[2][: 2 * units])
    (loss,) = result["losses"]
    assert (loss["unit"], loss["units"], loss["frame"], loss["frames"]) == (
        units, None, 2 * units, None,
    )  # fmt: skip


def test_a_mismatch_in_a_file_that_was_cut_off(coded, decode):
    """Units before the cut are still there, and those after the mismatch are decoded."""
    offsets = write(coded, (1, 4))
    Path("clip.nvc").write_bytes(Path("clip.nvc").read_bytes()[: offsets[6] - 1])
    _, _, result, pictures = decode("--conceal")
    assert_same_pictures(pictures, concealed(coded[2][:10], {1, 4}))
    assert [(loss["unit"], loss["units"]) for loss in result["losses"]] == [
        (1, 1), (4, 1), (5, None),
    ]  # fmt: skip


def test_damage_of_a_unit_and_of_the_index(coded, decode):
    """Without an index, only a unit's own beginning says where the next one is."""
    offsets = write(coded)
    damage(offsets[3] + 30, offsets[-1] + 3)
    status, complaint, _, pictures = decode("--conceal")
    assert status == 2 and "damaged at unit 3" in complaint
    assert_same_pictures(pictures, concealed(coded[2], {3}))
    offsets = write(coded)
    damage(offsets[3] + 2, offsets[-1] + 3)
    status, complaint, _, pictures = decode("--conceal")
    assert status == 2 and "damaged at unit 3" in complaint
    assert_same_pictures(pictures, coded[2][:6])


def test_damage_of_the_index_alone_loses_no_picture(coded, decode):
    offsets = write(coded)
    damage(offsets[-1] + 3)
    for options in ((), ("--conceal",)):
        status, complaint, _, pictures = decode(*options)
        assert status == 2 and "damaged at the index" in complaint
        assert_same_pictures(pictures, coded[2])


def test_an_intact_stream_is_not_touched_by_concealment(coded, decode):
    write(coded)
    status, _, result, pictures = decode("--conceal")
    assert status == 0 and result["losses"] == [] and result["frames_concealed"] == 0
    assert_same_pictures(pictures, coded[2])


def test_nothing_is_written_when_no_unit_decodes(coded, decode):
    write(coded, range(8))
    for options in ((), ("--conceal",)):
        status, complaint, result, pictures = decode(*options)
        assert (status, result, pictures) == (2, None, None)
        assert complaint.startswith("nvc: unit 0 (frames 0, 1)")


def test_a_stream_without_units(coded, decode):
    """We never write one, but its checksums can be right."""
    data = bitstream._header_bytes(coded[0])
    data += bitstream._index_bytes(bitstream.Index(0, 0, ()), len(data))
    Path("clip.nvc").write_bytes(data)
    for options in ((), ("--conceal",)):
        status, complaint, _, pictures = decode(*options)
        assert (status, pictures) == (2, None) and "no pictures" in complaint


@pytest.mark.parametrize("frames", [(6, 7), (2, 3), (4, 2**32 - 1), (2**32 - 2, 2**32 - 1)])
@pytest.mark.parametrize("options", [(), ("--conceal",)])
def test_a_unit_that_claims_other_frames(coded, decode, frames, options):
    """Frame numbers written out, under valid checksums: no gap is made up for them."""
    header, packets, recons = coded
    with bitstream.write_stream("clip.nvc", header) as out:
        for number, packet in enumerate(packets[:6]):
            if number == 2:
                packet = bitstream.Packet(frames, packet.qps, packet.payload, 0, True)
            out.write(packet)
    status, _, _, pictures = decode(*options)
    assert status == 2
    assert_same_pictures(pictures, concealed(recons[:12], {2, 3}) if options else recons[:4])


# Limits


def test_large_pictures_are_refused_before_anything_is_allocated(coded, decode, monkeypatch):
    def forbidden(*_):
        raise AssertionError("memory would be taken")

    write(coded)
    monkeypatch.setattr(unit_program, "prepare", forbidden)
    status, complaint, _, pictures = decode("--max-pixels", WIDTH * HEIGHT - 1)
    assert (status, pictures) == (2, None)
    assert "851 pixels are more than the limit of 850" in complaint and "--max-pixels" in complaint
    header = bitstream.Header(
        "tiny-ui2c", coded[0].fingerprint, 16384, 16384, coded[0].fps, coded[0].schedule
    )
    with bitstream.write_stream("clip.nvc", header) as out:
        out.write(coded[1][0])
    assert "268435456 pixels are more than the limit of 35389440" in decode()[1]


def test_limits_that_are_not_exceeded(coded, decode):
    write(coded)
    assert decode("--max-pixels", WIDTH * HEIGHT, "--max-frames", 16)[0] == 0


@pytest.mark.parametrize("cut", [False, True])
def test_long_videos_are_refused(coded, decode, cut):
    """Also when the file does not tell how long it is."""
    write(coded)
    if cut:
        Path("clip.nvc").write_bytes(Path("clip.nvc").read_bytes()[:-10])
    status, complaint, _, pictures = decode("--max-frames", 15)
    assert (status, pictures) == (2, None)
    assert "16 frames are more than the limit of 15" in complaint and "--max-frames" in complaint


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")]
)
def test_too_little_memory_is_reported(coded, decode, monkeypatch, error):
    def fail(*_):
        raise error

    write(coded)
    monkeypatch.setattr(codec, "decode_unit", fail)
    status, complaint, _, pictures = decode()
    assert (status, pictures) == (2, None) and "not enough memory" in complaint
