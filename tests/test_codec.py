"""Encoder and decoder: the same pictures from the same symbols, and errors that say what is wrong.

The codecs are small and untrained (see conftest.py), the pictures hard: what is tested here does
not depend on weights.
"""

from dataclasses import replace
from fractions import Fraction

import jax
import numpy as np
import pytest
from conftest import assert_same_pictures, noise, random_parameters

from nvc_jax import bitstream, codec, unit_program
from nvc_jax import schedule as schedules
from nvc_jax.bitstream import varint
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy import calibration, coder
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, FLOAT
from nvc_jax.errors import NvcError, StreamError, WeightsMismatch
from nvc_jax.models import released
from nvc_jax.schedule import all_intra, two_frame
from nvc_jax.video import VideoInfo

NAMES = ("ui2c", "intra")
WIDTH, HEIGHT = 37, 23
CLIPS = {"texture": moving_texture(WIDTH, HEIGHT, 5), "noise": noise(WIDTH, HEIGHT, 5)}


KINDS = {
    "ui2c-exact": ("ui2c", EXACT, ()),
    "ui2c-calibrated": ("ui2c", CALIBRATED, (6,)),
    "single-exact": ("single", EXACT, ()),
    "light-exact": ("light", EXACT, ()),
    "light-calibrated": ("light", CALIBRATED, (6,)),
    "intra-exact": ("intra", EXACT, ()),
    "intra-float": ("intra", FLOAT, ()),
}


@pytest.fixture(params=KINDS)
def unit_codec(request, prepared):
    name, *how = KINDS[request.param]
    return prepared(name, WIDTH, HEIGHT, *how)


@pytest.fixture
def pairs(prepared):
    return prepared("ui2c", WIDTH, HEIGHT)


def header_of(unit_codec, intra_period=0):
    info = VideoInfo(unit_codec.width, unit_codec.height, Fraction(25))
    schedule = codec.schedule_for(unit_codec.model, intra_period)
    return codec.make_header(unit_codec, info, schedule)


def encode(unit_codec, pictures, qp, render=True, intra_period=0):
    schedule = codec.schedule_for(unit_codec.model, intra_period)
    return list(codec.encode(unit_codec, pictures, qp, schedule, render))


def write(path, unit_codec, packets, intra_period=0):
    with bitstream.write_stream(path, header_of(unit_codec, intra_period)) as out:
        for packet in packets:
            out.write(packet)
    return path


def decode(path, unit_codec, frame=None):
    """(decoded packets, pictures), from the access point before `frame` on."""
    with bitstream.open_stream(path) as stream:
        codec.check_model(stream.header, unit_codec.model)
        start = None if frame is None else stream.access_point(frame)
        units = list(codec.decode(unit_codec, stream, start))
    return [packet for packet, _ in units], [p for _, pictures in units for p in pictures]


def recons_of(units):
    return [recon for unit in units for recon in unit.recons]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("qp", [0, 21, 42, 63])
def test_decoder_repeats_the_encoder(unit_codec, qp, clip, tmp_path):
    units = encode(unit_codec, CLIPS[clip], qp)
    packets, pictures = decode(
        write(tmp_path / "a.nvc", unit_codec, [u.packet for u in units]), unit_codec
    )
    assert packets == [u.packet for u in units]
    assert_same_pictures(pictures, recons_of(units))
    assert [p.shape for p in pictures[0]] == [(HEIGHT, WIDTH), (12, 19), (12, 19)]


@pytest.mark.parametrize(
    "name, width, height", [("ui2c", 1, 1), ("intra", 16, 48), ("light", 1, 1)]
)
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_any_size_and_length(prepared, name, width, height, frames, tmp_path):
    unit_codec = prepared(name, width, height)
    units = encode(unit_codec, noise(width, height, frames), 40)
    _, pictures = decode(
        write(tmp_path / "a.nvc", unit_codec, [u.packet for u in units]), unit_codec
    )
    assert len(pictures) == frames
    assert_same_pictures(pictures, recons_of(units))


def test_the_test_is_hard_enough(unit_codec):
    """Many tables, skipped and escaped symbols, pictures neither grey nor saturated."""
    values, tables, escapes = set(), set(), 0
    for qp in (0, 63):
        refs = ()
        n = unit_codec.model.module.frames_per_unit
        _, unit = unit_program.encode_unit(unit_codec, CLIPS["noise"][:n], refs, [qp] * n, True)
        for symbols, indices in zip(unit.symbols, unit.indices, strict=True):
            values |= set(symbols)
            tables |= set(indices)
            last = unit_codec.model.tables.offset[indices % 0xFFFF] * -1
            escapes += np.count_nonzero((abs(symbols) > abs(last)) & (indices != coder.SKIP))
        assert unit.pictures[0].y.std() > 10
    assert len(values) > 20 and len(tables) > 20 and coder.SKIP in tables and escapes > 5


def test_unit_by_unit_with_both_ways_to_decode(unit_codec):
    """In one program that calls the host back, and with the host driving."""
    n = unit_codec.model.module.frames_per_unit
    encoder = called_back = driven = ()
    for start, qps in ((0, (50, 58)), (2, (63, 63)), (4, (0, 8))):
        pictures, qps = CLIPS["noise"][start : start + n], qps[:n][: 5 - start]
        payload, encoded = unit_program.encode_unit(unit_codec, pictures, encoder, qps, True)
        first = unit_program.decode_unit(unit_codec, payload, called_back, qps)
        second = unit_program.decode_unit_from_host(unit_codec, payload, driven, qps)
        for unit in (first, second):
            for ours, theirs in (
                (unit.symbols, encoded.symbols),
                (unit.indices, encoded.indices),
                (jax.tree.leaves(unit.refs), jax.tree.leaves(encoded.refs)),
            ):
                assert len(ours) == len(theirs)
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_array_equal(a, b)
            assert_same_pictures(unit.pictures, encoded.pictures)
        encoder, called_back, driven = encoded.refs, first.refs, second.refs


def test_what_is_not_looked_at_is_not_made(unit_codec):
    """Without reconstruction: the same stream, no pictures."""
    with_pictures = encode(unit_codec, CLIPS["texture"], 30)
    without = encode(unit_codec, iter(CLIPS["texture"]), 30, render=False)
    assert [u.packet for u in without] == [u.packet for u in with_pictures]
    assert all(u.recons is None for u in without)
    assert_same_pictures([p for u in without for p in u.pictures], CLIPS["texture"])


def test_payloads_are_as_short_as_their_symbols_allow(unit_codec):
    for clip in CLIPS.values():
        for qp in (0, 30, 63):
            for unit in encode(unit_codec, clip, qp, render=False):
                flags = calibration.write_flags(unit.coded.flags)
                size = len(unit.packet.payload)
                if unit_codec.entropy_mode == CALIBRATED:
                    size -= len(bitstream.varint(len(flags))) + len(flags)
                ideal = unit.ideal_bits / 8
                assert ideal - 1 <= size <= 1.01 * ideal + 4


def test_payloads_of_every_size_are_coded_by_the_same_program(pairs):
    """Another size of its arguments would be another program, which may round otherwise."""
    shapes, sizes = set(), []

    def noting(*arguments):
        shapes.add(tuple(np.shape(leaf) for leaf in jax.tree.leaves(arguments)))
        return pairs.program(*arguments)

    noted = pairs._replace(program=noting)
    blank = ()
    for pictures, qp in ((CLIPS["texture"][:2], 0), (CLIPS["noise"][:2], 63)):
        payload, encoded = unit_program.encode_unit(noted, pictures, blank, (qp, qp), True)
        for decode_unit in (unit_program.decode_unit, unit_program.decode_unit_from_host):
            decoded = decode_unit(noted, payload, blank, (qp, qp))
            assert_same_pictures(decoded.pictures, encoded.pictures)
        sizes.append(len(payload))
    assert sizes[1] > 4 * sizes[0] and len(shapes) == 1


@pytest.mark.parametrize("mode", [FLOAT, EXACT])
def test_estimate_predicts_the_size(large, mode):
    """The rate that training sees is the rate of the file: within 1 % above 10 kB."""
    unit_codec = unit_program.prepare(large.codec.model, 336, 208, mode)
    pictures = noise(336, 208, 4)
    module = unit_codec.model.module

    @jax.jit
    def estimate(variables, planes, refs, qp):
        bottleneck = Estimate(exact=mode == EXACT)
        frames = unit_program.planes_to_frames(planes, unit_codec.height, unit_codec.width)
        module.apply(variables, frames, refs, qp, bottleneck)
        return bottleneck.bits

    refs = ()
    for start in (0, 2):
        pair, qps = pictures[start : start + 2], (8, 12)
        planes = tuple(np.stack(p) for p in zip(*pair, strict=True))
        bits = estimate(unit_codec.model.variables, planes, refs, np.array([qps], np.int32))
        expected = float(bits["y"][0] + bits["z"][0]) / 8
        payload, unit = unit_program.encode_unit(unit_codec, pair, refs, qps, False)
        levels = np.concatenate(unit.indices[1:])
        assert len(np.unique(levels)) > 3
        assert len(payload) > 10_000
        assert abs(len(payload) - expected) <= 0.01 * expected
        refs = unit.refs


def test_decoding_starts_at_random_access_points(pairs, tmp_path):
    clip = noise(WIDTH, HEIGHT, 9)
    units = encode(pairs, clip, 30, intra_period=4)
    assert [u.packet.random_access for u in units] == [True, False, True, False, True]
    path = write(tmp_path / "a.nvc", pairs, [u.packet for u in units], intra_period=4)
    packets, pictures = decode(path, pairs)
    assert packets == [u.packet for u in units]
    for frame, first in ((0, 0), (3, 0), (4, 4), (5, 4), (8, 8)):
        packets, tail = decode(path, pairs, frame)
        assert packets[0].frames[0] == first
        assert_same_pictures(tail, pictures[first:])
    # A fresh start does not depend on what precedes it.
    assert_same_pictures(recons_of(encode(pairs, clip[8:], 30)), pictures[8:])


def test_a_refresh_begins_anew_from_the_picture_before(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(schedules, "REFRESH_PERIOD", 2)
    unit_codec = prepared("dcvc_rt", WIDTH, HEIGHT)
    clip = noise(WIDTH, HEIGHT, 5)
    units = encode(unit_codec, clip, 30)
    packets = [u.packet for u in encode(unit_codec, clip, 30, render=False)]
    assert packets == [u.packet for u in units]
    _, pictures = decode(write(tmp_path / "a.nvc", unit_codec, packets), unit_codec)
    assert_same_pictures(pictures, recons_of(units))

    plan = list(schedules.plan(codec.schedule_for(unit_codec.model), 5))
    assert [unit.picture_only for unit in plan] == [False, False, False, True, False]
    for number, as_before in ((2, False), (3, True)):
        (ref,) = units[number - 1].coded.refs
        other = ref._replace(feature=ref.feature[:, ::-1])
        qps = packets[number].qps
        arguments = unit_codec, clip[number : number + 1], (other,), qps, False, plan[number]
        payload, _ = unit_program.encode_unit(*arguments)
        assert (payload == packets[number].payload) == as_before


def test_an_order_without_refreshes_is_still_decoded(prepared, tmp_path, monkeypatch):
    """Files from before there were any."""
    monkeypatch.setattr(schedules, "REFRESH_PERIOD", 2)
    unit_codec = prepared("dcvc_rt", WIDTH, HEIGHT)
    order = schedules.low_delay()
    units = list(codec.encode(unit_codec, noise(WIDTH, HEIGHT, 5), 30, order, True))
    header = codec.make_header(unit_codec, VideoInfo(WIDTH, HEIGHT, 25), order)
    with bitstream.write_stream(tmp_path / "a.nvc", header) as out:
        for unit in units:
            out.write(unit.packet)
    assert_same_pictures(decode(tmp_path / "a.nvc", unit_codec)[1], recons_of(units))


def test_pairs_predict_from_the_pair_before(pairs):
    """A still clip: the second pair refers to the first and is not coded like it."""
    units = encode(pairs, [CLIPS["noise"][0]] * 4, 30)
    assert units[0].packet.payload != units[1].packet.payload


@pytest.mark.parametrize("qp", [-1, 64])
def test_encoder_refuses_qps_beyond_the_scale(pairs, qp):
    with pytest.raises(NvcError, match=r"0 .* to 63"):
        encode(pairs, CLIPS["noise"], qp)


def test_each_frame_of_a_group_has_its_quality(pairs):
    units = encode(pairs, noise(WIDTH, HEIGHT, 9), 63, render=False)
    assert [u.packet.qps for u in units] == [(63, 71), (63, 67), (63, 67), (63, 67), (63,)]


# What goes wrong when decoding


def damaged(unit_codec, tmp_path, change):
    """A clip of five frames whose second unit is replaced by change(packet), as a valid file."""
    packets = [u.packet for u in encode(unit_codec, CLIPS["texture"], 30, render=False)]
    packets[1] = change(packets[1])
    return write(tmp_path / "a.nvc", unit_codec, packets)


def test_other_symbols_than_the_encoders_are_noticed(unit_codec, tmp_path):
    path = damaged(unit_codec, tmp_path, lambda p: replace(p, symbols_crc=p.symbols_crc ^ 1))
    frames = "2, 3" if unit_codec.model.module.frames_per_unit == 2 else "1"
    with (
        bitstream.open_stream(path) as stream,
        pytest.raises(StreamError, match=rf"unit 1 \(frames {frames}\) .*checksum"),
    ):
        decoded = 0
        for _, pictures in codec.decode(unit_codec, stream):
            decoded += len(pictures)
    assert decoded == unit_codec.model.module.frames_per_unit, "what precedes the damage is kept"


@pytest.mark.parametrize("seed", range(12))
def test_damaged_payloads_are_noticed(unit_codec, tmp_path, seed):
    rng = np.random.default_rng(seed)

    def damage(packet):
        payload = bytearray(packet.payload)
        kind, place = seed % 4, rng.integers(len(payload))
        if kind == 0:
            payload[place] ^= 1 << rng.integers(8)
        elif kind == 1:
            del payload[place:]
        elif kind == 2:
            payload[place:place] = rng.bytes(1 + rng.integers(50))
        else:
            payload = rng.bytes(rng.integers(1, 300))
        return replace(packet, payload=bytes(payload))

    with pytest.raises(StreamError, match="unit 1 "):
        decode(damaged(unit_codec, tmp_path, damage), unit_codec)


def test_malformed_payloads_are_not_blamed_on_the_machine(prepared, tmp_path):
    exact, listed = (prepared("ui2c", WIDTH, HEIGHT, mode) for mode in (EXACT, CALIBRATED))
    for unit_codec, payload, reason in (
        (exact, b"\xff" * 9, "damaged"),
        (exact, bytes(7000), "larger than any"),
        (listed, b"", "the data ends"),
        (listed, varint(4000) + b"\xff" * 4000, "list of calibrated elements"),
        (listed, varint(90) + bytes(80), "list of calibrated elements"),
        (listed, varint(3) + b"\x00\x00\x01", "list of calibrated elements"),
    ):
        path = damaged(unit_codec, tmp_path, lambda p, new=payload: replace(p, payload=new))
        with pytest.raises(StreamError, match=rf"unit 1 .* cannot be decoded: .*{reason}"):
            decode(path, unit_codec)


def test_a_qp_that_the_model_does_not_have(unit_codec, tmp_path):
    path = damaged(unit_codec, tmp_path, lambda p: replace(p, qps=(100,) * len(p.qps)))
    with pytest.raises(StreamError, match=r"unit 1 .*100"):
        decode(path, unit_codec)


@pytest.mark.parametrize("frames", [(2,), (2, 3, 4), (7, 8), (3, 2), (0, 1)])
def test_units_that_break_the_order_are_noticed(pairs, tmp_path, frames):
    path = damaged(pairs, tmp_path, lambda p: replace(p, frames=frames, qps=(30,) * len(frames)))
    with pytest.raises(StreamError):
        decode(path, pairs)


def test_a_missing_random_access_mark_is_noticed(pairs, tmp_path):
    path = damaged(pairs, tmp_path, lambda p: replace(p, random_access=True))
    with pytest.raises(StreamError, match=r"unit 1 .*schedule"):
        decode(path, pairs)


def test_other_weights_are_refused(pairs, tmp_path):
    model = pairs.model
    module = model.module
    tensors = released.freeze("other", "ui2c", module, random_parameters(module, seed=1))
    released.save(tmp_path / "other.safetensors", *tensors)
    other = released.load(tmp_path / "other.safetensors")
    with pytest.raises(WeightsMismatch) as error:
        codec.check_model(header_of(pairs), other)
    for what in (model, other):
        assert what.name in str(error.value) and what.fingerprint.hex() in str(error.value)


def test_a_schedule_that_is_not_the_models_is_refused(prepared):
    for name, schedule in (("ui2c", all_intra()), ("intra", two_frame())):
        unit_codec = prepared(name, WIDTH, HEIGHT)
        with pytest.raises(StreamError, match="schedule"):
            codec.check_model(replace(header_of(unit_codec), schedule=schedule), unit_codec.model)


# Planes and frames


@pytest.mark.parametrize("width, height", [(1, 1), (2, 3), (16, 16), (WIDTH, HEIGHT)])
def test_planes_survive_the_network_format(width, height):
    planes = tuple(np.stack(p) for p in zip(*noise(width, height, 2), strict=True))
    full = unit_program.planes_to_frames(planes, height, width)
    assert full.shape == (1, 2, -(-height // 16) * 16, -(-width // 16) * 16, 3)
    assert full.min() >= 0 and full.max() <= 1
    for a, b in zip(unit_program.frames_to_planes(full, height, width), planes, strict=True):
        np.testing.assert_array_equal(a, b)


def test_pictures_outside_the_range_are_clipped():
    frames = np.full((1, 1, 16, 16, 3), 7, np.float32)
    frames[..., 1] = -3
    y, u, v = (np.unique(p) for p in unit_program.frames_to_planes(frames, 16, 16))
    assert list(y) == list(v) == [255] and list(u) == [0]
