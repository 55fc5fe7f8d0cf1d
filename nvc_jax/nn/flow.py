"""Optical flow: SpyNet (Ranjan and Black 2017, arXiv 1611.00850) as the DCVC family uses it."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import KERNEL_INIT, flax_convolution, precision_of
from nvc_jax.nn.warp import double, halve, warp

LEVELS = 4


class MotionErrors(NamedTuple):
    """Squared errors [b] of a picture's reference: after motion, and as it is."""

    moved: jax.Array
    still: jax.Array


def motion_errors(target: jax.Array, still: jax.Array, moved: jax.Array) -> MotionErrors:
    """Of a picture and its reference before and after motion, [b, h, w, 3] each."""
    return MotionErrors(*(((target - x) ** 2).mean((1, 2, 3)) for x in (moved, still)))


def note_motion(module: nn.Module, target: jax.Array, still: jax.Array, moved: jax.Array) -> None:
    """Notes, for training, how far a reference [b, h, w, 3] is from its target, `MotionErrors`.

    They go into the variable collection "motion"; nothing is computed where that is not asked for.
    """
    if module.is_mutable_collection("motion"):
        module.sow("motion", "errors", motion_errors(target, still, moved))


def noted_motion(noted: dict) -> MotionErrors:
    """The mean of what was noted."""
    found = jax.tree.leaves(noted, is_leaf=lambda x: isinstance(x, MotionErrors))
    return jax.tree.map(lambda *errors: sum(errors) / len(errors), *found)


class FlowLevel(nn.Module):
    """Correction of a flow: five large convolutions, ReLU in between."""

    widths: tuple[int, ...]
    kernel: int

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate((*self.widths, 2)):
            x = nn.Conv(
                features,
                (self.kernel, self.kernel),
                padding=self.kernel // 2,
                precision=precision_of(x.dtype),
                kernel_init=KERNEL_INIT,
                conv_general_dilated=flax_convolution,
                name=f"conv{i}",
            )(nn.relu(x) if i else x)
        return x


class SpyNet(nn.Module):
    """Flow between two pictures, from an eighth of their size to all of it.

    `__call__(a, b)`: float32 [batch, height, width, 3] each, sides multiples of 8 -> [batch,
    height, width, 2]: where in `b` each pixel of `a` is found, see `nvc_jax.nn.warp`.

    `contrast` (our addition): the networks see pictures less their mean, times this, as flows of
    several pixels are out of reach for long if they have to come from differences of some
    hundredths. 0: as they are, as published.
    """

    widths: tuple[int, ...] = (32, 64, 32, 16)
    kernel: int = 7
    contrast: float = 0.0

    @nn.compact
    def __call__(self, a, b):
        pyramid = [(a, b)]
        for _ in range(LEVELS - 1):
            pyramid.append(tuple(halve(x) for x in pyramid[-1]))
        flow = None
        for level, (a, b) in enumerate(reversed(pyramid)):
            if flow is None:
                flow, moved = jnp.zeros((*a.shape[:3], 2)), b
            else:
                flow = 2 * double(flow)
                moved = warp(b, flow)
            net = FlowLevel(self.widths, self.kernel, name=f"level{level}")
            seen = a, moved
            if self.contrast:
                mean = a.mean((1, 2), keepdims=True)
                seen = tuple(self.contrast * (x - mean) for x in seen)
            flow = flow + net(jnp.concatenate([*seen, flow], -1))
        return flow
