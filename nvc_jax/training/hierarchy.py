"""Training of B-frames: paths through a hierarchy instead of whole groups.

In a hierarchy both references of a frame are anchors or frames of its own line of ancestors. To
train the frame as it will be coded, only these few need to be coded before it, with gradients
through all of them ("path sampling", ours; the training of BRHVC, arXiv 2511.08938, is not
published). Every layer has twice as many frames as the one above it, while a path has one of each;
so the loss of each unit counts twice as much as that of the one before. Where a path has as many
units as its group has layers, that is the loss of the whole group, but for the draw.

Anchors are intra frames here, also where a schedule would predict them.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax import colour, schedule
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.models.brhvc import Between, Ref
from nvc_jax.nn.flow import noted_motion
from nvc_jax.training import losses

ANCHORS = 2  # intra frames that a path starts from


class Path(NamedTuple):
    """What a step codes, the same for all samples of its batch. Slots: the anchors, then the units.

    Attributes:
      refs: int32 [units, 2], slots of the past and the future reference.
      layer: int32 [units], of the hierarchy.
      ratio: float32 [units], see `nvc_jax.models.brhvc.Between`.
      weight: float32 [units], how many frames of a group a unit stands for; 1 on average.
    """

    refs: np.ndarray
    layer: np.ndarray
    ratio: np.ndarray
    weight: np.ndarray


def way_down(
    rng: np.random.Generator, low: tuple[int, int], high: tuple[int, int], slot: int
) -> Iterator[tuple[schedule.Unit, tuple[int, int], tuple[int, int]]]:
    """Frames in the middle of what is left of an interval, of which either half is left. Endless.

    Args:
      low, high: (display position, slot) of the interval's ends.
      slot: of the first frame; the others follow.

    Yields:
      (unit, low, high) for every frame.
    """
    for here in count(slot):
        unit = schedule.between(low[0], high[0])
        yield unit, low, high
        middle = unit.frames[0], here
        low, high = (low, middle) if rng.random() < 0.5 else (middle, high)


def draw_path(
    rng: np.random.Generator, units: int, spans: tuple[int, ...], tail_share: float
) -> tuple[list[int], Path]:
    """A way down a random group, from its anchors to a random frame, or as far as `units` go.

    Args:
      units: coded one after the other.
      spans: distances of the anchors to draw from, each at least 2^units.
      tail_share: of paths whose first unit lies behind both of its references, as frames after
        the last anchor of a clip do.

    Returns:
      (display positions of the two anchors and of the units, in 0..max(spans); the path).
    """
    span = int(rng.choice(spans))
    planned, refs = [], []
    if rng.random() < tail_share:
        # Behind one anchor, read twice, or behind two of which one is older.
        last = 0 if rng.random() < 0.5 else span // 2
        anchors = (last, 0)
        planned.append(schedule.predicted(*anchors, span))
        refs.append((0, 1 if last else 0))
        low, high = (last, 0), (span, ANCHORS)  # (position, slot)
    else:
        anchors = (0, span)
        low, high = (0, 0), (span, 1)
    below = way_down(rng, low, high, ANCHORS + len(planned))
    for unit, past, future in islice(below, units - len(planned)):
        planned.append(unit)
        refs.append((past[1], future[1]))
    weight = 2.0 ** np.arange(units)
    return [*anchors, *(unit.frames[0] for unit in planned)], Path(
        np.array(refs, np.int32),
        np.array([unit.layer for unit in planned], np.int32),
        np.array([unit.ratio for unit in planned], np.float32),
        np.float32(weight / weight.mean()),
    )


def code_path(
    model: nn.Module,
    params: Any,
    path: Path,
    layer_weights: tuple[float, ...],
    frames: jax.Array,
    anchors: jax.Array,
    qp: jax.Array,
    key: jax.Array | None,
    *,
    remat: bool = False,
    **options: Any,
) -> losses.CodedClip:
    """Codes the units of a path one after the other.

    Args:
      layer_weights: on the distortion, by layer of the hierarchy.
      frames: float32 [batch, units, height, width, 3], Y, U, V, in coding order.
      anchors: [batch, 2, height, width, 3], decoded intra frames in the codec's colours.
      qp: int32 [batch].
      key, options: of `nvc_jax.entropy.bottleneck.Estimate`.
      remat: whether activations are computed again for the gradients.
    """
    pictures = colour.for_codec(model, frames)

    def code(frame, refs, key):
        bottleneck = Estimate(key, **options)
        (recon, (ref,)), noted = model.apply(
            {"params": params}, frame[:, None], refs, qp[:, None], bottleneck, mutable=["motion"]
        )
        recon = colour.from_codec(model, recon[:, 0])
        return ref, (recon, bottleneck.bits, bottleneck.penalty, noted_motion(noted))

    recon, bits, penalty, motion = _along(path, code, pictures, anchors, key, remat)
    recon = recon.swapaxes(0, 1)
    layers = jnp.asarray(layer_weights)[jnp.clip(path.layer, 0, len(layer_weights) - 1)]
    distortion = losses.distortion(recon, frames) @ (path.weight * layers)
    share = path.weight / math.prod(recon.shape[2:4])
    bpp, penalty = jax.tree.map(lambda x: share @ x, (bits, penalty))
    motion = jax.tree.map(lambda x: x.mean(0), motion)
    return losses.CodedClip(bpp, distortion, recon, penalty, motion=motion)


def _along(path, code, pictures, anchors, key, remat):
    """`code(frame, Between, key) -> (Ref, outputs)` of all units in turn -> outputs [units, ...].

    The units share one program, in which a gather finds their references: so it is compiled once,
    however long the path. Outputs that are one number for all samples become [units, batch].
    """
    batch, units = pictures.shape[:2]
    if remat:
        code = jax.checkpoint(code)

    def blank(shape):
        return jnp.zeros((ANCHORS + units, *shape.shape), shape.dtype)

    start = Between(Ref(anchors[:, 0]), Ref(anchors[:, 1]), path.layer[0], path.ratio[0])
    shapes = jax.eval_shape(code, pictures[:, 0], start, key)[0]
    slots = jax.tree.map(blank, shapes)
    slots = slots._replace(
        frame=slots.frame.at[:ANCHORS].set(anchors.swapaxes(0, 1)),
        bare=jnp.arange(ANCHORS + units) < ANCHORS,
    )

    def step(slots, unit):
        number, frame, refs, layer, ratio = unit
        take = partial(lax.dynamic_index_in_dim, keepdims=False)
        past, future = (jax.tree.map(partial(take, index=slot), slots) for slot in refs)
        noise_key = None if key is None else jax.random.fold_in(key, number)
        ref, outputs = code(frame, Between(past, future, layer, ratio), noise_key)
        ref = ref._replace(bare=jnp.bool_(False))
        put = partial(lax.dynamic_update_index_in_dim, index=ANCHORS + number, axis=0)
        slots = jax.tree.map(put, slots, ref)
        return slots, jax.tree.map(
            lambda x: x if jnp.ndim(x) else jnp.broadcast_to(x, (batch,)), outputs
        )

    inputs = jnp.arange(units), pictures.swapaxes(0, 1), path.refs, path.layer, path.ratio
    return lax.scan(step, slots, inputs)[1]
