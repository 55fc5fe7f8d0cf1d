"""Training of B-frames: paths through a hierarchy, and a run from end to end."""

import dataclasses
import json
import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import B_FRAMES, SIZES, random_parameters
from flax import traverse_util
from hypothesis import given as drawn_by
from hypothesis import strategies as st
from ml_collections import ConfigDict

from nvc_jax import colour, parallel, schedule
from nvc_jax.data import pipeline
from nvc_jax.data.clips import Clip, ClipSet
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.errors import NvcError
from nvc_jax.models import brhvc, intra, registry, released, with_intra
from nvc_jax.models.brhvc import LAYER_WEIGHTS, Between, Ref
from nvc_jax.nn.blocks import depth_to_space, space_to_depth
from nvc_jax.nn.flow import note_motion
from nvc_jax.nn.hyperprior import FactorizedPrior
from nvc_jax.training import checkpoints, loop, losses, stages
from nvc_jax.training import step as training
from nvc_jax.training.hierarchy import ANCHORS, Path, code_path, draw_path
from nvc_jax.training.transform_start import transform_start

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclass(frozen=True)
class ToyConfig:
    toy_width: int = 4


class Toy(nn.Module):
    """A codec of B-frames that compiles in seconds and uses everything that paths bring along."""

    cfg: ToyConfig
    dtype: Any = jnp.float32

    frames_per_unit = 1
    references = 2
    refers_to_pictures = True
    qp_rows = 64

    def setup(self):
        self.z_prior = FactorizedPrior(1, 8)
        self.encoder, self.decoder = nn.Dense(8), nn.Dense(48)
        self.place = nn.Dense(8, name="place")
        self.flow = nn.Dense(2)

    def motion(self, a, b):
        return self.flow(jnp.concatenate([a, b], -1))

    @staticmethod
    def start(frame):
        return Ref(frame)

    def complete(self, refs, unit, height, width, exact=False):
        def completed(ref):
            bare = ref.y is None
            blank = jnp.zeros((1, height // 4, width // 4, 8))
            return ref._replace(y=blank if bare else ref.y, bare=jnp.bool_(bare))

        past, future = map(completed, refs)
        return Between(past, future, np.int32(unit.layer), np.float32(unit.ratio))

    def __call__(self, frames, refs, qp, bottleneck):
        past, future, layer, ratio = refs
        mean = (1 - ratio) * past.frame + ratio * future.frame
        note_motion(self, frames[:, 0], past.frame, mean)
        y = self.encoder(space_to_depth(frames[:, 0] - mean, 4))
        for ref in (past, future):
            if ref.y is not None:
                y -= ref.y if ref.bare is None else jnp.where(ref.bare, 0, ref.y)
        y += self.motion(past.frame, future.frame).mean()
        place = jnp.stack([1.0 * layer, qp.mean()])
        y = bottleneck.factorized(8 * y + self.place(place), self.z_prior, 0 * qp[:, 0])
        recon = mean + depth_to_space(self.decoder(y), 4)
        return recon[:, None], (Ref(jnp.clip(recon, 0, 1), y=y),)


SIZE = dict(intra=SIZES["intra"] | {"scale_head": 0}, inter=dict(toy_width=4))


@pytest.fixture(autouse=True)
def toy_codec(monkeypatch):
    monkeypatch.setitem(with_intra.MODULES, ToyConfig, Toy)


@drawn_by(
    st.integers(1, 5).flatmap(
        lambda units: st.tuples(
            st.just(units), st.lists(st.integers(2**units, 64), min_size=1, max_size=4)
        )
    ),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_a_path_is_made_of_units_that_schedules_code(drawn, tail_share, seed):
    units, spans = drawn
    places, path = draw_path(np.random.default_rng(seed), units, tuple(spans), tail_share)
    assert len(places) == ANCHORS + units and min(places) >= 0 and max(places) <= max(spans)
    assert len(set(places)) == len(places) - (path.refs[0][0] == path.refs[0][1])
    for number in range(units):
        frame = places[ANCHORS + number]
        assert (path.refs[number] < ANCHORS + number).all()
        past, future = (places[slot] for slot in path.refs[number])
        behind = number == 0 and frame > max(past, future)
        unit = schedule.predicted(past, future, frame) if behind else schedule.between(past, future)
        assert unit.frames == (frame,)
        assert unit.layer == path.layer[number]
        np.testing.assert_allclose(unit.ratio, path.ratio[number])
        if number:  # down one line: the frame before is among the references
            assert ANCHORS + number - 1 in path.refs[number]
    np.testing.assert_allclose(path.weight.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(path.weight[1:], 2 * path.weight[:-1])


def test_without_tails_paths_follow_the_plan_of_a_group():
    order = list(schedule.plan(schedule.hierarchical(13), 14))
    planned = {unit.frames[0]: unit for unit in order}
    depth, seen = {0: 0, 13: 0}, set()
    for unit in order[2:]:
        depth[unit.frames[0]] = 1 + max(depth[order[slot].frames[0]] for slot in unit.refs)
    for seed in range(100):
        places, path = draw_path(np.random.default_rng(seed), 3, (13,), 0.0)
        assert places[:2] == [0, 13]
        for number, frame in enumerate(places[ANCHORS:]):
            unit = planned[frame]
            refs = tuple(order[slot].frames[0] for slot in unit.refs)
            assert refs == tuple(places[slot] for slot in path.refs[number])
            assert unit.layer == path.layer[number]
            seen.add(frame)
    assert seen == {frame for frame, steps in depth.items() if 1 <= steps <= 3}


def pictures(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.2, 0.8, (*shape, 3)), jnp.float32)


@pytest.fixture
def tiny():
    model = registry.build("brhvc", SIZE)
    return model, registry.init(model, jax.random.key(0))


PATH = Path(
    refs=np.array([[1, 0], [2, 1]], np.int32),
    layer=np.array([2, 1], np.int32),
    ratio=np.array([0.5, 0.4], np.float32),
    weight=np.array([1, 2], np.float32),
)


def test_a_path_is_coded_as_its_units_one_by_one(tiny):
    model, params = tiny
    frames, anchors = pictures((2, 2, 32, 32)), pictures((2, 2, 32, 32), 1)
    qp = jnp.array([20, 50])

    @jax.jit
    def whole(frames, anchors):
        return code_path(model, params, PATH, LAYER_WEIGHTS, frames, anchors, qp, None)

    @jax.jit
    def alone(frame, past, future, layer, ratio):
        bottleneck = Estimate()
        recon, (ref,) = model.apply(
            {"params": params}, frame[:, None], Between(past, future, layer, ratio), qp[:, None],
            bottleneck,
        )  # fmt: skip
        return recon[:, 0], ref, bottleneck.bits

    slots = [Ref(anchors[:, 0]), Ref(anchors[:, 1])]
    distortion, bits = 0, {"z": 0, "y": 0}
    coded = whole(frames, anchors)
    for number in range(2):
        past, future = (slots[slot] for slot in PATH.refs[number])
        place = PATH.layer[number], PATH.ratio[number]
        recon, ref, unit_bits = alone(frames[:, number], past, future, *place)
        slots.append(ref)
        np.testing.assert_allclose(coded.recon[:, number], recon, atol=1e-3)
        weight = PATH.weight[number]
        bits = {name: bits[name] + weight * unit_bits[name] for name in bits}
        error = losses.distortion(recon, frames[:, number])
        distortion += weight * LAYER_WEIGHTS[place[0]] * error
    pixels = math.prod(frames.shape[2:4])
    for name, expected in bits.items():
        np.testing.assert_allclose(pixels * coded.bpp[name], expected, rtol=1e-3)
    np.testing.assert_allclose(coded.distortion, distortion, rtol=1e-3)
    assert coded.motion.moved.shape == (len(frames),) and (coded.motion.moved > 0).all()


def test_paths_begin_anywhere_in_a_clip(intra_file):
    """And frames of a clip that just suffices lie between their anchors, forwards or backwards."""
    gray = np.full((33, 8, 8), 128, np.uint8)
    times = np.broadcast_to(np.arange(33, dtype=np.uint8)[:, None, None], gray.shape)
    sources = pipeline.memory_sources(
        ClipSet((Clip(gray.repeat(2, 1).repeat(2, 2), gray, times),), ()), 0.0
    )
    config = config_of(intra_file, crop=16, spans=(4, 32), tail_share=0.0, cut_share=0.0)
    (stage,) = stages.read(stages.complete(config))
    model = registry.build("brhvc", SIZE)
    starts = {4: set(), 32: set()}
    for clip, _ in islice(
        loop.host_clips(sources, registry.entry("brhvc"), model, stage, 0, seed=0), 60
    ):
        for (past, future), frames in zip(
            clip.reference[..., 0, 0, 2].astype(int), clip.frames[..., 0, 0, 2], strict=True
        ):
            assert min(past, future) < min(frames) <= max(frames) < max(past, future)
            assert frames[0] == (past + future) / 2
            starts[abs(future - past)].add(min(past, future))
    assert starts[32] == {0} and len(starts[4]) > 15


@pytest.fixture(scope="module")
def intra_file(tmp_path_factory):
    size = SIZES["intra"] | {"scale_head": 16}
    module = registry.build("intra", size)
    path = tmp_path_factory.mktemp("intra") / "tiny.safetensors"
    released.save(path, *released.freeze("tiny", "intra", module, random_parameters(module, 5)))
    return path


def config_of(intra_file, steps=2, **special):
    common = dict(batch=2, crop=32, lr=1e-3, end_lr=1e-4, units=2, spans=(4, 6), flow_loss=1.0)
    return ConfigDict(
        dict(
            seed=1, model=dict(name="brhvc", size=SIZE, dtype="float32"), data=dict(folder=""),
            init_from=str(intra_file), transform_start=False,
            stages=(ConfigDict(common | dict(steps=steps) | special),),
            warmup_steps=2, clip_norm=1.0, weight_decay=1e-4, rate_balance=0.5, average_decay=0.9,
            max_skipped_in_row=5, log_every=1, sample_every=2, checkpoint_every_seconds=1e9,
        )
    )  # fmt: skip


def fresh_state(config):
    config = stages.complete(config)
    model = registry.build("brhvc", SIZE)
    return checkpoints.fresh(model, config, stages.read(config)[0], parallel.make_mesh())


def test_a_run_trains_b_frames_beside_a_frozen_intra_codec(intra_file, tmp_path):
    config = config_of(intra_file)
    state = loop.train(config, tmp_path / "run")
    assert int(state.skipped) == 0
    given = released.load(intra_file).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, state.average["intra"], given)
    fresh = fresh_state(config)
    same = jax.tree.map(lambda a, b: (a == b).all(), fresh.params, state.params)["inter"]
    still = {name for name, s in traverse_util.flatten_dict(same, sep="/").items() if s}
    assert not still
    assert (tmp_path / "run" / "samples").is_dir()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["motion_gain"] for line in lines)
    # The run becomes a model that codes B-frames.
    file = tmp_path / "config.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n"
        f"    c = ConfigDict({config.to_dict() | {'stages': ()}!r})\n"
        f"    c.stages = tuple(ConfigDict(s) for s in {[s.to_dict() for s in config.stages]!r})\n"
        f"    return c\n"
    )
    output = checkpoints.release(str(file), str(tmp_path / "run"), str(tmp_path / "b.safetensors"))
    model = released.load(output)
    assert model.module.references == 2

    # Others can start from a part of it.
    own = fresh.params["inter"]
    chosen = min(own)
    config.init_from, config.init_only = str(output), (chosen,)
    taken = fresh_state(config).params
    given = model.variables["params"]
    jax.tree.map(np.testing.assert_array_equal, taken["intra"], given["intra"])
    for name, params in taken["inter"].items():
        origin = given["inter"] if name == chosen else own
        jax.tree.map(np.testing.assert_array_equal, params, origin[name])
    config.init_only = ("flows",)
    with pytest.raises(NvcError, match=r"init_only names flows, which .* does not have"):
        fresh_state(config)
    config.init_from = str(intra_file)
    with pytest.raises(NvcError, match="is an intra codec alone"):
        fresh_state(config)


def test_true_motion_costs_least():
    texture = jax.image.resize(pictures((1, 12, 12)), (1, 48, 48, 3), "cubic")
    a, b = texture[:, 8:40, 8:40], texture[:, 8:40, 5:37]  # to be found 3 samples further right
    costs = {x: losses.motion(a, b, jnp.full((1, 32, 32, 2), jnp.array([x, 0.0])))[0]
             for x in (-3, 0, 2, 3, 4)}  # fmt: skip
    assert min(costs, key=costs.get) == 3
    assert max(costs[2], costs[4]) < min(costs[0], costs[-3])
    # Differences count by their logarithm, not by their squares.
    doubled = losses.motion(2 * a, 2 * b, jnp.zeros((1, 32, 32, 2)))[0]
    assert doubled < 2 * costs[0]


def changed(before, after):
    """Names of sub-networks of which something has."""
    before, after = before.params["inter"], after.params["inter"]
    same = {k: jax.tree.map(lambda a, b: (a == b).all(), before[k], after[k]) for k in before}
    return {name for name, tree in same.items() if not all(jax.tree.leaves(tree))}


def test_motion_can_learn_alone(intra_file, tmp_path, capsys):
    config = config_of(intra_file, 2, units=1, spans=(2, 4), motion_only=True)
    config.weight_decay = 0.0  # which would change everything
    state = loop.train(config, tmp_path / "run")
    assert int(state.skipped) == 0
    assert changed(fresh_state(config), state) == {"flow"}
    assert not (tmp_path / "run" / "samples").exists()  # no pictures are coded
    printed = capsys.readouterr().out
    assert "step 2/2" in printed and "motion" in printed and "PSNR" not in printed


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(motion_only=True), "motion_only needs clips of one unit"),
        (dict(motion_only=True, units=1, lr_scale=dict(flow=0.0)), "no sub-network learns"),
        (
            dict(motion_only=True, units=1, teacher=dict(weights="previous", recon=1.0)),
            "no pictures are coded",
        ),
        (dict(spans=(2,)), "needs spans of 4 to 64"),
        (dict(spans=(128,)), "needs spans of 4 to 64"),
        (dict(spans=()), "spans must not be empty"),
        (dict(tail_share=2.0), "tail_share"),
        (dict(walk=2), "do not go on"),
        (dict(orders=dict(ra=1.0)), "orders means nothing to the codec 'brhvc'"),
        (dict(references={"blank": 1.0}), "is without a reference"),
        (dict(trainable=("intra",)), "names intra; the model consists of"),
        (dict(teacher=dict(weights="previous", refs=1.0)), "there are none behind a path"),
    ],
)
def test_bad_stages_are_refused(intra_file, change, complaint):
    with pytest.raises(NvcError, match=complaint):
        stages.read(stages.complete(config_of(intra_file, **change)))


def test_another_intra_codec_is_refused(tmp_path):
    """Also where its weights have the same shapes."""
    module = registry.build("intra", SIZES["intra"] | {"scale_head": 0, "offset": 0.25})
    path = tmp_path / "other.safetensors"
    released.save(path, *released.freeze("other", "intra", module, random_parameters(module)))
    with pytest.raises(NvcError, match="not the intra codec of this config's model"):
        fresh_state(config_of(path))


def test_an_intra_codec_that_is_missing_is_asked_for():
    with pytest.raises(NvcError, match="give a released one"):
        stages.read(stages.complete(config_of("")))


def test_transform_start_passes_on_what_prediction_leaves():
    """Without other branches, an untrained encoder and decoder return nearly their picture."""
    cfg = registry.build("brhvc", "nano").cfg.inter
    size = dataclasses.replace(cfg, widths=(12, 48, 192), tail=12, y=192, unet=(12, 12, 12))
    model = registry.build(
        "brhvc", dataclasses.asdict(with_intra.Config(intra.SIZES["nano"], size))
    )
    params = jax.eval_shape(lambda: registry.init(model, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    params = transform_start("brhvc", model.cfg, params)["inter"]
    rest = 0.1 * pictures((1, 8, 8)).repeat(8, 1).repeat(8, 2)
    encoder, decoder = brhvc.Encoder(size, jnp.float32), brhvc.Decoder(size, jnp.float32)
    contexts = [jnp.zeros((1, 32 >> i, 32 >> i, w)) for i, w in enumerate(size.widths)]
    y = encoder.apply({"params": params["encoder"]}, space_to_depth(rest, 2), contexts, 1.0)
    assert y.shape == (1, 4, 4, 192)
    back, _ = decoder.apply({"params": params["decoder"]}, y, contexts, 1.0)
    assert ((back - rest) ** 2).mean() < 0.05 * rest.var()


def test_transform_start_refuses_other_forms():
    model = registry.build("brhvc", B_FRAMES)
    with pytest.raises(NvcError, match="only with `patch` 2 and `direct`"):
        transform_start("brhvc", model.cfg, {})


@drawn_by(st.integers(0, 10**6))
def test_colours_there_and_back(seed):
    yuv = pictures((5,), seed)
    np.testing.assert_allclose(colour.from_rgb(colour.to_rgb(yuv)), yuv, atol=1e-5)


def test_white_and_black_of_limited_range():
    yuv = jnp.array([[16, 128, 128], [235, 128, 128]]) / 255
    np.testing.assert_allclose(colour.to_rgb(yuv), [[0] * 3, [1] * 3], atol=1e-5)


def test_codecs_of_rgb_are_judged_by_the_same_distortion():
    """An intra codec that returns its input exactly has no error, whatever its colours."""

    class Mirror:
        frames_per_unit, references, rgb = 1, 0, True

        def apply(self, variables, frames, refs, qp, bottleneck):
            bottleneck.bits = {k: jnp.zeros(len(frames)) for k in bottleneck.bits}
            return frames, ()

    frames = pictures((2, 1, 16, 16))
    clip = training.Clip(frames, frames, jnp.array([0, 63]), jnp.zeros(2, jnp.int32))
    coded = training.unroll(registry.entry("dcvc_dc"), Mirror(), {}, clip, (), None)
    np.testing.assert_allclose(coded.recon, frames, atol=1e-5)
    np.testing.assert_allclose(coded.distortion, losses.distortion(frames, frames)[:, 0], rtol=1e-3)
