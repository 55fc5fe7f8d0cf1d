"""Training of codecs that code in any order: short runs of pictures, alone or with references.

Every picture of a run is coded by the codec itself, those that others refer to as well, with
gradients through all of them. What orders they come in is drawn for every step: pictures on their
own, low delay, or a way down a hierarchy as in `nvc_jax.training.hierarchy`. All share one program.
"""

import math
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from nvc_jax import schedule
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.models import uni_lvc
from nvc_jax.models.registry import Entry
from nvc_jax.quality import lambda_of_qp
from nvc_jax.training import losses
from nvc_jax.training.hierarchy import way_down

STRIDES = (1, 1, 1, 2, 4)  # between frames of low delay: also what moves fast is to be learned
PREDICTED = 0.25  # share of hierarchies whose second anchor refers to the first
FAR = 16  # frames from which on nobody knows how far a good reference is to be trusted


class Run(NamedTuple):
    """What a step codes, the same for all samples of its batch. Slots: one for each unit.

    Attributes:
      refs: int32 [units, 2], slots of the references; any where there is none.
      role, distance: int32 and float32 [units, 2], see `nvc_jax.models.uni_lvc.Slot`.
      there: float32 [units, 2], whether there is a reference.
      qp_offset: int32 [units], added to the clip's qp.
      weight: float32 [units], how many frames a unit stands for; 1 on average.
      quality: float32 [units], weight on the distortion beside that and the clip's lambda.
      temperature: float32 [units], of the choice between levels of reliability; all the same.
    """

    refs: np.ndarray
    role: np.ndarray
    distance: np.ndarray
    there: np.ndarray
    qp_offset: np.ndarray
    weight: np.ndarray
    quality: np.ndarray
    temperature: np.ndarray

    @property
    def alone(self):
        """bool [units], whether a unit has no reference."""
        return self.there.sum(-1) == 0


def draw_run(
    rng: np.random.Generator,
    codec: Entry,
    units: int,
    spans: tuple[int, ...],
    shares: dict[str, float],
    temperature: float = 1.0,
) -> tuple[list[int], Run]:
    """Units in one of the orders.

    Args:
      codec: says how quality follows the layers.
      units: coded one after the other, at least 3 if there is to be a hierarchy.
      spans: distances of its anchors to draw from, each at least 2^(units - 2); the largest also
        limits how far other units lie apart.
      shares: of the orders.
      temperature: see `Run`.

    Returns:
      (display positions of the units, in 0..max(spans); the run).
    """
    names = [name for name in schedule.MODES if shares.get(name)]
    total = sum(shares[name] for name in names)
    order = rng.choice(names, p=[shares[name] / total for name in names])
    weight = np.ones(units)
    if order == "ai":
        places = rng.choice(1 + max(spans), units, replace=False)
        # Half of them as the first pictures of the other orders are coded.
        offsets = rng.integers(1, 1 + max(schedule.QP_OFFSETS), units) * (rng.random(units) < 0.5)
        planned = [
            _alone((int(place),), int(offset))
            for place, offset in zip(places, offsets, strict=True)
        ]
    elif order == "ld":
        stride = int(rng.choice([s for s in STRIDES if s * (units - 1) <= max(spans)]))
        planned = [
            unit._replace(
                frames=(stride * unit.frames[0],),
                distances=tuple(stride * distance for distance in unit.distances),
            )
            for unit in schedule.plan(schedule.low_delay_long(), units)
        ]
        weight[0] = 0.25  # clips are longer
    else:
        planned = _way_down(rng, codec.layer_qp, units, int(rng.choice(spans)))
        # Of two anchors one belongs to the group; below them every layer has twice as many frames.
        weight = np.array([0.5, 0.5, *2.0 ** np.arange(units - 2)])
    run = _as_run(codec, planned, weight / weight.mean(), temperature)
    return [unit.frames[0] for unit in planned], run


def _alone(frames, qp_offset):
    return schedule.Unit(frames, (), 0, (qp_offset,), ())


def _way_down(rng, layer_qp, units, span):
    """Anchors, and from there frames in the middle of what is left; `refs` are slots."""

    def unit(planned, refs, slots):
        frame = planned.frames[0]
        distances = tuple(ref - frame for ref in refs)
        offset = schedule.of_layer(layer_qp, planned)
        return planned._replace(refs=slots, distances=distances, qp_offset=(offset,))

    planned = [_alone((0,), layer_qp[-1])]
    if rng.random() < PREDICTED:
        planned.append(unit(schedule.predicted(0, 0, span), (0,), (0,)))
    else:
        planned.append(_alone((span,), layer_qp[-1]))
    below = way_down(rng, (0, 0), (span, 1), 2)
    for middle, *ends in islice(below, units - 2):
        places, slots = zip(*ends, strict=True)
        planned.append(unit(middle, places, slots))
    return planned


def _as_run(codec, planned, weight, temperature) -> Run:
    count = len(planned)
    offsets = np.array([unit.qp_offset[0] for unit in planned], np.int32)
    higher = lambda_of_qp(offsets, "video") / lambda_of_qp(0, "video")
    run = Run(
        refs=np.zeros((count, 2), np.int32),
        role=np.zeros((count, 2), np.int32),
        distance=np.ones((count, 2), np.float32),
        there=np.zeros((count, 2), np.float32),
        qp_offset=offsets,
        weight=np.float32(weight),
        quality=np.float32(codec.frame_weights[0] * higher),
        temperature=np.full(count, temperature, np.float32),
    )
    for number, unit in enumerate(planned):
        for i, (slot, distance) in enumerate(zip(unit.refs, unit.distances, strict=True)):
            run.refs[number, i], run.there[number, i] = slot, 1
            run.role[number, i] = uni_lvc.role(i, distance)
            run.distance[number, i] = abs(distance)
    return run


def _zeros_like(function):
    """What a function would return, all 0."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function))


def _spoiled(key, slot: uni_lvc.Slot, share: float) -> tuple[uni_lvc.Slot, jax.Array]:
    """Spoils some of a batch's references.

    A third of the spoiled ones come from another clip, of which nothing is to be trusted; the
    others get noise, half of it strong.

    Returns:
      (the slot; how reliable it is by that, int32 [batch], -1 for good ones that are far away).
    """
    batch = len(slot.reliability)
    keys = jax.random.split(key, 4)
    spoiled = jax.random.uniform(keys[0], (batch,)) < share
    kind = jax.random.randint(keys[1], (batch,), 0, 3)
    strength = jnp.where(kind == 1, 0.3, 1.0) * jax.random.uniform(keys[2], (batch,), minval=0.5)

    def everywhere(of_sample):
        return of_sample[:, None, None, None]

    def changed(x, key):
        other = lax.stop_gradient(jnp.roll(x, 1, 0))
        spread = lax.stop_gradient(x.std((1, 2, 3))) * strength
        noisy = x + jax.random.normal(key, x.shape) * everywhere(spread)
        return jnp.where(everywhere(spoiled), jnp.where(everywhere(kind == 0), other, noisy), x)

    frame = changed(slot.ref.frame, keys[3])
    y = changed(slot.ref.y, jax.random.fold_in(keys[3], 1))
    good = jnp.where(slot.distance >= FAR, -1, 3)
    # Weak noise takes one level, strong noise leaves one.
    label = jnp.where(spoiled, jnp.array([0, 2, 1])[kind], good)
    return slot._replace(ref=slot.ref._replace(frame=frame, y=y)), label


def _chosen(key, logits: jax.Array, temperature) -> jax.Array:
    """A level per row, 0..1: drawn, with the gradients of a softmax (Gumbel, straight-through)."""
    levels = jnp.arange(uni_lvc.RELIABILITIES) / (uni_lvc.RELIABILITIES - 1)
    drawn = logits + jax.random.gumbel(key, logits.shape)
    soft = jax.nn.softmax(drawn / temperature) @ levels
    return soft + lax.stop_gradient(levels[jnp.argmax(drawn, -1)] - soft)


def code_run(
    model: nn.Module,
    params: Any,
    run: Run,
    frames: jax.Array,
    qp: jax.Array,
    key: jax.Array | None,
    *,
    draws: jax.Array | None = None,
    spoil: float = 0.0,
    judge: bool = False,
    remat: bool = False,
    only_alone: bool = False,
    **options: Any,
) -> losses.CodedClip:
    """Codes the units of a run one after the other.

    Args:
      frames: float32 [batch, units, height, width, 3], Y, U, V, in coding order.
      qp: int32 [batch].
      key, options: of `nvc_jax.entropy.bottleneck.Estimate`.
      draws: key of the following two; without it there is neither.
      spoil: share of the references that are made worse.
      judge: whether the reliability classifier says how far references count; else fully.
      remat: whether activations are computed again for the gradients.
      only_alone: leave units with references out; all that they leave is 0.
    """
    batch, units = frames.shape[:2]

    def judged(params, frame, slots, row, key, run):
        """(slots with reliabilities, (sum of cross-entropies, how many) [batch])"""
        spoil_key, choice_key = jax.random.split(key)
        if spoil or judge:
            # Half of the time the same happens to both, as at a cut.
            same = jax.random.bernoulli(spoil_key)
            keys = [jax.random.fold_in(spoil_key, i * (1 - same)) for i in range(2)]
            slots, labels = zip(*map(partial(_spoiled, share=spoil), keys, slots), strict=True)
        if not judge:
            return slots, (jnp.zeros(batch), 0.0)
        logits = model.apply({"params": params}, frame[:, None], slots, row, method="reliability")
        chosen = _chosen(choice_key, logits, run.temperature)
        slots = tuple(
            slot._replace(reliability=slot.reliability * chosen[:, i])
            for i, slot in enumerate(slots)
        )
        labels = jnp.stack(labels, 1)
        known = run.there * (labels >= 0)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return slots, ((entropy * known).sum(1), known.sum(1))

    def code(params, frame, slots, qp, key):
        bottleneck = Estimate(key, **options)
        recon, (ref,) = model.apply({"params": params}, frame[:, None], slots, qp, bottleneck)
        return recon[:, 0], ref, bottleneck.bits, bottleneck.penalty

    if remat:
        code = jax.checkpoint(code)

    def everywhere(x):
        return jnp.broadcast_to(x, (batch,))

    shapes = jax.eval_shape(code, params, frames[:, 0], (), qp[:, None], key)[1]
    kept = jax.tree.map(lambda s: jnp.zeros((units, *s.shape), s.dtype), shapes)

    def step(kept, unit):
        number, frame, run = unit
        slots = tuple(
            uni_lvc.Slot(
                jax.tree.map(lambda x, i=i: x[run.refs[i]], kept),
                everywhere(run.role[i]),
                everywhere(run.distance[i]),
                everywhere(run.there[i]),
                everywhere(run.there[i] > 0),
            )
            for i in range(2)
        )
        row = jnp.minimum(qp + run.qp_offset, model.qp_rows - 1)[:, None]
        noise_key = None if key is None else jax.random.fold_in(key, number)
        misjudged = jnp.zeros(batch), 0.0
        if draws is not None:
            own = jax.random.fold_in(draws, number)
            slots, misjudged = judged(params, frame, slots, row, own, run)
        coded = partial(code, params, frame, slots, row, noise_key)
        if only_alone:
            coded = partial(lax.cond, run.there.sum() > 0, partial(_zeros_like, coded), coded)
        recon, ref, bits, penalty = coded()
        put = partial(lax.dynamic_update_index_in_dim, index=number, axis=0)
        bits, penalty, misjudged = jax.tree.map(everywhere, (bits, penalty, misjudged))
        return jax.tree.map(put, kept, ref), (recon, bits, penalty, misjudged)

    inputs = jnp.arange(units), frames.swapaxes(0, 1), run
    _, (recon, bits, penalty, misjudged) = lax.scan(step, kept, inputs)
    recon = recon.swapaxes(0, 1)
    distortion = losses.distortion(recon, frames) @ (run.weight * run.quality)
    share = run.weight / math.prod(recon.shape[2:4])
    bpp, penalty = jax.tree.map(lambda x: share @ x, (bits, penalty))
    misjudged, judged_at_all = (x.sum(0) for x in misjudged)
    misjudged /= jnp.maximum(judged_at_all, 1)
    return losses.CodedClip(bpp, distortion, recon, penalty, misjudged=misjudged)
