"""Uni-LVC: what references may do, and what they may not."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ANY_ORDER, assert_same_pictures, random_parameters, write_clip

from nvc_jax import bitstream, cli, codec, conceal, unit_program
from nvc_jax import schedule as schedules
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.entropy.calibration import CALIBRATED, EXACT
from nvc_jax.errors import NvcError, StreamError
from nvc_jax.models import registry, released, uni_lvc
from nvc_jax.schedule import Unit
from nvc_jax.video import VideoInfo

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, HEIGHT = 70, 50
CLIP = moving_texture(WIDTH, HEIGHT, 7)
INTRA = Unit((0,), (), 0, (0,), ())
BETWEEN = Unit((4,), (0, 1), 0, (0,), (), distances=(-4, 2))
MODEL = registry.build("uni_lvc", ANY_ORDER)
PARAMS = random_parameters(MODEL)
QP = jnp.full((1, 1), 30)


def frames_of(number):
    planes = tuple(plane[None] for plane in CLIP[number])
    return unit_program.planes_to_frames(planes, HEIGHT, WIDTH)


@jax.jit
def coded(params, frames, refs):
    bottleneck = Estimate()
    recon, (ref,) = MODEL.apply({"params": params}, frames, refs, QP, bottleneck)
    return recon, ref, bottleneck.bits["y"]


def references(unit, params=PARAMS, numbers=(0, 6)):
    """The slots of a unit that refers to two frames of the clip."""
    empty = MODEL.complete((), INTRA, 64, 80)
    refs = [coded(params, frames_of(n), empty)[1] for n in numbers]
    return MODEL.complete(refs, unit, 64, 80)


def test_references_matter():
    alone = coded(PARAMS, frames_of(4), MODEL.complete((), INTRA, 64, 80))
    both = coded(PARAMS, frames_of(4), references(BETWEEN))
    one = coded(PARAMS, frames_of(4), references(BETWEEN._replace(reliability=(3, 0))))
    for other in (both, one):
        assert np.abs(alone[0] - other[0]).max() > 1e-3 and alone[2] != other[2]
    assert np.abs(one[0] - both[0]).max() > 1e-3


def test_untrained_sites_change_nothing():
    fresh = registry.random_params(MODEL, 0)
    site = uni_lvc.Site(MODEL.cfg)
    x, tokens = (jax.random.normal(jax.random.key(n), (1, 8, 10, 16)) for n in range(2))
    slots = references(BETWEEN, fresh)
    out = site.apply({"params": fresh["sites_0"]}, x, slots, [tokens, tokens])
    np.testing.assert_array_equal(out, x)


def test_untrained_references_change_nothing():
    """Neither bits nor the picture."""
    fresh = registry.random_params(MODEL, 0)
    alone = coded(fresh, frames_of(4), MODEL.complete((), INTRA, 64, 80))
    both = coded(fresh, frames_of(4), references(BETWEEN, fresh))
    np.testing.assert_array_equal(alone[0], both[0])
    assert alone[2] == both[2]


def test_where_nothing_is_found_nothing_is_added():
    site = uni_lvc.Site(MODEL.cfg)
    x, tokens = (jax.random.normal(jax.random.key(n), (1, 8, 10, 16)) for n in range(2))
    for levels, same in (((3, 0), False), ((0, 0), True)):
        slots = references(BETWEEN._replace(reliability=levels))
        out = site.apply({"params": PARAMS["sites_0"]}, x, slots, [tokens, tokens])
        assert np.array_equal(out, x) == same


def takeover(slots, params, seed=0):
    draft = jax.random.uniform(jax.random.key(seed), (1, 64, 80, 3))
    features = jax.random.normal(jax.random.key(1), (1, 8, 10, 16))
    module = uni_lvc.Takeover(MODEL.cfg)
    out = module.apply({"params": params["takeover"]}, draft, features, QP[0], slots)
    return np.asarray(draft), np.asarray(out)


def test_pictures_that_nobody_trusts_are_not_taken_over():
    for params, levels, same in (
        (PARAMS, (3, 0), False),
        (PARAMS, (0, 0), True),
        (registry.random_params(MODEL, 0), (3, 3), True),  # untrained
    ):
        draft, out = takeover(references(BETWEEN._replace(reliability=levels)), params)
        assert np.array_equal(draft, out) == same


def test_what_is_taken_over_lies_between_the_pictures():
    """However large the weights of both references are."""
    sure = jax.tree.map(lambda x: x, PARAMS)
    sure["takeover"]["lookup"]["out"] = {"kernel": 100 * np.ones((16, 256), np.float32)}
    slots = references(BETWEEN)
    draft, out = takeover(slots, sure)
    seen = np.stack([draft, *(slot.ref.frame for slot in slots)])
    assert np.abs(out).max() <= 2 * np.abs(seen).max() + 1e-3
    assert np.abs(out - draft).mean() > 0.1


def test_two_references_that_agree_count_as_one():
    slots = references(BETWEEN)
    value, weight = jnp.full((1, 1, 1, 1), 0.7), jnp.ones((1, 1, 1, 1))
    for found, expected in (
        (2 * [(value, weight, weight)], (0.7, 1)),
        (2 * [(0.25 * value, 0.25 * weight, 0.25 * weight)], (0.35, 0.5)),
        ([(value, weight, weight), (0 * value, 0 * weight, 0 * weight)], (0.7, 1)),
    ):
        np.testing.assert_allclose(np.ravel(uni_lvc._average(found, slots)), expected, rtol=1e-6)


def test_references_in_the_other_order_are_the_same_to_the_networks():
    """Their role and distance go with them."""
    past, future = references(BETWEEN)
    ours, theirs = (coded(PARAMS, frames_of(4), s) for s in ((past, future), (future, past)))
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-3)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-2)


def test_a_reference_that_is_named_twice_counts_once():
    past, again = references(BETWEEN._replace(distances=(-4, -4)))
    assert float(past.reliability[0]) == 1 and float(again.reliability[0]) == 0


@pytest.mark.parametrize("mode", [CALIBRATED, EXACT])
def test_without_trust_a_unit_is_an_intra_unit(prepared, mode):
    """Bit for bit, whatever the references are."""
    unit_codec = prepared("uni_lvc", WIDTH, HEIGHT, mode)
    _, first = unit_program.encode_unit(unit_codec, CLIP[:1], (), (30,), False, INTRA)
    _, last = unit_program.encode_unit(unit_codec, CLIP[6:], (), (30,), False, INTRA)
    refs = (*first.refs, *last.refs)
    nobody = BETWEEN._replace(reliability=(0, 0))
    intra, coded_intra = unit_program.encode_unit(unit_codec, CLIP[3:4], (), (30,), True, INTRA)
    inter, coded_inter = unit_program.encode_unit(unit_codec, CLIP[3:4], refs, (30,), True, nobody)
    assert inter == b"\0" + intra
    assert_same_pictures(coded_inter.pictures, coded_intra.pictures)
    full = BETWEEN._replace(reliability=(3, 3))
    trusting, _ = unit_program.encode_unit(unit_codec, CLIP[3:4], refs, (30,), True, full)
    assert trusting[:1] == b"\x0f" and trusting[1:] != intra


def test_damaged_reliabilities_are_refused(prepared):
    unit_codec = prepared("uni_lvc", WIDTH, HEIGHT)
    _, first = unit_program.encode_unit(unit_codec, CLIP[:1], (), (30,), False, INTRA)
    unit = BETWEEN._replace(refs=(0,), distances=(-1,))
    payload, _ = unit_program.encode_unit(unit_codec, CLIP[3:4], first.refs, (30,), False, unit)
    for wrong in (b"", b"\x04" + payload[1:], b"\xf0" + payload[1:]):
        with pytest.raises(StreamError, match="references is damaged"):
            unit_program.decode_unit(unit_codec, wrong, first.refs, (30,), unit)


def write(path, unit_codec, units, order):
    """Writes units; returns the reconstructions in the order of display."""
    header = codec.make_header(unit_codec, VideoInfo(WIDTH, HEIGHT, 25), order)
    made = []
    with bitstream.write_stream(path, header) as out:
        for unit in units:
            out.write(unit.packet)
            made += zip(unit.packet.frames, unit.recons, strict=True)
    return [recon for _, recon in sorted(made, key=lambda item: item[0])]


@pytest.mark.parametrize("mode", ["ai", "ld", "ra"])
def test_all_modes_with_the_same_weights(prepared, tmp_path, mode):
    unit_codec = prepared("uni_lvc", WIDTH, HEIGHT)
    gop = 4 if mode == "ra" else None
    order = codec.schedule_for(unit_codec.model, gop=gop, mode=mode)
    units = codec.encode(unit_codec, CLIP, 30, order, render=True)
    recons = write(tmp_path / "a.nvc", unit_codec, units, order)
    with bitstream.open_stream(tmp_path / "a.nvc") as stream:
        codec.check_model(stream.header, unit_codec.model)
        assert_same_pictures([p for _, ps in codec.decode(unit_codec, stream) for p in ps], recons)


def test_a_stream_may_change_its_mode(prepared, tmp_path):
    """At every intra frame, the last group being short; decoding can start at each of them."""
    unit_codec, order = prepared("uni_lvc", WIDTH, HEIGHT), schedules.mixed(3)
    clip = moving_texture(WIDTH, HEIGHT, 12)
    modes = {1: "ai", 4: "ra", 7: "ld", 10: "ld"}
    units = codec.encode(unit_codec, clip, 30, order, render=True, mode_of=modes.get)
    recons = write(tmp_path / "a.nvc", unit_codec, units, order)
    assert len(recons) == 12
    with bitstream.open_stream(tmp_path / "a.nvc") as stream:
        codec.check_model(stream.header, unit_codec.model)
        assert_same_pictures([p for _, ps in codec.decode(unit_codec, stream) for p in ps], recons)
        assert [point.frame for point in stream.index.access_points] == [0, 3, 6, 9]
        for first in range(12):
            wanted = range(first, min(first + 2, 12))
            found = codec.decode(unit_codec, stream, stream.access_point(first), wanted)
            assert_same_pictures([p for _, ps in found for p in ps], recons[first : first + 2])


@pytest.mark.parametrize(
    "broken, inside, lost",
    [
        # Coded in this order: 0; 3, 1, 2 (all intra); 6, 4, 5 (in layers); 9, 7, 8 (low delay); 10.
        (2, 30, [1]),  # a payload: nothing refers to it
        (5, 30, [4, 5]),
        (8, 30, [7, 8]),
        (7, 30, [9, 10]),
        (4, 0, [4, 5, 6, 7, 8]),  # a head: decoding goes on at the next intra frame
        (8, 0, [7, 8, 10]),
    ],
)
def test_damage_in_groups_of_all_modes(prepared, tmp_path, broken, inside, lost):
    unit_codec, order = prepared("uni_lvc", WIDTH, HEIGHT), schedules.mixed(3)
    clip, path = moving_texture(WIDTH, HEIGHT, 11), tmp_path / "a.nvc"
    modes = {1: "ai", 4: "ra", 7: "ld", 10: "ld"}
    units = codec.encode(unit_codec, clip, 30, order, render=True, mode_of=modes.get)
    recons = write(path, unit_codec, units, order)
    with bitstream.open_stream(path) as stream:
        packets = list(stream._packets())
        place = stream._first + sum(size for _, _, size in packets[:broken])
    data = bytearray(path.read_bytes())
    data[place + inside] ^= 255
    path.write_bytes(data)
    found = {}
    with bitstream.open_stream(path) as stream:
        for unit, pictures in conceal.decode_concealing(unit_codec, stream):
            for picture in pictures:
                found[len(found)] = picture, isinstance(unit, codec.Lost)
    assert [frame for frame, (_, gone) in found.items() if gone] == lost
    kept = [frame for frame in found if frame not in lost]
    assert_same_pictures([found[n][0] for n in kept], [recons[n] for n in kept])


def test_groups_that_no_mode_is_said_of_are_refused(prepared, tmp_path):
    unit_codec, order = prepared("uni_lvc", WIDTH, HEIGHT), schedules.mixed(3)
    units = codec.encode(unit_codec, CLIP[:4], 30, order, render=True, mode_of=lambda frame: "ld")
    units = [unit._replace(packet=replace(unit.packet, mode=None)) for unit in units]
    write(tmp_path / "a.nvc", unit_codec, units, order)
    with (
        bitstream.open_stream(tmp_path / "a.nvc") as stream,
        pytest.raises(StreamError, match="does not say in which mode"),
    ):
        list(codec.decode(unit_codec, stream))


def test_the_encoder_chooses_the_cheapest_mode(prepared, tmp_path):
    unit_codec, order = prepared("uni_lvc", WIDTH, HEIGHT), schedules.mixed(3)
    units = list(codec.encode(unit_codec, CLIP[:6], 30, order, render=True))
    recons = write(tmp_path / "a.nvc", unit_codec, units, order)
    choices = [unit for unit in units if unit.choice]
    assert [(unit.choice.first, unit.choice.last) for unit in choices] == [(1, 3), (4, 5)]
    for number, unit in enumerate(choices):
        trials = unit.choice.trials
        assert set(trials) == set(schedules.MODES)
        assert trials[unit.packet.mode].cost == min(trial.cost for trial in trials.values())
        chosen = [u for u in units if unit.choice.first <= u.packet.frames[0] <= unit.choice.last]
        assert trials[unit.packet.mode].bytes == sum(len(u.packet.payload) for u in chosen)
        # Had the mode been said, the same would have been coded.
        modes = {u.choice.first: u.packet.mode for u in choices[: number + 1]}
        forced = codec.encode(
            unit_codec, CLIP[: unit.choice.last + 1], 30, order, mode_of=modes.get
        )
        last = [u.packet for u in forced][-len(chosen) :]
        assert last == [u.packet for u in chosen]
    with bitstream.open_stream(tmp_path / "a.nvc") as stream:
        assert_same_pictures([p for _, ps in codec.decode(unit_codec, stream) for p in ps], recons)


@pytest.mark.parametrize("name, mode", [("uni_lvc", "ai"), ("uni_lvc", "ra"), ("brhvc", None)])
def test_encoders_make_only_pictures_that_are_referred_to(prepared, name, mode):
    """Unless somebody wants to see them; what is coded is the same."""
    unit_codec = prepared(name, WIDTH, HEIGHT)
    order = codec.schedule_for(unit_codec.model, gop=None if mode == "ai" else 4, mode=mode)
    seen, unseen = (
        list(codec.encode(unit_codec, CLIP, 30, order, render=render)) for render in (True, False)
    )
    assert [unit.packet for unit in seen] == [unit.packet for unit in unseen]
    made = {}
    for number, unit in enumerate(unseen):
        (picture,) = (ref.frame for ref in unit.coded.refs)
        made[number] = bool(np.asarray(picture).any())
    assert made == {n: n not in unit.plan.release for n, unit in enumerate(unseen)}


def test_the_mode_of_every_group_has_to_be_said(prepared):
    unit_codec, order = prepared("uni_lvc", WIDTH, HEIGHT), schedules.mixed(3)
    units = codec.encode(unit_codec, CLIP, 30, order, mode_of={1: "ld"}.get)
    with pytest.raises(NvcError, match="None is no mode of the group from frame 4 on"):
        list(units)


@pytest.mark.parametrize(
    "name, wanted, message",
    [
        ("ui2c", dict(mode="ld"), "has no mode 'ld'; there is: the one that it was made for"),
        ("uni_lvc", dict(mode="all"), "there is: ai, ld, ra, auto"),
        ("uni_lvc", dict(mode="ld", gop=8), "the mode 'ld' has no B-frames"),
        ("uni_lvc", dict(mode="ai", intra_period=-7), "intra period -7: give a number of frames"),
        ("uni_lvc", dict(mode="ld", intra_period=-1), "intra period -1: give a number of frames"),
        ("uni_lvc", dict(mode="auto", gop=0), "groups of 2 to 64 frames, not 0"),
        ("uni_lvc", dict(mode="auto", intra_period=96), "groups of 2 to 64 frames, not 96"),
        ("uni_lvc", dict(mode="auto", gop=8, intra_period=32), "its intra period is its --gop"),
    ],
)
def test_orders_that_do_not_exist_are_refused(model_files, name, wanted, message):
    with pytest.raises(NvcError, match=message):
        codec.schedule_for(released.load(model_files[name]), **wanted)


@pytest.mark.parametrize("mode", ["ai", "ld", "ra"])
def test_modes_from_the_command_line(model_files, prepare_once, tmp_path, capsys, mode):
    clip, coded, again, recon = (tmp_path / n for n in ("a.y4m", "a.nvc", "b.y4m", "c.y4m"))
    write_clip(clip, CLIP[:4])
    model = ["--model", str(model_files["uni_lvc"])]
    options = ["--mode", mode, "--recon", str(recon)]
    assert cli.main(["encode", str(clip), str(coded), *model, *options]) == 0
    assert cli.main(["decode", str(coded), str(again), *model]) == 0
    assert again.read_bytes() == recon.read_bytes()


def test_choices_are_explained(model_files, prepare_once, tmp_path, capsys):
    clip, coded, facts = (tmp_path / name for name in ("clip.y4m", "a.nvc", "a.json"))
    write_clip(clip, CLIP[:4])
    model = ["--model", str(model_files["uni_lvc"])]
    how = ["--mode", "auto", "--gop", "3", "--json", str(facts)]
    assert cli.main(["encode", str(clip), str(coded), *model, *how]) == 0
    (choice,) = json.loads(facts.read_text())["choices"]
    assert (choice["first"], choice["last"]) == (1, 3)
    assert f"frames 1 to 3: {choice['mode']}, of lowest cost" in capsys.readouterr().err
    assert cli.main(["decode", str(coded), str(tmp_path / "b.y4m"), *model]) == 0
    closed = ["--mode", "auto", "--closed-gop"]
    assert cli.main(["encode", str(clip), str(coded), *model, *closed]) == 2
    assert "no group is closed" in capsys.readouterr().err


@pytest.mark.parametrize("left_out", ["near", "linear", "gate"])
def test_parts_of_a_site_can_be_left_out(left_out):
    less = registry.build("uni_lvc", ANY_ORDER | {left_out: False})
    names = {"near": "align", "linear": "linear", "gate": "gate"}
    lookup = registry.param_shapes(less)["sites_0"]["lookup"]
    assert names[left_out] not in lookup
    assert set(names.values()) - set(lookup) == {names[left_out]}


def test_the_takeover_can_be_left_out():
    less = registry.build("uni_lvc", ANY_ORDER | {"takeover": False})
    assert set(PARAMS) - set(registry.param_shapes(less)) == {"takeover"}
