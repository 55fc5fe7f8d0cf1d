"""Light's P-frames after DCVC-HEM, with flows and with searched motion, beside an intra codec."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HEM, assert_same_pictures, noise, random_parameters

from nvc_jax import bitstream, codec, schedule, unit_program
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.entropy.calibration import CALIBRATED, EXACT
from nvc_jax.errors import NvcError
from nvc_jax.models import registry, released
from nvc_jax.nn import integer
from nvc_jax.video import VideoInfo

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTH, HEIGHT = 37, 23
CLIP = moving_texture(WIDTH, HEIGHT, 4)
KINDS = {
    "exact": ("hem", EXACT, ()),
    "calibrated": ("hem", CALIBRATED, (6,)),
    "searched-exact": ("hem_searched", EXACT, ()),
}


@pytest.fixture(params=KINDS)
def unit_codec(request, prepared):
    name, *how = KINDS[request.param]
    return prepared(name, WIDTH, HEIGHT, *how)


@pytest.mark.parametrize("qp", [0, 63])
def test_round_trip(unit_codec, tmp_path, qp):
    """The decoder makes the encoder's pictures of the same bytes, whichever way it decodes."""
    order = codec.schedule_for(unit_codec.model, 3)
    assert order == schedule.low_delay(3)
    pictures = CLIP if qp else noise(WIDTH, HEIGHT, 4)
    units = list(codec.encode(unit_codec, pictures, qp, order, render=True))
    path, info = tmp_path / "a.nvc", VideoInfo(WIDTH, HEIGHT, Fraction(25))
    with bitstream.write_stream(path, codec.make_header(unit_codec, info, order)) as out:
        for unit in units:
            out.write(unit.packet)
    with bitstream.open_stream(path) as stream:
        runs = list(codec.decode(unit_codec, stream))
    assert [packet for packet, _ in runs] == [unit.packet for unit in units]
    recons = [picture for unit in units for picture in unit.recons]
    assert_same_pictures([picture for _, pictures in runs for picture in pictures], recons)
    assert [unit.packet.random_access for unit in units] == [True, False, False, True]

    refs = ()
    for unit in units[:3]:
        packet = unit.packet
        driven = unit_program.decode_unit_from_host(unit_codec, packet.payload, refs, packet.qps)
        assert_same_pictures(driven.pictures, unit.recons)
        refs = driven.refs


def test_frames_depend_on_more_than_the_picture_before(prepared):
    """On its feature and on its latent; and on neither where a refresh says so."""
    unit_codec, refs = prepared("hem", WIDTH, HEIGHT), ()
    for picture in CLIP[:2]:
        _, coded = unit_program.encode_unit(unit_codec, [picture], refs, (30,), True)
        refs = coded.refs

    def code(ref, unit=unit_program.FLAT):
        return unit_program.encode_unit(unit_codec, CLIP[2:3], (ref,), (30,), False, unit)[0]

    (ref,) = refs
    others = ref._replace(feature=ref.feature[:, ::-1]), ref._replace(y=ref.y + 3)
    anew = unit_program.FLAT._replace(picture_only=True)
    for other in others:
        assert code(other) != code(ref)
        assert code(other, anew) == code(ref, anew) != code(ref)


@pytest.mark.parametrize("kind", ["flow", "searched"])
def test_gradients_reach_every_network(kind):
    """Of a frame that refers to a P-frame."""
    model = registry.build("light", HEM | dict(inter=HEM["inter"] | dict(motion=kind)))
    assert registry.searches_motion(model) == (kind == "searched")
    planes = tuple(np.stack(p) for p in zip(*moving_texture(32, 32, 2), strict=True))
    before, frame = unit_program.planes_to_frames(planes, 32, 32)[0][:, None]
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(0, 1, shape), jnp.float32)

    ref = model.start(before)._replace(
        feature=drawn(1, 32, 32, 8),
        y=drawn(1, 2, 2, 16),
        motion_y=drawn(1, 2, 2, 8),
        motion=jnp.ones((1, 4, 4, 3), jnp.int16),
    )

    @jax.jit
    def gradients(params):
        def loss(params):
            bottleneck = Estimate(exact=True)
            qp = jnp.full((1, 1), 40)
            recon, _ = model.apply({"params": params}, frame[None], (ref,), qp, bottleneck)
            bits = bottleneck.bits
            rate = (bits["y"] + bits["y_float"] + bits["z"]).sum() / 1000
            return rate + ((recon - frame[None]) ** 2).sum()

        return jax.grad(loss)(params)

    found = registry.networks(model, gradients(random_parameters(model)))
    still = {
        name for name, tree in found.items() if not any(np.any(g) for g in jax.tree.leaves(tree))
    }
    assert still == {"intra", "feature_of_frame"}, "which such a frame does without"


def test_motion_is_found_at_half_the_size():
    """What a half-size picture cannot show makes no difference."""
    model = registry.build("light", HEM)
    params = random_parameters(model)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.uniform(0, 1, (1, 32, 48, 3)), jnp.float32) for _ in range(2))
    rows = jnp.tile(jnp.array([1.0, -1.0]), 16)[None, :, None, None]
    find = jax.jit(lambda a, b: model.apply({"params": params}, a, b, method="motion"))
    flow = find(a, b)
    assert flow.shape == (1, 32, 48, 2) and np.abs(flow).max() > 1e-3
    np.testing.assert_allclose(find(a + 0.2 * rows, b), flow, atol=1e-4)
    assert np.abs(find(a[:, :, ::-1], b) - flow).max() > 1e-3


def test_all_scale_heads_are_released_and_checked(model_files):
    model = released.load(model_files["hem"])
    assert model.exact and set(model.variables["integers"]["inter"]) == {
        "scale_head",
        "motion_scale_head",
    }
    released.check_integers(model)
    trained = released.trainable_params(model)
    for path in ("intra/scale_head", "inter/scale_head", "inter/motion_scale_head"):
        codec_name, head = path.split("/")
        assert head not in model.variables["params"][codec_name]
        integers = model.variables["integers"][codec_name][head]
        jax.tree.map(
            np.testing.assert_array_equal, integer.freeze(trained[codec_name][head]), integers
        )
        bias = integers["levels_0"]["bias"]
        integers["levels_0"]["bias"] = bias + 1000
        with pytest.raises(NvcError, match="known-answer"):
            released.check_integers(model)
        integers["levels_0"]["bias"] = bias


def test_without_scale_heads_there_is_the_calibrated_mode_only(tmp_path):
    module = registry.build("light", HEM)
    bare, params = released.without_scale_head(module, random_parameters(module))
    assert not registry.has_scale_head(bare)
    shapes = jax.tree.map(np.shape, registry.param_shapes(bare))
    assert jax.tree.map(np.shape, params) == shapes


def test_an_unknown_kind_of_motion_is_refused():
    with pytest.raises(NvcError, match="motion 'guessed' is none of flow, searched"):
        registry.build("light", HEM | dict(inter=HEM["inter"] | dict(motion="guessed")))


def test_sizes_are_told_apart_by_their_fields():
    for size in registry.entry("light").sizes:
        model = registry.build("light", size)
        assert registry.build("light", registry.size_as_dict(model)) == model
        assert registry.searches_motion(model) == (size != "full")
        assert model.schedule == "low_delay" and model.references == 1
    with pytest.raises(NvcError, match="bad size for 'light'"):
        registry.build("light", dict(depth=3))
