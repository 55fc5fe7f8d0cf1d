"""Optical flow: SpyNet (Ranjan and Black 2017, arXiv 1611.00850) as the DCVC family uses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import KERNEL_INIT, flax_convolution, precision_of
from nvc_jax.nn.warp import double, halve, warp

LEVELS = 4


def flow_error(module: nn.Module, target: jax.Array, moved: jax.Array) -> None:
    """Notes, for training, how far a picture after motion [b, h, w, 3] is from its target.

    The squared error [b] goes into the variable collection "losses"; nothing is computed where that
    is not asked for.
    """
    if module.is_mutable_collection("losses"):
        module.sow("losses", "flow_error", ((target - moved) ** 2).mean((1, 2, 3)))


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
    """

    widths: tuple[int, ...] = (32, 64, 32, 16)
    kernel: int = 7

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
            flow = flow + net(jnp.concatenate([a, moved, flow], -1))
            if self.is_mutable_collection("losses"):
                flow_error(self, a, warp(b, flow))
        return flow
