"""One optimiser step: unroll a codec over a clip, weigh rate against distortion, update.

Everything here is a pure function of its arguments, and random numbers follow from (seed, step), so
a resumed run continues exactly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from clu import metrics
from jax import lax

from nvc_jax import colour, quality
from nvc_jax.entropy.bottleneck import NO_BITS, Estimate
from nvc_jax.models import registry
from nvc_jax.models.registry import Entry
from nvc_jax.models.with_intra import WithIntra
from nvc_jax.nn.flow import MotionErrors, motion_errors, noted_motion
from nvc_jax.nn.warp import warp
from nvc_jax.training import losses
from nvc_jax.training.hierarchy import Path, code_path
from nvc_jax.training.losses import CodedClip
from nvc_jax.training.orders import Run, code_run
from nvc_jax.training.references import BLANK, degraded
from nvc_jax.training.soap import soap
from nvc_jax.training.stages import Stage


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds.

    Attributes:
      step: int32 [], optimiser steps done, skipped ones included.
      params, opt_state: of the model and of optax.
      average: exponential moving average of params: what gets released.
      skipped: int32 [], steps left out because a gradient was not finite.
      skipped_in_row: int32 [], how many of the latest steps.
      carry: references left by the previous step, for stages that walk through long clips: what
        the codec gives, or `NO_CARRY`.
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
      reference: [batch, n, height, width, 3], what the first unit refers to: the picture before
        `frames`, or the two anchors of B-frames; Y, U, V at 4:4:4, float32 in [0, 1] or uint8 in
        0..255.
      frames: [batch, frames, height, width, 3], the pictures to code in coding order, likewise.
      qp: int32 [batch], base quality index.
      phase: int32 [batch], number of the first coded frame; modulo the period of quality offsets,
        but for codecs that have one for intra frames, whose clips begin with frame 0.
      path: of B-frames, see `nvc_jax.training.hierarchy`, or a `Run` of a codec that codes in any
        order, whose `reference` does not count; else None.
    """

    reference: jax.Array
    frames: jax.Array
    qp: jax.Array
    phase: jax.Array
    path: Path | Run | None = None


@flax.struct.dataclass
class StepMetrics(metrics.Collection):
    """What a step reports; merged over steps, `compute()` gives means and the newest counts.

    `motion_gain`: how many dB closer references are to a picture after motion, as it was decoded; 0
    for codecs that do not say. `misjudged`: see `CodedClip`; 0 for codecs that do not judge. What a
    stage with `motion_only` does not compute is 0, and its motion was not coded.
    A step that was skipped counts with the values it had, so not a number stays to be seen.
    """

    loss: metrics.Average.from_output("loss")
    bpp_y: metrics.Average.from_output("bpp_y")
    bpp_y_float: metrics.Average.from_output("bpp_y_float")
    bpp_z: metrics.Average.from_output("bpp_z")
    bpp_side: metrics.Average.from_output("bpp_side")
    bpp_motion: metrics.Average.from_output("bpp_motion")
    distortion: metrics.Average.from_output("distortion")
    psnr_y: metrics.Average.from_output("psnr_y")
    psnr_u: metrics.Average.from_output("psnr_u")
    psnr_v: metrics.Average.from_output("psnr_v")
    motion_gain: metrics.Average.from_output("motion_gain")
    misjudged: metrics.Average.from_output("misjudged")
    grad_norm: metrics.Average.from_output("grad_norm")
    lr: metrics.LastValue.from_output("lr")
    skipped: metrics.LastValue.from_output("skipped")
    skipped_in_row: metrics.LastValue.from_output("skipped_in_row")


# How far the qp of intra frames in training may be from that of the frames that refer to them, so
# that encoders may choose.
QP_SPREAD = 8

# Of Muon's quintic (Jordan, 2024), for each of five steps: with a row for each, Optax makes them a
# loop, which compiles in half the time.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5

# What a codec without references, or a stage that does not walk, hands on. Orbax does not store
# empty trees.
NO_CARRY = (np.zeros((1,), np.float32),)


def learning_rate(stage: Stage, start: int, warmup_steps: int) -> optax.Schedule:
    """Of the optimiser step; `start` is the stage's first.

    Every stage warms up: what only now starts to learn has moments of nothing, and Adam corrects
    for that only in a run's first steps.
    """

    def rate(step):
        done = jnp.clip((step - start) / stage.steps, 0, 1)
        way = {"constant": 0 * done, "linear": done, "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * done)}
        value = stage.lr + (stage.end_lr - stage.lr) * way[stage.schedule]
        return value * jnp.minimum(1.0, (step - start + 1) / warmup_steps)

    return rate


def make_optimizer(stage: Stage) -> optax.GradientTransformation:
    """The stage's optimiser at a learning rate of 1, behind a limit on the gradient's norm.

    The rate follows the run's steps, not those that the optimiser has taken, which are fewer if
    some were skipped. The state fits every stage with the same optimiser.

    "adamw", or "muon" (Jordan, 2024): dense layers and convolutions are matrices, of inputs times
    outputs, whose momentum is made orthogonal, so that all directions learn equally fast. Scaled as
    by Liu et al. (arXiv 2502.16982), their steps are about as large as those of Adam with Nesterov
    momentum, by which all other parameters learn; one learning rate serves both. What a step did
    not use, such as networks for other kinds of references, stays as it is: orthogonal steps are
    as large without a gradient as with one. "soap" moves the same matrices by steps of Adam along
    directions of their own, see `nvc_jax.training.soap`, and likewise what is used only.
    """
    if stage.optimizer == "muon":
        steps = optax.contrib.muon(
            1.0,
            ns_coeffs=NEWTON_SCHULZ,
            weight_decay=stage.weight_decay,
            adam_weight_decay=stage.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
        steps = _where_used(steps)
    elif stage.optimizer == "soap":
        steps = _where_used(soap(1.0, _are_matrices, weight_decay=stage.weight_decay))
    else:
        steps = optax.adamw(1.0, weight_decay=stage.weight_decay)
    return optax.chain(optax.clip_by_global_norm(stage.clip_norm), steps)


def _where_used(steps: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, but for parameters whose gradient is all zero."""

    def update(grads, state, params=None):
        updates, state = steps.update(grads, state, params)
        return jax.tree.map(lambda u, g: u * jnp.any(g != 0), updates, grads), state

    return optax.GradientTransformation(steps.init, update)


def _matrices(params: dict) -> dict:
    """Which axes of dense layers and convolutions are a matrix; None for all other parameters."""

    def axes(path, leaf):
        *networks, name = (key.key for key in path)
        dense = leaf.ndim in (2, 4) and leaf.shape[-2] > 1  # not depth-wise
        if name != "kernel" or not dense or networks[0] == "intra":  # which does not learn
            return None
        *inputs, output = range(leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), output)

    return jax.tree_util.tree_map_with_path(axes, params)


def _are_matrices(params: dict) -> dict:
    """Which parameters are, as a tree of bool."""
    return jax.tree.map(lambda axes, _: axes is not None, _matrices(params), params, is_leaf=_axes)


def _axes(x: Any) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


def unroll(
    codec: Entry,
    model: nn.Module,
    params: Any,
    clip: Clip,
    refs: tuple,
    key: jax.Array | None,
    *,
    exact: bool = False,
    detached: bool = False,
    penalty: Callable | None = None,
    rounded: bool = False,
    remat: bool = False,
    draws: jax.Array | None = None,
    spoil: float = 0.0,
    judge: bool = False,
    only_alone: bool = False,
) -> CodedClip:
    """Codes a clip as the codec would and adds up rate and distortion.

    The clip's units follow each other with full back-propagation ("cascaded"); of a hierarchy only
    one path is coded.

    Args:
      clip: of float32.
      refs: references of the first unit; () for codecs without.
      key: of the noise that stands for rounding in the rate; None to round.
      exact, detached, penalty, rounded: see `nvc_jax.entropy.bottleneck.Estimate`.
      remat: whether activations are computed again for the gradients.
      draws, spoil, judge, only_alone: see `nvc_jax.training.orders.code_run`.
    """
    options = dict(exact=exact, detached=detached, penalty=penalty, rounded=rounded)
    if isinstance(clip.path, Run):
        return code_run(
            model, params, clip.path, clip.frames, clip.qp, key, draws=draws, spoil=spoil,
            judge=judge, remat=remat, only_alone=only_alone, **options,
        )  # fmt: skip
    if clip.path is not None:
        anchors = jnp.stack([ref.frame for ref in refs], 1)
        return code_path(
            model, params, clip.path, codec.layer_weights, clip.frames, anchors, clip.qp, key,
            remat=remat, **options,
        )  # fmt: skip
    _, count, height, width, _ = clip.frames.shape
    pictures = colour.for_codec(model, clip.frames)
    per_unit = model.frames_per_unit
    offsets = jnp.asarray(codec.qp_offsets or (0,))
    weights = jnp.asarray(codec.frame_weights)

    def unit(params, frames, refs, qp, key):
        bottleneck = Estimate(key, **options)
        (recon, refs), noted = model.apply(
            {"params": params}, frames, refs, qp, bottleneck, mutable=["motion"]
        )
        motion = noted_motion(noted) if noted else None
        return recon, refs, bottleneck.bits, bottleneck.penalty, motion

    if remat:
        unit = jax.checkpoint(unit)
    bits = dict(NO_BITS)
    distortion, recons, penalties = 0.0, [], jnp.zeros(len(clip.frames))
    motions = []
    for start in range(0, count, per_unit):
        number = clip.phase[:, None] + start + jnp.arange(per_unit)
        index = number % len(offsets)
        frames = pictures[:, start : start + per_unit]
        noise_key = None
        if key is not None:
            key, noise_key = jax.random.split(key)
        extra, weight = offsets[index], weights[index]
        if codec.intra_offset is not None:
            first = jnp.minimum(codec.intra_offset, quality.QP_ROWS - 1 - clip.qp[:, None])
            raised = quality.lambda_of_qp(first, codec.content) / quality.lambda_of_qp(
                0, codec.content
            )
            weight = jnp.where(number == 0, raised, weight)
            extra = jnp.where(number == 0, first, extra)
        qp = clip.qp[:, None] + extra
        recon, refs, unit_bits, unit_penalty, motion = unit(params, frames, refs, qp, noise_key)
        motions.append(motion)
        bits = jax.tree.map(jnp.add, bits, unit_bits)
        penalties += unit_penalty
        recon = colour.from_codec(model, recon)
        target = clip.frames[:, start : start + per_unit]
        distortion += (weight * losses.distortion(recon, target)).sum(1)
        recons.append(recon)
    bpp = jax.tree.map(lambda b: b / (height * width), bits)
    penalties /= height * width
    motion = jax.tree.map(lambda *errors: sum(errors) / len(errors), *motions)
    recon = jnp.concatenate(recons, axis=1)
    return CodedClip(bpp, distortion, recon, penalties, refs, motion=motion)


def first_refs(
    codec: Entry, model: nn.Module, params: Any, stage: Stage, clip: Clip, key: jax.Array
) -> tuple:
    """References of a clip's first unit: pictures drawn by the stage's shares."""
    if not model.references or registry.in_any_order(model):
        return ()
    kind_key, degraded_key, coded_key = jax.random.split(key, 3)
    batch, count = clip.reference.shape[:2]
    before = clip.reference.reshape(-1, *clip.reference.shape[2:])
    candidates = {
        "blank": lambda: jnp.full_like(before, BLANK),
        "true": lambda: before,
        "degraded": lambda: degraded(degraded_key, before),
        "coded": lambda: _coded(codec, model, params, before, clip, coded_key),
    }
    names = [name for name, share in stage.references.items() if share > 0]
    shares = jnp.log(jnp.array([stage.references[name] for name in names]))
    kind = jax.random.categorical(kind_key, shares, shape=(batch, 1, 1, 1))
    kind = jnp.repeat(kind, count, axis=0)
    picture = candidates[names[0]]()
    for number, name in enumerate(names[1:], 1):
        picture = jnp.where(kind == number, candidates[name](), picture)
    return as_refs(model, picture.reshape(clip.reference.shape))


def as_refs(model: nn.Module, pictures: jax.Array) -> tuple:
    """References that are but pictures, [batch, n, height, width, 3] of Y, U, V; () if none.

    Codecs that code in any order have none: what they refer to they code themselves.
    """
    if registry.in_any_order(model):
        return ()
    if model.rgb:
        pictures = jnp.clip(colour.to_rgb(pictures), 0, 1)
    return tuple(model.start(pictures[:, i]) for i in range(model.references))


def _coded(codec, model, params, before: jax.Array, clip: Clip, key: jax.Array) -> jax.Array:
    """Pictures [n, height, width, 3] as the codec itself would have coded them, without references.

    An intra codec beside another one does so at a quality close to the clip's.
    """
    frames = jnp.repeat(before[:, None], model.frames_per_unit, axis=1)
    if not isinstance(model, WithIntra):
        clip = clip._replace(frames=frames, phase=clip.phase - model.frames_per_unit)
        blank = as_refs(model, jnp.full_like(before, BLANK)[:, None])
        recon = unroll(codec, model, params, clip, blank, None).recon[:, -1]
        return lax.stop_gradient(jnp.clip(recon, 0, 1))
    qp = jnp.repeat(clip.qp, len(before) // len(clip.qp))[:, None]
    qp += jax.random.randint(key, qp.shape, -QP_SPREAD, QP_SPREAD + 1)
    qp = jnp.clip(qp, 0, quality.QP_COUNT - 1)
    frames = colour.for_codec(model, frames)

    def intra(pictures_and_qp):
        pictures, qp = pictures_and_qp
        return model.apply({"params": params}, pictures, (), qp, Estimate())[0][:, 0]

    # One anchor of every sample after the other: less memory, and every device has its samples.
    by_anchor = jax.tree.map(
        lambda x: x.reshape(len(clip.qp), -1, *x.shape[1:]).swapaxes(0, 1), (frames, qp)
    )
    recon = lax.map(intra, by_anchor).swapaxes(0, 1).reshape(before.shape)
    recon = lax.stop_gradient(jnp.clip(recon, 0, 1))
    return colour.from_codec(model, recon)


def as_floats(clip: Clip) -> Clip:
    """Pictures of 0..255 as float32 in [0, 1]."""

    def convert(x):
        return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x

    return clip._replace(reference=convert(clip.reference), frames=convert(clip.frames))


def make_train_step(
    codec: Entry, model: nn.Module, stage: Stage, start: int, *, seed: int, warmup_steps: int
) -> Callable:
    """Builds `train_step(state, clip, carried, teacher=None) -> (state, StepMetrics)` of a stage.

    To be jitted with `state` donated, and `carried` static: whether the clip goes on where the
    previous step stopped. `teacher`: parameters of the model to learn from, if the stage has one.
    `start`: the stage's first step.
    """
    rate = learning_rate(stage, start, warmup_steps)
    tx = make_optimizer(stage)
    penalty = losses.scale_penalty(stage.penalty) if stage.penalty else None
    factors = dict(stage.lr_scale)

    def loss_fn(params, clip, refs, key, teacher):
        noise_key, draws_key = jax.random.split(key)
        coded = unroll(
            codec, model, params, clip, refs, noise_key if stage.noise else None,
            exact=stage.exact, detached=stage.detached, penalty=penalty, rounded=stage.rounded,
            remat=stage.remat, draws=draws_key, spoil=stage.spoil, judge=stage.judged,
        )  # fmt: skip
        bpp, lam = coded.bpp, quality.lambda_of_qp(clip.qp, codec.content)
        shares = (1, 1) if stage.detached else (1 - stage.float_share, stage.float_share)
        terms = lam * coded.distortion
        terms += bpp["z"] + shares[0] * bpp["y"] + shares[1] * bpp["y_float"] + bpp["motion"]
        if penalty:
            terms += stage.penalty.beta * coded.penalty
        motion_gain = jnp.float32(0)
        if coded.motion is not None:
            terms += lam * stage.flow_loss * coded.motion.moved
            motion_gain = _motion_gain(coded.motion)
        if stage.teacher:
            terms += lam * _distance(codec, model, stage, clip, refs, coded, teacher)
        # Rates span two orders of magnitude over qp. Without a weight the high ones would drown
        # the low ones; lambda^-balance brings the terms to one scale (0: the published loss).
        # What is known of references counts alike at all of them.
        loss = jnp.mean(terms * lam**-stage.rate_balance + stage.judge_loss * coded.misjudged)
        psnr = losses.psnr(coded.recon, clip.frames).mean((0, 1))
        outputs = {
            "loss": loss,
            "bpp_y": bpp["y"].mean(),
            "bpp_y_float": bpp["y_float"].mean(),
            "bpp_z": bpp["z"].mean(),
            "bpp_side": jnp.mean(bpp["side"]),
            "bpp_motion": jnp.mean(bpp["motion"]),
            "distortion": coded.distortion.mean(),
            "psnr_y": psnr[0],
            "psnr_u": psnr[1],
            "psnr_v": psnr[2],
            "motion_gain": motion_gain,
            "misjudged": jnp.mean(coded.misjudged),
        }
        return loss, (outputs, coded.refs)

    def gradients(params, clip, carry, key, carried, teacher):
        clip = as_floats(clip)

        def of(loss, *args):
            return jax.grad(lambda p: loss(_learning(model, stage, p), *args), has_aux=True)(params)

        if stage.motion_only:
            return of(partial(_flow_loss, model), clip)
        refs_key, noise_key = jax.random.split(key)
        refs = carry if carried else first_refs(codec, model, params, stage, clip, refs_key)
        return of(loss_fn, clip, refs, noise_key, teacher)

    def train_step(state, clip, carried, teacher=None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        carry = state.carry if carried else ()
        if stage.accumulate == 1:
            grads, (outputs, refs) = gradients(
                state.params, clip, carry, key, carried, teacher
            )  # fmt: skip
        else:
            grads, (outputs, refs) = _in_parts(
                lambda part, carry, number: gradients(
                    state.params,
                    part._replace(path=clip.path),
                    carry,
                    jax.random.fold_in(key, number),
                    carried,
                    teacher,
                ),
                (clip._replace(path=None), carry),
                stage.accumulate,
            )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(outputs["loss"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # Zero also against weight decay, and what the moments remember from earlier stages.
        updates = {
            k: optax.tree.scale(rate(state.step) * factors.get(k, 1.0) * stage.learns(k), u)
            for k, u in registry.networks(model, updates).items()
        }
        updates = registry.together(model, updates)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(stage.average_decay, (1 + state.step) / (10 + state.step))
        average = optax.incremental_update(params, state.average, 1 - decay)

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        state = TrainState(
            step=state.step + 1,
            params=keep_if_finite(params, state.params),
            opt_state=keep_if_finite(opt_state, state.opt_state),
            average=keep_if_finite(average, state.average),
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
            carry=jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), refs)
            if model.references and stage.walk > 1
            else state.carry,
        )
        return state, StepMetrics.single_from_model_output(
            **outputs,
            grad_norm=norm,
            lr=rate(state.step - 1),
            # As the types of `StepMetrics.empty()`, so that merging never changes a type.
            skipped=jnp.float32(state.skipped),
            skipped_in_row=jnp.float32(state.skipped_in_row),
        )

    return train_step


def _learning(model: nn.Module, stage: Stage, params: Any) -> Any:
    """The parameters, with gradients only for the sub-networks that learn."""
    parts = registry.networks(model, params)
    parts = {k: p if stage.learns(k) else lax.stop_gradient(p) for k, p in parts.items()}
    return registry.together(model, parts)


def _flow_loss(model: nn.Module, params: Any, clip: Clip) -> tuple[jax.Array, tuple]:
    """(loss, (outputs, no references)) of a stage in which flows learn alone.

    From a unit's picture to the one before; of B-frames, to both anchors, and from one of these to
    the other, which decoders see.
    """
    past, *others = jnp.moveaxis(colour.for_codec(model, clip.reference), 1, 0)
    frame = colour.for_codec(model, clip.frames)[:, 0]
    pairs = [(frame, past)]
    for future in others:
        pairs += [(frame, future), (past, future)]
    # Side by side, not one after the other: so every device keeps its samples.
    targets, references = (
        jnp.stack(pictures, 1).reshape(-1, *frame.shape[1:])
        for pictures in zip(*pairs, strict=True)
    )
    flows = model.apply({"params": params}, targets, references, method="motion")
    loss = losses.motion(targets, references, flows).mean()
    errors = motion_errors(targets, references, warp(references, flows))
    return loss, (_motion_outputs(loss, errors), ())


def _motion_outputs(loss: jax.Array, errors: MotionErrors) -> dict[str, jax.Array]:
    """Of a step that codes no pictures: all that `StepMetrics` has."""
    coded = "bpp_y bpp_y_float bpp_z bpp_side bpp_motion distortion psnr_y psnr_u psnr_v misjudged"
    outputs = dict.fromkeys(coded.split(), jnp.float32(0))
    return outputs | {"loss": loss, "motion_gain": _motion_gain(errors)}


def _motion_gain(errors: MotionErrors) -> jax.Array:
    """How many dB closer references are after motion, mean over a batch's squared errors."""
    moved, still = (jnp.maximum(error.mean(), 1e-10) for error in errors)
    return 10 * jnp.log10(still / moved)


def _in_parts(gradients: Callable, batch: Any, parts: int) -> tuple:
    """(gradients, (outputs, refs)) of a batch, averaged over parts that follow each other.

    Every part takes its samples from all over the batch, so that every device has a share in it.
    """
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        number, (clip, carry) = part
        grads, (outputs, refs) = gradients(clip, carry, number)
        return jax.tree.map(jnp.add, total, (grads, outputs)), refs

    shapes = jax.eval_shape(lambda: gradients(*jax.tree.map(lambda x: x[0], split), 0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))
    total, refs = lax.scan(add, zeros, (jnp.arange(parts), split))
    grads, outputs = jax.tree.map(lambda x: x / parts, total)
    return grads, (
        outputs,
        jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), refs),
    )


def _distance(codec, model, stage, clip, refs, coded: CodedClip, teacher: Any) -> jax.Array:
    """Knowledge replay, [batch]: how far pictures and references are from a teacher's.

    The teacher codes the same clip from the same references, with its own symbols. Of codecs that
    code in any order only pictures on their own count: the others may become better.
    """
    taught = unroll(codec, model, teacher, clip, refs, None, exact=stage.exact, only_alone=True)
    taught = lax.stop_gradient(taught)
    result = jnp.zeros(len(clip.frames))
    if "recon" in stage.teacher:
        distances = losses.distortion(coded.recon, taught.recon)
        if isinstance(clip.path, Run):
            distances *= clip.path.alone
        result += stage.teacher.recon * distances.sum(1)
    if "refs" in stage.teacher:
        for mine, other in zip(coded.refs, taught.refs, strict=True):
            squares = (mine.feature - other.feature) ** 2
            result += stage.teacher.refs * squares.mean((1, 2, 3))
    return result


def init_state(codec: Entry, model: nn.Module, stage: Stage, params: dict) -> TrainState:
    """The state before the first step; `stage` sets the shape of `carry`."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=make_optimizer(stage).init(params),
        average=jax.tree.map(jnp.copy, params),
        skipped=jnp.int32(0),
        skipped_in_row=jnp.int32(0),
        carry=empty_carry(codec, model, stage),
    )


def state_shapes(codec: Entry, model: nn.Module, stage: Stage) -> TrainState:
    """Of any state of a stage."""
    make = partial(init_state, codec, model, stage)
    return jax.eval_shape(make, registry.param_shapes(model))


def empty_carry(codec: Entry, model: nn.Module, stage: Stage) -> tuple:
    """Zeros in the place of the references that a step of this stage leaves."""
    if not model.references or stage.walk == 1:
        return NO_CARRY
    side, size = stage.crop, stage.batch

    def one_unit():
        picture = jnp.zeros((size, side, side, 3))
        frames = jnp.repeat(picture[:, None], model.frames_per_unit, axis=1)
        none = jnp.zeros(size, jnp.int32)
        clip = Clip(picture[:, None], frames, none, none)
        params = registry.init(model, jax.random.key(0))
        refs = as_refs(model, clip.reference)
        return unroll(codec, model, params, clip, refs, None, exact=stage.exact).refs

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one_unit))
