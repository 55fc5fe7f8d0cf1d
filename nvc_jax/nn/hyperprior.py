"""The entropy model's networks: hyper-latent, spatial prior's masks, factorised prior.

All of it runs in float32 (see `nvc_jax.nn.blocks`), because its output decides which integer
probability table the coder uses, unless a model has integer scales (`nvc_jax.nn.integer`). Source:
DCVC-RT (arXiv 2502.20762); the hyperprior idea is Ballé et al. 2018 (arXiv 1802.01436).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax.nn.blocks import Blocks, DepthConvBlock, Down, Pointwise, Up


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

    @nn.compact
    def __call__(self, x):
        x = Blocks(self.width, self.depth, self.form, name="blocks")(x)
        return Pointwise(self.features, bias_init=self.bias_init, name="params")(x)


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Replicate-pads height and width of [b, h, w, c] at the bottom and right."""
    h, w = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")


class FactorizedPrior(nn.Module):
    """Learned cumulative distribution of z, one per quality point and channel.

    Eleven numbers per distribution make a monotone function of four layers (Ballé et al. 2018 in
    the scalar form of DCVC-RT). `__call__(qp)`: int [batch] -> [batch, channels, 11].
    """

    rows: int
    channels: int

    @nn.compact
    def __call__(self, qp):
        return self.param("chain", nn.initializers.normal(0.01), (self.rows, self.channels, 11))[qp]


def factorized_logits(chain: jax.Array, x: jax.Array) -> jax.Array:
    """Logit of P(z <= x). chain [..., 11] broadcasts against x [...]."""
    h, b, a = chain[..., 0:4], chain[..., 4:8], chain[..., 8:11]
    for i in range(4):
        x = x * jax.nn.softplus(h[..., i]) + b[..., i]
        if i < 3:
            x = x + jnp.tanh(x) * jnp.tanh(a[..., i])
    return x


def step_groups(height: int, width: int, steps: int) -> Callable[[int], jax.Array]:
    """Which channel group is coded where, in each step of a two- or four-step spatial prior.

    The channels are cut into `steps` groups. At every position each step codes one group, so that
    after all steps everything is coded once and every step sees neighbours of all groups. With the
    phase p of a position (its parity for two steps; 2*(row%2) + column%2 for four), step s codes
    group p XOR c(s), c = 0, 1 or 0, 3, 2, 1: the tables of DCVC-RT in one line.

    Returns:
      A function step -> int32 [height, width] of group numbers.
    """
    rows, cols = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    if steps == 2:
        phase, code = (rows + cols) % 2, (0, 1)
    else:
        phase, code = 2 * (rows % 2) + cols % 2, (0, 3, 2, 1)
    return lambda step: phase ^ code[step]


def pack_step(x: jax.Array, group: jax.Array, steps: int) -> jax.Array:
    """Keeps the active group of every position: [b, h, w, c] -> [b, h, w, c/steps]."""
    parts = jnp.split(x, steps, axis=-1)
    out = parts[0]
    for g in range(1, steps):
        out = jnp.where((group == g)[..., None], parts[g], out)
    return out


def unpack_step(x: jax.Array, group: jax.Array, steps: int) -> jax.Array:
    """Puts a packed step back in place, zeros elsewhere: [b, h, w, c/steps] -> [b, h, w, c]."""
    return jnp.concatenate(
        [jnp.where((group == g)[..., None], x, 0) for g in range(steps)], axis=-1
    )


def code_in_steps(
    y,
    steps: int,
    predict: Callable,
    bottleneck,
    levels: Callable | None = None,
    family: str = "gaussian",
):
    """Codes a latent group by group, each step knowing what the ones before decoded to.

    Args:
      y: float32 [b, h, w, c]; ignored when decoding.
      predict: (step, y_hat so far) -> (mean, scale), both [b, h, w, c].
      bottleneck: see `nvc_jax.entropy.bottleneck`.
      levels: (step, symbols so far) -> scale levels [b, h, w, c], which replace the scales.
      family: of the distributions, "gaussian" or "laplace".

    Returns:
      (y_hat, symbols, levels), all [b, h, w, c]; levels are None if none were given.
    """
    group = step_groups(*y.shape[1:3], steps)
    y_hat = symbols = jnp.zeros_like(y)
    level_map = None
    for s in range(steps):
        mean, scale = (pack_step(p, group(s), steps) for p in predict(s, y_hat))
        residual = pack_step(y, group(s), steps) - mean
        if levels is None:
            coded = getattr(bottleneck, family)(residual, scale)
        else:
            level = pack_step(levels(s, symbols), group(s), steps)
            coded = bottleneck.leveled(residual, level, scale)
            placed = unpack_step(level, group(s), steps)
            level_map = placed if level_map is None else level_map + placed
        symbols = symbols + unpack_step(coded, group(s), steps)
        y_hat = y_hat + unpack_step(coded + mean, group(s), steps)
    return y_hat, symbols, level_map
