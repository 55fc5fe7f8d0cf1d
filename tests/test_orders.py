"""Training of codecs that code in any order: what is drawn, what is added up, a short run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ANY_ORDER, random_parameters
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from nvc_jax import schedule
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.errors import NvcError
from nvc_jax.models import registry, uni_lvc
from nvc_jax.quality import lambda_of_qp
from nvc_jax.schedule import Unit
from nvc_jax.training import loop, losses, orders, stages
from nvc_jax.training.orders import code_run, draw_run
from nvc_jax.training.recipes import on_a_cpu

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = registry.build("uni_lvc", ANY_ORDER)
CODEC = registry.entry("uni_lvc")


def drawn(order, units=5, spans=(8, 16), seed=0):
    return draw_run(np.random.default_rng(seed), CODEC, units, spans, {order: 1.0})


@given(st.sampled_from(schedule.MODES), st.integers(3, 6), st.integers(0, 10**6))
def test_runs_refer_to_what_is_coded(order, units, seed):
    places, run = drawn(order, units, (16, 33), seed)
    assert len(places) == units and min(places) >= 0 and max(places) <= 33
    assert len(set(places)) == units
    np.testing.assert_allclose(run.weight.mean(), 1, rtol=1e-6)
    for number in range(units):
        for i in range(2):
            if run.there[number, i]:
                slot = run.refs[number, i]
                distance = places[slot] - places[number]
                assert slot < number and abs(distance) == run.distance[number, i]
                assert run.role[number, i] == uni_lvc.role(i, distance)
    assert run.alone[0]
    if order == "ai":
        assert run.alone.all()
    else:
        assert not run.alone[2:].any()


def test_low_delay_runs_follow_the_schedule():
    planned = list(schedule.plan(schedule.low_delay_long(), 6))
    _, run = drawn("ld", 6)
    for number, unit in enumerate(planned):
        assert tuple(run.refs[number][run.there[number] > 0]) == unit.refs
        assert run.qp_offset[number] == unit.qp_offset[0]


def test_frames_between_two_others_have_a_past_and_a_future():
    _, run = drawn("ra")
    assert set(run.role[2:, 0]) == {uni_lvc.NEAR_PAST}
    assert set(run.role[2:, 1]) == {uni_lvc.FUTURE}
    np.testing.assert_allclose(run.weight[3:], 2 * run.weight[2:-1])


def test_a_row_of_the_tables_means_one_lambda():
    """In all orders, with references and without."""
    quality = {}
    for order in schedule.MODES:
        for seed in range(8):
            _, run = drawn(order, 6, (16, 33), seed)
            for offset, weight in zip(run.qp_offset, run.quality, strict=True):
                quality.setdefault(int(offset), set()).add(float(weight))
    assert {0, 2, 4, 6, 8} <= set(quality)
    assert all(len(weights) == 1 for weights in quality.values())
    (low,), (high,) = quality[0], quality[8]
    np.testing.assert_allclose(high / low, lambda_of_qp(8, "video") / lambda_of_qp(0, "video"))


def test_a_run_is_coded_as_units_are():
    """Against one call of the codec after the other, with the references as coding makes them."""
    params = jax.tree.map(jnp.asarray, random_parameters(MODEL))
    frames = jax.random.uniform(jax.random.key(0), (1, 4, 32, 48, 3))
    qp = jnp.array([20])
    places, run = drawn("ra", 4, (8,), 3)
    coded = jax.jit(lambda f: code_run(MODEL, params, run, f, qp, None))(frames)
    left, distortion, bits = [], 0.0, 0.0

    @jax.jit
    def code(frame, refs, row):
        bottleneck = Estimate()
        recon, (ref,) = MODEL.apply({"params": params}, frame, refs, row, bottleneck)
        return recon, ref, bottleneck.bits["y"]

    for number in range(4):
        there = run.there[number] > 0
        slots = run.refs[number][there]
        distances = tuple(places[slot] - places[number] for slot in slots)
        unit = Unit((0,), tuple(slots), 0, (0,), (), distances=distances)
        refs = MODEL.complete([left[slot] for slot in slots], unit, 32, 48)
        frame = frames[:, number : number + 1]
        recon, ref, y_bits = code(frame, refs, (qp + run.qp_offset[number])[:, None])
        largest = np.abs(recon).max()
        np.testing.assert_allclose(coded.recon[:, number], recon[:, 0], atol=1e-4 * largest)
        left.append(ref)
        apart = losses.distortion(recon, frame)[:, 0]
        distortion += run.weight[number] * run.quality[number] * apart
        bits += run.weight[number] * y_bits
    np.testing.assert_allclose(coded.distortion, distortion, rtol=1e-3)
    np.testing.assert_allclose(coded.bpp["y"], bits / (32 * 48), rtol=1e-2)


def test_others_can_be_left_out():
    """What is coded alone is the same, and nothing is left of the rest."""
    params = jax.tree.map(jnp.asarray, random_parameters(MODEL))
    frames = jax.random.uniform(jax.random.key(0), (1, 4, 32, 32, 3))
    _, run = drawn("ra", 4, (8,), 3)
    code = jax.jit(code_run, static_argnums=0, static_argnames="only_alone")
    whole = code(MODEL, params, run, frames, jnp.array([20]), None)
    some = code(MODEL, params, run, frames, jnp.array([20]), None, only_alone=True)
    np.testing.assert_allclose(some.recon[:, run.alone], whole.recon[:, run.alone], atol=1e-5)
    assert not some.recon[:, ~run.alone].any() and some.bpp["y"] < whole.bpp["y"]


def config(**stage):
    c = on_a_cpu()
    c.model = ConfigDict(dict(name="uni_lvc", size=ANY_ORDER, dtype="float32"))
    c.data = ConfigDict(dict(folder="", image_share=0.2))
    c.transform_start, c.log_every, c.sample_every = False, 1, 100
    first = dict(steps=2, units=4, spans=(4, 8), batch=2, crop=32, lr=1e-3, end_lr=1e-3)
    c.stages = (ConfigDict(first | stage),)
    return c


def gradients(exact=False, key=None, **options):
    """Of what a run costs, by network."""
    params = jax.tree.map(jnp.asarray, random_parameters(MODEL))
    frames = jax.random.uniform(jax.random.key(0), (2, 4, 32, 32, 3))
    _, run = drawn("ra", 4, (8,), 3)

    def cost(params):
        coded = code_run(
            MODEL, params, run, frames, jnp.array([10, 40]), key, exact=exact, **options
        )
        rate = 32 * 32 * (coded.bpp["y"] + coded.bpp["z"])
        return (rate + coded.distortion + coded.misjudged).mean()

    slopes = jax.jit(jax.grad(cost))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    return {name: max(np.abs(x).max() for x in jax.tree.leaves(s)) for name, s in slopes.items()}


@pytest.mark.slow
def test_gradients_reach_everything_that_a_run_uses():
    found = gradients(key=jax.random.key(1), remat=True)
    unused = {name for name, slope in found.items() if not slope}
    assert unused == {"judge", "scale_head"}


@pytest.mark.slow
def test_gradients_reach_the_judge_and_the_scale_head():
    draws = jax.random.key(2)
    found = gradients(exact=True, draws=draws, spoil=0.5, judge=True)
    assert found["judge"] > 0 and found["scale_head"] > 0


def test_spoiled_references_are_labelled():
    feature = jax.random.normal(jax.random.key(0), (64, 2, 2, 8))
    ref = uni_lvc.Ref(feature, 2 * feature, jnp.zeros(64, jnp.int32))
    ones = jnp.ones(64)
    slot = uni_lvc.Slot(ref, jnp.zeros(64, jnp.int32), ones, ones, ones > 0)
    spoiled, labels = orders._spoiled(jax.random.key(1), slot, 0.6)
    change = np.abs(spoiled.ref.frame - feature).mean((1, 2, 3))
    np.testing.assert_array_equal((spoiled.ref.y != ref.y).any((1, 2, 3)), change > 0)
    np.testing.assert_array_equal(labels == 3, change == 0)
    assert change[labels == 2].max() < change[labels == 1].min()
    other = np.roll(feature, 1, 0)[labels == 0]
    np.testing.assert_array_equal(spoiled.ref.frame[labels == 0], other)
    np.testing.assert_array_equal(spoiled.ref.y[labels == 0], 2 * other)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    far = orders._spoiled(jax.random.key(1), slot._replace(distance=16 * ones), 0.0)[1]
    assert set(np.unique(far)) == {-1}


@pytest.mark.slow
def test_a_run_trains_every_kind_of_stage(tmp_path):
    """Alone; then everything from a teacher, with references of all kinds."""
    c = config()
    alone = dict(c.stages[0].to_dict(), units=1, spans=(1,), orders=dict(ai=1.0))
    c.stages = (
        ConfigDict(alone),
        ConfigDict(
            c.stages[0].to_dict()
            | dict(spoil=0.5, judged=True, judge_loss=0.1, cut_share=0.0)
            | dict(teacher=dict(weights="previous", recon=0.1))
        ),
    )
    state = loop.train(c, tmp_path)
    assert int(state.step) == 4 and int(state.skipped) == 0


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (dict(units=2), "'ra' needs two anchors and more"),
        (dict(units=6), "needs spans of 16 to 64"),
        (dict(units=10, orders=dict(ai=1.0)), "10 units need more than 8"),
        (dict(spoil=0.5, batch=1), "other clips in the batch"),
        (dict(judge_loss=1.0), "needs `judged`"),
        (dict(judge_loss=1.0, judged=True), "set cut_share to 0"),
        (dict(temperature=(1.0,)), "give two numbers above 0"),
        (dict(orders=dict(pb=1.0)), "'pb' is none of"),
        (dict(orders=dict(ai=0.0)), "one must be above"),
        (dict(walk=2), "do not go on"),
        (dict(flow_loss=0.1), "flow_loss means nothing to the codec 'uni_lvc'"),
        (dict(references=dict(true=1.0)), "references means nothing"),
    ],
)
def test_stages_that_cannot_be(wrong, complaint):
    with pytest.raises(NvcError, match=complaint):
        stages.read(stages.complete(config(**wrong)))
