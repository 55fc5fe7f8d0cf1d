"""Blocks of the DCVC-DC generation: dense 3x3 residual blocks, depth-wise blocks, a small U-Net,
quality factors and the spatial prior.

Source: DCVC-DC (arXiv 2302.14402) and its released code; BRHVC (arXiv 2511.08938) is built of them.
NHWC, float32 parameters, compute in `dtype` as in `nvc_jax.nn.blocks`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import (
    Conv3x3,
    Depthwise,
    Pointwise,
    depth_to_space,
    quality_ramp,
    space_to_depth,
)
from nvc_jax.nn.spatial_prior import code_in_steps, split_params
from nvc_jax.quality import MAX_QP

Dtype = Any
STEPS = 4  # of the spatial prior


def leaky(x: jax.Array, slope: float = 0.01) -> jax.Array:
    """Leaky ReLU."""
    return jnp.where(x >= 0, x, slope * x)


class Subpixel(nn.Module):
    """Doubles height and width: a 1x1 or 3x3 convolution to four sub-pixels."""

    features: int
    kernel: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        conv = Conv3x3 if self.kernel == 3 else Pointwise
        return depth_to_space(conv(4 * self.features, dtype=self.dtype, name="subpixel")(x), 2)


class ResBlock(nn.Module):
    """x + end(conv(act(conv(act(x))))), as wide as x; `bottleneck` halves the inner width."""

    slope: float = 0.01
    bottleneck: bool = False
    end: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        act = partial(leaky, slope=self.slope)
        y = Conv3x3(c // 2 if self.bottleneck else c, dtype=self.dtype, name="conv0")(act(x))
        y = Conv3x3(c, dtype=self.dtype, name="conv1")(act(y))
        return x + (act(y) if self.end else y)


class ResDown(nn.Module):
    """Residual block that halves height and width."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = leaky(Conv3x3(self.features, 2, self.dtype, name="conv0")(x))
        y = leaky(Conv3x3(self.features, dtype=self.dtype, name="conv1")(y), 0.1)
        return y + Pointwise(self.features, self.dtype, name="skip")(x[:, ::2, ::2])


class ResUp(nn.Module):
    """Residual block that doubles height and width."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = leaky(Subpixel(self.features, 1, self.dtype, name="up")(x))
        y = leaky(Conv3x3(self.features, dtype=self.dtype, name="conv")(y), 0.1)
        return y + Subpixel(self.features, 1, self.dtype, name="skip")(x)


class DepthConv(nn.Module):
    """1x1, 3x3 depth-wise and 1x1 convolution beside a skip connection.

    With stride 2 the first convolution takes every other pixel, the skip connection all of them.
    """

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        i, o, s = x.shape[-1], self.features, self.stride
        y = leaky(Pointwise(i, self.dtype, name="point_in")(x[:, ::s, ::s]))
        y = Pointwise(o, self.dtype, name="point_out")(Depthwise(self.dtype, name="depth")(y))
        if s == 2:
            x = Pointwise(o, self.dtype, name="patch")(space_to_depth(x, 2))
        elif i != o:
            x = Pointwise(o, self.dtype, name="adaptor")(x)
        return x + y


class FeedForward(nn.Module):
    """Two 1x1 convolutions beside a skip connection; `gated`: halves multiplied in between."""

    gated: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        dense = partial(Pointwise, dtype=self.dtype)
        if self.gated:
            value, gate = jnp.split(dense(4 * c, name="expand")(x), 2, axis=-1)
            return x + dense(c, name="project")(value * leaky(gate, 0.1))
        y = leaky(dense(max(min(4 * c, 1024), 2 * c), name="expand")(x), 0.1)
        return x + leaky(dense(c, name="project")(y), 0.1)


class DepthBlock(nn.Module):
    """`DepthConv`, then `FeedForward`: [b, h, w, i] -> [b, h/stride, w/stride, features]."""

    features: int
    stride: int = 1
    gated: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = DepthConv(self.features, self.stride, self.dtype, name="mix")(x)
        return FeedForward(self.gated, self.dtype, name="ffn")(x)


class UNet(nn.Module):
    """Refines [b, h, w, c], sides multiples of 4, with a view of two coarser scales."""

    widths: tuple[int, int, int] = (32, 64, 128)
    depth: int = 4
    gated: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        block = partial(DepthBlock, gated=self.gated, dtype=self.dtype)
        up = partial(Subpixel, kernel=1, dtype=self.dtype)
        pool = lambda x: nn.max_pool(x, (2, 2), (2, 2))  # noqa: E731
        fine, middle, coarse = self.widths
        a = block(fine, name="down0")(x)
        b = block(middle, name="down1")(pool(a))
        c = block(coarse, name="down2")(pool(b))
        for i in range(self.depth):
            c = block(coarse, name=f"block{i}")(c)
        c = up(middle, name="subpixel1")(c)
        b = block(middle, name="up1")(jnp.concatenate([b, c], -1))
        b = up(fine, name="subpixel0")(b)
        return block(x.shape[-1], name="up0")(jnp.concatenate([a, b], -1))


class RateScale(nn.Module):
    """Channel-wise factors of a quality: a basic vector times a number per rate point.

    Four numbers are trained; the 64 quality points lie between the first and the last of them,
    evenly in the logarithm. Untrained, they are `quality_ramp` to the power of `start`.
    `__call__(qp)`: int [b] -> [b, 1, 1, channels].
    """

    channels: int
    start: float = 0.0

    @nn.compact
    def __call__(self, qp):
        basic = self.param("basic", nn.initializers.ones, (self.channels,))
        anchors = self.param(
            "anchors", lambda key, shape: quality_ramp(jnp.arange(0, 64, 21.0)) ** self.start, (4,)
        )
        low, high = jnp.log(jnp.maximum(anchors[0], 1e-4)), jnp.log(jnp.maximum(anchors[3], 1e-4))
        factor = jnp.exp(low + (high - low) * qp / MAX_QP)
        return basic * factor[:, None, None, None]


class LatentPrior(nn.Module):
    """Codes a latent in four steps, each with its own adaptor before a shared network.

    `family`: of the distributions, "gaussian" or "laplace". `__call__(y, params, bottleneck)`:
    y [b, h, w, c] (ignored when decoding); params [b, h, w, 3c] are step sizes, scales and means.
    Returns y_hat.
    """

    features: int
    widths: tuple[int, ...]
    family: str
    gated: bool = False

    @nn.compact
    def __call__(self, y, params, bottleneck):
        c = self.features
        adaptors = [Pointwise(3 * c, name=f"adaptor{i}") for i in range(1, STEPS)]
        blocks = [
            DepthBlock(width, gated=self.gated, name=f"block{i}")
            for i, width in enumerate((*self.widths, 2 * c))
        ]
        step_size, scale, mean = split_params(params)

        def predict(step, y_hat):
            if step == 0:
                return mean, scale
            x = adaptors[step - 1](jnp.concatenate([y_hat, params], -1))
            for block in blocks:
                x = block(x)
            return jnp.split(x, 2, -1)[::-1]

        y_hat, _, _ = code_in_steps(y / step_size, STEPS, predict, bottleneck, family=self.family)
        return y_hat * step_size
