"""Motion of B-frames: coded by itself as beside pictures, and trained by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import B_FRAMES, random_parameters

from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.models import brhvc, registry
from nvc_jax.models.brhvc import MOTION, Between, Ref
from nvc_jax.nn.warp import warp
from nvc_jax.training import losses
from nvc_jax.training import step as training
from nvc_jax.training.hierarchy import Path, code_motion
from nvc_jax.training.stages import Stage

SIZE = B_FRAMES | dict(inter=B_FRAMES["inter"] | dict(direct=True, told=True))
PATH = Path(
    refs=np.array([[0, 1], [2, 1]], np.int32),
    level=np.array([2, 1], np.int32),
    ratio=np.array([0.5, 0.4], np.float32),
    weight=np.array([0.6, 1.4], np.float32),
)
QP = jnp.array([20, 50])


@pytest.fixture(scope="module")
def model():
    return registry.build("brhvc", SIZE)


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(jnp.asarray, random_parameters(model))


def pictures(count, seed=0):
    x = np.random.default_rng(seed).uniform(0.2, 0.8, (2, count, 64, 64, 3))
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(scope="module")
def coded(model, params):
    """Two units of a path: as trainings code their motion, and one after the other by hand."""
    frames, anchors = pictures(2), pictures(2, 1)

    @jax.jit
    def alone(frame, past, future, level, ratio):
        bottleneck = Estimate()
        refs = Between(past, future, level, ratio)
        result = model.apply(
            {"params": params}, frame[:, None], refs, QP[:, None], bottleneck,
            method="coded_motion",
        )  # fmt: skip
        return *result, bottleneck.bits

    slots, units = [Ref(anchors[:, 0]), Ref(anchors[:, 1])], []
    for number in range(2):
        past, future = (slots[slot] for slot in PATH.refs[number])
        place = PATH.level[number], PATH.ratio[number]
        units.append((past, future, *alone(frames[:, number], past, future, *place)))
        slots.append(units[-1][4])
    whole = jax.jit(lambda: code_motion(model, params, PATH, frames, anchors, QP, None))()
    return frames, whole, units


def test_a_path_is_coded_as_its_units_one_by_one(coded):
    frames, whole, units = coded
    misfit, bits = 0.0, {"y": 0.0, "z": 0.0}
    for number, (past, future, flows, mean, _, unit_bits) in enumerate(units):
        frame, refs = frames[:, number], (past.frame, future.frame)
        own = sum(losses.motion(frame, r, f) for r, f in zip(refs, flows, strict=True)) / 2
        misfit += PATH.weight[number] * (own + losses.visible(frame - mean))
        bits = {k: bits[k] + PATH.weight[number] * unit_bits[k] for k in bits}
    np.testing.assert_allclose(whole.misfit, misfit, rtol=1e-3)
    for name, expected in bits.items():
        np.testing.assert_allclose(whole.bits[name], expected, rtol=1e-3)
        assert (expected > 0).all()


def test_later_units_refer_to_pictures_as_they_are(coded):
    frames, _, units = coded
    np.testing.assert_array_equal(units[1][0].frame, frames[:, 0])


def test_the_mean_lies_between_both_references_after_motion(coded):
    _, _, units = coded
    past, future, flows, mean, *_ = units[0]
    assert {flow.shape for flow in flows} == {(2, 64, 64, 2)}
    moved = jnp.stack([warp(past.frame, flows[0]), warp(future.frame, flows[1])])
    assert (mean >= moved.min(0) - 1e-5).all() and (mean <= moved.max(0) + 1e-5).all()


def test_motion_is_coded_as_beside_pictures(model, params):
    frame, anchors = pictures(1), pictures(2, 1)
    refs = Between(Ref(anchors[:, 0]), Ref(anchors[:, 1]), 1, 0.5)

    def state(method):
        *_, made = model.apply(
            {"params": params}, frame, refs, QP[:, None], Estimate(), method=method
        )
        return made[0] if method == "__call__" else made

    whole, alone = (jax.jit(lambda m=m: state(m))() for m in ("__call__", "coded_motion"))
    np.testing.assert_allclose(alone.motion_y, whole.motion_y, atol=1e-4)
    np.testing.assert_allclose(alone.motion_feature, whole.motion_feature, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_stage_in_which_it_learns_alone(model, params):
    common = dict(end_lr=1e-3, data=None, weight_decay=0.0, clip_norm=1.0, rate_balance=0.5)
    stage = Stage(
        steps=2, batch=2, crop=64, units=2, lr=1e-3, optimizer="adamw", average_decay=0.9,
        references=dict(true=1.0), motion_only="coded", flow_loss=0.02, **common,
    )  # fmt: skip
    codec = registry.entry("brhvc")
    step = training.make_train_step(codec, model, stage, 0, seed=1, warmup_steps=1)
    clip = training.Clip(pictures(2, 1), pictures(2), QP, jnp.zeros(2, jnp.int32), PATH)
    state = training.init_state(codec, model, stage, params)
    new, metrics = jax.jit(lambda state: step(state, clip, False))(state)
    values = metrics.compute()
    assert values["bpp_y"] > 0 and values["psnr_y"] == 0 and values["skipped"] == 0
    before, after = (s.params["inter"] for s in (state, new))
    moved = jax.tree.map(lambda a, b: (a != b).any(), before, after)
    assert {name for name, tree in moved.items() if any(jax.tree.leaves(tree))} == {"flow", *MOTION}


@pytest.mark.parametrize("moves", [True, False])
def test_motion_is_told_where_it_helps(model, params, monkeypatch, moves):
    """Also by networks that have learnt nothing."""
    texture = jax.image.resize(pictures(1)[:1, 0, :24, :32], (1, 96, 128, 3), "cubic")
    frame, past, future = (texture[:, 16:80, 16 + x : 80 + x] for x in (0, -6 * moves, 6 * moves))
    past, future = past + 1e-3, future - 1e-3  # to tell them apart

    def motion_between(self, a, b, times=0):
        """In pixels of pictures half as large, found also where there is none."""
        if times == 0 and (a != frame).any():  # of the references
            return jnp.zeros((1, 32, 32, 2))
        flow = jnp.array([3.0, 0.0]) * jnp.where((b == past).all(), 1, -1)
        return jnp.broadcast_to(flow, (1, 32 >> times, 32 >> times, 2)) * 0.5**times

    monkeypatch.setattr(brhvc.BFrame, "_motion_between", motion_between)
    blank = jax.tree.map(jnp.zeros_like, params)
    blank["inter"]["q_motion_decoder"] = dict(basic=jnp.ones(8), anchors=jnp.ones(4))
    refs = Between(Ref(past), Ref(future), 1, 0.5)
    args = {"params": blank}, frame[:, None], refs, QP[:1, None], Estimate()
    flows, _, ref = model.apply(*args, method="coded_motion")
    assert (ref.motion_y != 0).any() == moves
    for flow, towards in zip(flows, (6 * moves, -6 * moves), strict=True):
        inner = flow[:, 16:48, 16:48]  # at borders, references do not show what the frame does
        np.testing.assert_allclose(inner[..., 0], towards, atol=0.5)
        np.testing.assert_allclose(inner[..., 1], 0, atol=0.5)
