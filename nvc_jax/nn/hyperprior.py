"""The entropy model's networks: hyper-latent, parameters, factorised prior.

All of it runs in float32 (see `nvc_jax.nn.blocks`), because its output decides which integer
probability table the coder uses, unless a model has integer scales (`nvc_jax.nn.integer`). Source:
DCVC-RT (arXiv 2502.20762); the hyperprior idea is Ballé et al. 2018 (arXiv 1802.01436).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import KERNEL_INIT, Blocks, DepthConvBlock, Down, Pointwise, Up


def latent_shapes(batch: int, h: int, w: int, y: int, z: int) -> tuple:
    """Of a latent [b, h, w, y], and of its hyper-latent, for which sides are padded."""
    return (
        jax.ShapeDtypeStruct((batch, h, w, y), jnp.float32),
        jax.ShapeDtypeStruct((batch, -(-h // 4), -(-w // 4), z), jnp.float32),
    )


class HyperEncoder(nn.Module):
    """Latent y [b, h, w, y] -> hyper-latent z [b, h/4, w/4, z], h and w multiples of 4."""

    features: int
    form: str = "rt"

    @nn.compact
    def __call__(self, y):
        x = DepthConvBlock(self.features, self.form, name="block")(y)
        x = Down(self.features, self.form, name="down0")(x)
        return Down(self.features, self.form, name="down1")(x)


class HyperDecoder(nn.Module):
    """Hyper-latent z [b, h, w, z] -> parameters [b, 4h, 4w, features]."""

    features: int
    form: str = "rt"

    @nn.compact
    def __call__(self, z):
        x = Up(z.shape[-1], self.form, name="up0")(z)
        x = Up(z.shape[-1], self.form, name="up1")(x)
        return DepthConvBlock(self.features, self.form, name="block")(x)


class ParameterNet(nn.Module):
    """`depth` blocks of `width` channels and a layer that gives [b, h, w, features] parameters."""

    features: int
    width: int
    depth: int
    form: str = "rt"
    bias_init: Callable = nn.initializers.zeros
    kernel_init: Callable = KERNEL_INIT  # of the last layer

    @nn.compact
    def __call__(self, x):
        x = Blocks(self.width, self.depth, self.form, name="blocks")(x)
        last = Pointwise(
            self.features, kernel_init=self.kernel_init, bias_init=self.bias_init, name="params"
        )
        return last(x)


def leading_ones(count: int):
    """Bias that starts the first `count` channels (step sizes, scales) at 1, the means at 0."""

    def init(key, shape, dtype=jnp.float32):
        del key
        return jnp.zeros(shape, dtype).at[:count].set(1.0)

    return init


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Replicate-pads height and width of [b, h, w, c] at the bottom and right."""
    h, w = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")


class FactorizedPrior(nn.Module):
    """Learned cumulative distribution of z, one per quality point and channel.

    Eleven numbers per distribution make a monotone function of four layers (Ballé et al. 2018 in
    the scalar form of DCVC-RT). `__call__(qp)`: int [batch] -> [batch, channels, 11].

    `steepness` is that of the start, of all channels or of each: 0 is wide, at 1.3 a 0 costs 0.15
    bits. A row only learns when its quality is drawn, so what most symbols are should not have to
    be learnt row by row.
    """

    rows: int
    channels: int
    steepness: float | tuple[float, ...] = 0.0

    @nn.compact
    def __call__(self, qp):
        def init(key, shape):
            steepness = jnp.asarray(self.steepness)[..., None]
            return nn.initializers.normal(0.01)(key, shape).at[..., :4].add(steepness)

        return self.param("chain", init, (self.rows, self.channels, 11))[qp]


def factorized_logits(chain: jax.Array, x: jax.Array) -> jax.Array:
    """Logit of P(z <= x). chain [..., 11] broadcasts against x [...]."""
    h, b, a = chain[..., 0:4], chain[..., 4:8], chain[..., 8:11]
    for i in range(4):
        x = x * jax.nn.softplus(h[..., i]) + b[..., i]
        if i < 3:
            x = x + jnp.tanh(x) * jnp.tanh(a[..., i])
    return x
