"""B-frames from end to end: any group, any length, any place to begin, in the order of display."""

import math
import weakref
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_same_pictures

from nvc_jax import bitstream, cli, codec, conceal, schedule, unit_program, video
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy.calibration import CALIBRATED
from nvc_jax.errors import NvcError, StreamError
from nvc_jax.models import released
from nvc_jax.video import Colour, VideoInfo

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, HEIGHT = 40, 24
CLIP = list(moving_texture(WIDTH, HEIGHT, 34))
INFO = VideoInfo(WIDTH, HEIGHT, 25, Colour())


@pytest.fixture(scope="module")
def unit_codec(prepared):
    return prepared("brhvc", WIDTH, HEIGHT, CALIBRATED, (11, 12))


def coded(unit_codec, path, order, length, qp=40):
    """The encoder's pictures, in the order of display, and its units."""
    header = codec.make_header(unit_codec, INFO, order)
    units = list(codec.encode(unit_codec, CLIP[:length], qp, order, render=True))
    with bitstream.write_stream(path, header) as stream:
        for unit in units:
            stream.write(unit.packet)
    pictures = {f: p for u in units for f, p in zip(u.packet.frames, u.recons, strict=True)}
    return [pictures[frame] for frame in range(length)], units


def decoded(unit_codec, path, first=None, wanted=None):
    with bitstream.open_stream(path) as stream:
        start = None if first is None else stream.access_point(first)
        runs = list(codec.decode(unit_codec, stream, start, wanted))
    frames = [frame for packet, _ in runs for frame in packet.frames]
    assert frames == sorted(frames)
    return frames, [picture for _, pictures in runs for picture in pictures]


ORDERS = [
    (schedule.hierarchical(4), 9),
    (schedule.hierarchical(8), 17),
    (schedule.hierarchical(8), 15),  # a tail that ends with an intra frame
    (schedule.hierarchical(8), 12),  # one that does not
    (schedule.hierarchical(8), 1),
    (schedule.hierarchical(8), 2),
    (schedule.hierarchical(5), 14),
    (schedule.hierarchical(2), 6),
    (schedule.hierarchical(4, 8), 14),
    (schedule.hierarchical(4, 0), 10),
    (schedule.hierarchical(6, closed=True), 16),
    (schedule.hierarchical(32), 33),
    (schedule.hierarchical(64), 34),
]


@pytest.mark.parametrize("order, length", ORDERS)
def test_round_trip(unit_codec, tmp_path, order, length):
    path = tmp_path / "a.nvc"
    pictures, units = coded(unit_codec, path, order, length)
    frames, shown = decoded(unit_codec, path)
    assert frames == list(range(length))
    assert_same_pictures(shown, pictures)
    assert bitstream.read_header(path).schedule == order
    assert all(
        u.packet.random_access == (u.packet.frames[0] in starts(order, length)) for u in units
    )


def starts(order, length):
    return {unit.frames[0] for unit in schedule.plan(order, length) if not unit.refs}


@pytest.mark.parametrize("order, length", [ORDERS[0], ORDERS[2], ORDERS[6], ORDERS[8], ORDERS[10]])
def test_decoding_begins_at_every_intra_frame(unit_codec, tmp_path, order, length):
    path = tmp_path / "a.nvc"
    pictures, _ = coded(unit_codec, path, order, length)
    for start in sorted(starts(order, length)):
        frames, shown = decoded(unit_codec, path, start)
        assert frames == list(range(start, length))
        assert_same_pictures(shown, pictures[start:])


@pytest.mark.parametrize(
    "first, last", [(0, 0), (3, 3), (5, 9), (6, 6), (8, 15), (12, 16), (16, 16)]
)
def test_only_what_is_wanted_is_decoded(unit_codec, tmp_path, monkeypatch, first, last):
    path = tmp_path / "a.nvc"
    pictures, _ = coded(unit_codec, path, schedule.hierarchical(8), 17)
    decode_unit, count = unit_program.decode_unit, []

    def counting(*arguments):
        count.append(1)
        return decode_unit(*arguments)

    monkeypatch.setattr(codec, "decode_unit", counting)
    frames, shown = decoded(unit_codec, path, first, range(first, last + 1))
    assert frames == list(range(first, last + 1))
    assert_same_pictures(shown, pictures[first : last + 1])
    # Both ends of a group and, in each of its three layers, one frame more than are wanted.
    assert len(count) <= 2 * (2 + 3) + last - first


@pytest.mark.parametrize("number", [3, 6, 9, 10])
def test_parts_are_those_of_the_whole(unit_codec, tmp_path, number):
    """In tails, odd groups, closed groups, and with one intra frame."""
    path, (order, length) = tmp_path / "a.nvc", ORDERS[number]
    pictures, _ = coded(unit_codec, path, order, length)
    for first, last in ((0, 0), (length // 2, length - 2), (length - 1, length - 1)):
        frames, shown = decoded(unit_codec, path, first, range(first, last + 1))
        assert frames == list(range(first, last + 1))
        assert_same_pictures(shown, pictures[first : last + 1])


def test_what_lies_behind_a_part_does_not_matter(unit_codec, tmp_path):
    path = tmp_path / "a.nvc"
    pictures, units = coded(unit_codec, path, schedule.hierarchical(4), 13)
    data = bytearray(path.read_bytes())
    data[data.index(units[8].packet.payload)] ^= 255  # in the second group
    path.write_bytes(data)
    frames, shown = decoded(unit_codec, path, 0, range(1, 4))
    assert frames == [1, 2, 3]
    assert_same_pictures(shown, pictures[1:4])


class Token:
    """In place of what a unit leaves, its picture and what others refer to."""


def stand_in(monkeypatch, tmp_path, order, length):
    """A stream of empty units, which decode to nothing but a `Token`, and those that are alive."""
    alive, most = weakref.WeakSet(), [0]

    def decode_unit(*_):
        token = Token()
        alive.add(token)
        most[0] = max(most[0], len(alive))
        return unit_program.CodedUnit([token], (token,), [], [], [], [], None)

    monkeypatch.setattr(codec, "decode_unit", decode_unit)
    path = tmp_path / "empty.nvc"
    header = bitstream.Header("m", bytes(16), 16, 16, Fraction(25), order, (2, 2, 2, False))
    with bitstream.write_stream(path, header) as out:
        for unit in schedule.plan(order, length):
            out.write(bitstream.Packet(unit.frames, (30,), b"", 0, not unit.refs))
    nothing = SimpleNamespace(module=SimpleNamespace(qp_rows=64))
    return SimpleNamespace(model=nothing, width=16, height=16, entropy_mode=CALIBRATED), path, most


def test_a_part_takes_no_more_memory_than_the_whole(monkeypatch, tmp_path):
    order = schedule.hierarchical(2, 0)
    unit_codec, path, most = stand_in(monkeypatch, tmp_path, order, 201)
    assert decoded(unit_codec, path, 0, range(200, 201))[0] == [200]
    assert 2 <= most[0] <= 4


@pytest.mark.parametrize("gop", [2, 5, 32, 64])
def test_memory_is_that_of_the_depth_of_the_hierarchy(monkeypatch, tmp_path, gop):
    """References and pictures that wait for their turn, in clips of any length."""
    order, length = schedule.hierarchical(gop), 1 + gop * (192 // gop)
    unit_codec, path, most = stand_in(monkeypatch, tmp_path, order, length)
    with bitstream.open_stream(path) as stream:
        shown = sum(len(pictures) for _, pictures in codec.decode(unit_codec, stream))
    assert shown == length
    assert most[0] <= 3 + math.ceil(math.log2(gop))


def test_an_index_that_lies_is_noticed(monkeypatch, tmp_path):
    """It names frame 3, which refers to others, as one where decoding can start."""
    unit_codec, path, _ = stand_in(monkeypatch, tmp_path, schedule.low_delay(), 9)
    with bitstream.open_stream(path) as stream:
        packets = list(stream._packets())
        offset = stream._first + sum(size for _, _, size in packets[:3])
        with pytest.raises(StreamError, match="before the point where decoding began"):
            list(codec.decode(unit_codec, stream, bitstream.AccessPoint(3, 3, offset)))


def test_the_host_can_drive(unit_codec):
    order, slots, held = schedule.hierarchical(4), {}, {}
    for number, unit in enumerate(schedule.plan(order, 5)):
        refs, others = codec.references(unit, slots), codec.references(unit, held)
        payload, encoded = unit_program.encode_unit(
            unit_codec, [CLIP[unit.frames[0]]], refs, (40,), True, unit
        )
        driven = unit_program.decode_unit_from_host(unit_codec, payload, others, (40,), unit)
        assert_same_pictures(driven.pictures, encoded.pictures)
        slots[number], held[number] = encoded.refs, driven.refs


def test_layers_and_places_between_references_matter(unit_codec):
    """A unit decoded as one of another layer, or from another place, is not the same."""
    order = schedule.hierarchical(4)
    first, second, unit, *_ = schedule.plan(order, 5)
    slots = {}
    for number, intra in enumerate((first, second)):
        picture = [CLIP[intra.frames[0]]]
        _, first_coded = unit_program.encode_unit(unit_codec, picture, (), (40,), True, intra)
        slots[number] = first_coded.refs
    refs = codec.references(unit, slots)
    _, encoded = unit_program.encode_unit(unit_codec, [CLIP[2]], refs, (40,), True, unit)
    symbols = np.concatenate(encoded.symbols)
    same = unit_program.replay_unit(unit_codec, symbols, refs, (40,), unit)
    assert_same_pictures(same.pictures, encoded.pictures)
    for other in (unit._replace(layer=4), unit._replace(ratio=0.25)):
        changed = unit_program.replay_unit(unit_codec, symbols, refs, (40,), other)
        assert (changed.pictures[0].y != encoded.pictures[0].y).any()


# Groups of 4: frames in coding order 0, 4, 2, 1, 3, 8, 6, 5, 7, 12, 10, 9, 11.
@pytest.mark.parametrize(
    "inside, broken, lost",
    [
        # The payload: what refers to the unit is lost with it, and nothing else.
        (30, 6, [5, 6, 7]),
        (30, 7, [5]),
        (30, 5, [5, 6, 7, 8, 9, 10, 11]),
        # Its length: what was decoded already stays, and decoding goes on at frame 12.
        (0, 7, [5, 7]),
        (0, 6, [5, 6, 7]),
        (0, 5, [5, 6, 7, 8, 9, 10, 11]),
        (0, 11, [9, 11]),
    ],
)
def test_a_damaged_unit_costs_what_refers_to_it(unit_codec, tmp_path, inside, broken, lost):
    path = tmp_path / "a.nvc"
    pictures, units = coded(unit_codec, path, schedule.hierarchical(4), 13)
    sizes = [unit["bytes"] for unit in bitstream.stream_info(path)["units"]]
    data = bytearray(path.read_bytes())
    first = data.index(units[0].packet.payload) - (sizes[0] - len(units[0].packet.payload) - 4)
    data[first + sum(sizes[:broken]) + inside] ^= 255
    path.write_bytes(data)
    frames, losses = [], 0
    with bitstream.open_stream(path) as stream:
        for unit, shown in conceal.decode_concealing(unit_codec, stream):
            shown = list(shown)
            if isinstance(unit, codec.Lost):
                assert (unit.unit, unit.frame, unit.frames) == (broken, len(frames), len(shown))
                assert unit.units == unit.frames and "damaged at unit" in unit.reason
                losses += len(shown)
                shown = [None] * len(shown)
            frames += shown
    assert len(frames) == 13 and losses == len(lost)
    assert [number for number, picture in enumerate(frames) if picture is None] == lost
    intact = [number for number in range(13) if number not in lost]
    assert_same_pictures([frames[i] for i in intact], [pictures[i] for i in intact])


def test_commands(model_files, tmp_path, prepare_once, capsys):
    """Pictures are written in the order of display, whole files and parts of them."""
    source, stream = tmp_path / "clip.y4m", tmp_path / "clip.nvc"
    with video.write_video(source, INFO) as out:
        for picture in CLIP[:11]:
            out.write(picture)
    model = ["--model", str(model_files["brhvc"])]
    recon, whole, part = (tmp_path / f"{name}.y4m" for name in ("recon", "whole", "part"))
    layers = "--layer-qp=-8,2"
    run(["encode", source, stream, *model, "--gop", 4, "--qp", 40, layers, "--recon", recon])
    run(["decode", stream, whole, *model])
    run(["decode", stream, part, *model, "--start", 6, "--end", 10])
    recon, whole, part = (list(video.open_video(path)[1]) for path in (recon, whole, part))
    assert len(recon) == 11 and len(part) == 4
    assert_same_pictures(whole, recon)
    assert_same_pictures(part, recon[6:10])
    capsys.readouterr()
    for arguments, words in (
        (["--start", 11], "nothing to start from for frame 11"),
        (["--start", 5, "--end", 5], "nothing between"),
        (["--start", 5, "--conceal"], "without --start"),
    ):
        run(["decode", stream, tmp_path / "b.y4m", *model, *arguments], status=2)
        assert words in capsys.readouterr().err


def test_layers_differ_in_quality_if_asked_to(unit_codec, tmp_path, capsys):
    order = schedule.hierarchical(4)
    planned = list(schedule.plan(order, 9))
    units = list(codec.encode(unit_codec, CLIP[:9], 60, order, layer_qp=(-40, -2, 9)))
    assert [unit.packet.qps for unit in units] == [((20, 58, 63, 63)[u.layer],) for u in planned]
    shallow = codec.encode(unit_codec, CLIP[:3], 30, schedule.hierarchical(2), layer_qp=(6, 3, 0))
    assert [unit.packet.qps for unit in shallow] == [(30,), (30,), (36,)]
    with pytest.raises(NvcError, match="no layers"):
        next(codec.encode(unit_codec, CLIP, 40, schedule.all_intra(), layer_qp=(1,)))
    source = tmp_path / "clip.y4m"
    with pytest.raises(SystemExit):
        cli.main(["encode", str(source), str(tmp_path / "a.nvc"), "--layer-qp", "a,b"])
    assert "not a list of whole numbers" in capsys.readouterr().err


def run(arguments, status=0):
    assert cli.main([str(a) for a in arguments]) == status


def test_orders_that_cannot_be_are_explained(model_files):
    pairs, b_frames = (released.load(model_files[name]) for name in ("ui2c", "brhvc"))
    assert codec.schedule_for(b_frames) == schedule.hierarchical(32)
    assert codec.schedule_for(b_frames, 8) == schedule.hierarchical(8)
    assert codec.schedule_for(b_frames, 64) == schedule.hierarchical(32, 64)
    assert codec.schedule_for(b_frames, 50) == schedule.hierarchical(25, 50)
    assert codec.schedule_for(b_frames, 33) == schedule.hierarchical(11, 33)
    for arguments, words in (
        ((12, 8), "multiple"),
        ((None, 1), "2 to 64"),
        ((None, 65), "2 to 64"),
    ):
        with pytest.raises(NvcError, match=words):
            codec.schedule_for(b_frames, *arguments)
    with pytest.raises(NvcError, match="no B-frames"):
        codec.schedule_for(pairs, 0, 8)
