"""One optimiser step: unroll a codec over a clip, weigh rate against distortion, update.

Everything here is a pure function of its arguments, and random numbers follow from (seed, step), so
a resumed run continues exactly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from clu import metrics
from jax import lax

from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.models import registry
from nvc_jax.models.registry import Ref
from nvc_jax.nn.integer import memory_channels
from nvc_jax.schedule import QP_OFFSETS
from nvc_jax.training import losses
from nvc_jax.training.references import EQUAL_SHARES, mixed_reference


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds.

    Attributes:
      step: int32 [], optimiser steps done, skipped ones included.
      params, opt_state: of the model and of optax.
      average: exponential moving average of params: what gets released.
      skipped: int32 [], steps left out because a gradient was not finite.
      skipped_in_row: int32 [], how many of the latest steps.
      carry: references left by the previous step, a tuple of `Ref` (or of something else for codecs
        without), for stages that walk through long clips.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any
    skipped: jax.Array
    skipped_in_row: jax.Array
    carry: tuple


class Clip(NamedTuple):
    """A batch of training clips.

    Attributes:
      reference: float32 [batch, height, width, 3] in [0, 1], the picture before `frames`.
      frames: float32 [batch, frames, height, width, 3], the pictures to code.
      qp: int32 [batch], base quality index.
      phase: int32 [batch], number of the first coded frame modulo 8.
    """

    reference: jax.Array
    frames: jax.Array
    qp: jax.Array
    phase: jax.Array


@flax.struct.dataclass
class StepMetrics(metrics.Collection):
    """What a step reports; merged over steps, `compute()` gives means and the newest counts.

    A step that was skipped counts with the values it had, so not a number stays to be seen.
    """

    loss: metrics.Average.from_output("loss")
    bpp_y: metrics.Average.from_output("bpp_y")
    bpp_y_float: metrics.Average.from_output("bpp_y_float")
    bpp_z: metrics.Average.from_output("bpp_z")
    distortion: metrics.Average.from_output("distortion")
    psnr_y: metrics.Average.from_output("psnr_y")
    psnr_u: metrics.Average.from_output("psnr_u")
    psnr_v: metrics.Average.from_output("psnr_v")
    grad_norm: metrics.Average.from_output("grad_norm")
    skipped: metrics.LastValue.from_output("skipped")
    skipped_in_row: metrics.LastValue.from_output("skipped_in_row")


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW under one learning-rate curve: linear warm-up, then a cosine from stage to stage."""
    pieces, boundaries, start = [], [], 0
    for stage in config.stages:
        pieces.append(
            optax.cosine_decay_schedule(stage.lr, stage.steps, alpha=stage.end_lr / stage.lr)
        )
        start += stage.steps
        boundaries.append(start)
    rate = optax.join_schedules(pieces, boundaries[:-1])

    def warm(step):
        return rate(step) * jnp.minimum(1.0, (step + 1) / config.warmup_steps)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(warm, weight_decay=config.weight_decay),
    )


class Unrolled(NamedTuple):
    """What a codec makes of a clip.

    Attributes:
      bpp: of "z", "y" and "y_float" (see `Estimate`), [batch], bits per pixel of one frame, summed
        over units.
      distortion: [batch], weighted, summed over frames.
      recon: like clip.frames.
      refs: what the next unit would refer to.
      penalty: [batch], of the scales, per pixel of one frame, summed over units.
    """

    bpp: dict[str, jax.Array]
    distortion: jax.Array
    recon: jax.Array
    refs: tuple
    penalty: jax.Array


def unroll(
    model: nn.Module,
    params: Any,
    clip: Clip,
    first_refs: tuple,
    key: jax.Array | None,
    exact: bool = False,
    detached: bool = False,
    penalty: Callable | None = None,
) -> Unrolled:
    """Codes a clip as the codec would and adds up rate and distortion.

    The clip's units follow each other with full back-propagation ("cascaded").

    Args:
      first_refs: references of the first unit; () for intra codecs.
      key: of the noise that stands for rounding in the rate; None to round.
      exact, detached, penalty: see `nvc_jax.entropy.bottleneck.Estimate`.
    """
    _, count, height, width, _ = clip.frames.shape
    per_unit = model.frames_per_unit
    inter = per_unit > 1
    offsets, weights = jnp.asarray(QP_OFFSETS), jnp.asarray(losses.FRAME_WEIGHTS)
    bits = {"z": 0.0, "y": 0.0, "y_float": 0.0}
    distortion, recons, refs = 0.0, [], first_refs
    penalties = jnp.zeros(len(clip.frames))
    for start in range(0, count, per_unit):
        index = (clip.phase[:, None] + start + jnp.arange(per_unit)) % 8
        qp = clip.qp[:, None] + (offsets[index] if inter else 0)
        frames = clip.frames[:, start : start + per_unit]
        noise_key = None
        if key is not None:
            key, noise_key = jax.random.split(key)
        bottleneck = Estimate(noise_key, exact, detached, penalty)
        recon, refs = model.apply({"params": params}, frames, refs, qp, bottleneck)
        bits = jax.tree.map(jnp.add, bits, bottleneck.bits)
        penalties += bottleneck.penalty
        weight = weights[index] if inter else 1.0
        distortion += (weight * losses.distortion(recon, frames)).sum(1)
        recons.append(recon)
    bpp = jax.tree.map(lambda b: b / (height * width), bits)
    penalties /= height * width
    return Unrolled(bpp, distortion, jnp.concatenate(recons, axis=1), refs, penalties)


def first_refs(
    model: nn.Module,
    state: TrainState,
    clip: Clip,
    carried: bool,
    key: jax.Array,
    shares: tuple[float, ...] = EQUAL_SHARES,
):
    """References of a clip's first unit: those left by the previous step, or a mixed picture."""
    if model.frames_per_unit == 1:
        return ()
    if carried:
        return state.carry
    # Not fold_in(key, 1): that is what `unroll` gets for its noise when it splits the key.
    key = jax.random.fold_in(key, 2)
    return (Ref(frame=mixed_reference(key, clip.reference, shares)),)


def make_train_step(model: nn.Module, config: ml_collections.ConfigDict) -> Callable:
    """Builds `train_step(state, clip, carried, stage=0) -> (state, StepMetrics)`.

    To be jitted with `state` donated, and static: `carried` (the clip goes on where the previous
    step stopped) and the number of the stage. A stage may have, beside what every stage has,
      trainable: names of the sub-networks that learn, the others being frozen;
      exact: bool, rates come from the integer scale head;
      noise: bool, whether noise stands for rounding in the rate (default). Without, rates are those
        of the symbols, and gradients pass through the rounding as if it were not there;
      rate_balance: in place of the config's;
      float_share: of the latent's rate that is taken from float scales all the same, so that a
        codec that learns under integer scales stays good in the other modes (default: 0);
      detached: bool, the scale head learns from rounded symbols, and everything from the rate under
        float scales, which is added in full (for `exact`, with noise);
      references: relative shares of blank, true and degraded pictures as first references (equal);
      penalty: of scales, see `nvc_jax.training.losses.scale_penalty`.
    """
    codec = registry.entry(config.model.name)
    tx = make_optimizer(config)

    def loss_fn(params, clip, refs, key, stage):
        params = {k: p if learns(k, stage) else lax.stop_gradient(p) for k, p in params.items()}
        penalty = losses.scale_penalty(stage.penalty) if stage.get("penalty") else None
        detached = stage.get("detached", False)
        bpp, distortion, recon, refs, penalties = unroll(
            model, params, clip, refs,
            key=key if stage.get("noise", True) else None,
            exact=stage.get("exact", False), detached=detached, penalty=penalty,
        )  # fmt: skip
        lam = losses.lambda_of_qp(clip.qp, codec.content)
        share = stage.get("float_share", 0.0)
        shares = (1, 1) if detached else (1 - share, share)
        rate = bpp["z"] + shares[0] * bpp["y"] + shares[1] * bpp["y_float"]
        # Rates span two orders of magnitude over qp. Without a weight the high ones would drown
        # the low ones; lambda^-balance brings the terms to one scale (0: the published loss).
        terms = lam * distortion + rate
        if penalty:
            terms += stage.penalty.beta * penalties
        loss = jnp.mean(terms * lam ** -stage.get("rate_balance", config.rate_balance))
        psnr = losses.psnr(recon, clip.frames).mean((0, 1))
        outputs = {
            "loss": loss,
            "bpp_y": bpp["y"].mean(),
            "bpp_y_float": bpp["y_float"].mean(),
            "bpp_z": bpp["z"].mean(),
            "distortion": distortion.mean(),
            "psnr_y": psnr[0],
            "psnr_u": psnr[1],
            "psnr_v": psnr[2],
        }
        return loss, (outputs, refs)

    def train_step(state, clip, carried, stage=0):
        stage = config.stages[stage]
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        shares = stage.get("references", EQUAL_SHARES)
        refs = first_refs(model, state, clip, carried, key, shares)
        grads, (outputs, refs) = jax.grad(loss_fn, has_aux=True)(
            state.params, clip, refs, key, stage
        )  # fmt: skip
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(outputs["loss"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # Also against weight decay, and what the moments remember from earlier stages.
        updates = {
            k: u if learns(k, stage) else jax.tree.map(jnp.zeros_like, u)
            for k, u in updates.items()
        }
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.average_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_carry = refs if model.frames_per_unit > 1 else state.carry
        state = TrainState(
            step=state.step + 1,
            params=keep_if_finite(params, state.params),
            opt_state=keep_if_finite(opt_state, state.opt_state),
            average=keep_if_finite(average, state.average),
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            carry=jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), new_carry),
        )
        return state, StepMetrics.single_from_model_output(
            **outputs,
            grad_norm=norm,
            # As the types of `StepMetrics.empty()`, so that merging never changes a type.
            skipped=jnp.float32(state.skipped),
            skipped_in_row=jnp.float32(state.skipped_in_row),
        )

    return train_step


def init_state(
    model: nn.Module, config: ml_collections.ConfigDict, stage: ml_collections.ConfigDict
) -> TrainState:
    """A fresh state; `stage` sets the shape of `carry`."""
    params = registry.init(model, jax.random.key(config.seed))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=make_optimizer(config).init(params),
        average=jax.tree.map(jnp.copy, params),
        skipped=jnp.int32(0),
        skipped_in_row=jnp.int32(0),
        carry=empty_carry(model, stage),
    )


def empty_carry(model: nn.Module, stage: ml_collections.ConfigDict) -> tuple:
    """Zeros of the shape of a stage's references; a lone zero for intra codecs."""
    if model.frames_per_unit == 1:
        return (jnp.zeros((1,)),)  # Orbax does not store empty trees
    side = stage.crop // 16
    feature = jnp.zeros((stage.batch, 2 * side, 2 * side, model.cfg.width))
    memory = None
    if stage.get("exact", False):
        memory = jnp.zeros((stage.batch, side, side, memory_channels(model.cfg.y)))
    return (Ref(feature=feature, memory=memory),)


def learns(name: str, stage: ml_collections.ConfigDict) -> bool:
    """Whether a stage trains the sub-network of this name."""
    return not stage.get("trainable") or name in stage.trainable
