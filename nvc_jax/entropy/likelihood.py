"""Probabilities of quantised latents, for rate estimates with gradients.

Sources: Ballé et al. 2017 (arXiv 1611.01704) for noise as the stand-in of rounding and the lower
bound's gradient rule; models and bounds as in DCVC-RT/UF.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlogy

from nvc_jax.nn.hyperprior import factorized_logits

SCALE_MIN = 0.11
SCALE_MAX = 32.0
LAPLACE_SCALE_MIN = 0.01
SPARSE = 0.55  # scale of a "sparse" distribution as a Laplace's
LEVELS = 64  # log-spaced from SCALE_MIN to SCALE_MAX
SKIP_SCALE = 0.15  # levels that end below this are not coded
LEVEL_STEP = math.log(SCALE_MAX / SCALE_MIN) / (LEVELS - 1)
# At most 29.9 bits, as in DCVC-RT/UF. The coder's escape, which such values go through, costs about
# 31: on the few symbols that reach this bound, rate estimates are that much too low.
PROBABILITY_MIN = 1e-9
PUBLISHED_MIN = 1e-5  # of scales, and added to probabilities, where the DCVC family counts bits


@jax.custom_vjp
def lower_bound(x: jax.Array, bound: float) -> jax.Array:
    """max(x, bound); a gradient that would lift x back over the bound still passes."""
    return jnp.maximum(x, bound)


lower_bound.defvjp(
    lambda x, bound: (jnp.maximum(x, bound), (x, bound)),
    lambda res, g: (jnp.where((res[0] >= res[1]) | (g < 0), g, 0), None),
)


def round_straight_through(x: jax.Array) -> jax.Array:
    """round(x) (half to even) whose gradient is that of x."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def level_of_scale(scale: jax.Array, low: float = SCALE_MIN, step: float = LEVEL_STEP) -> jax.Array:
    """Which level a scale has, a real number: from one to the next are `step` in the logarithm."""
    return jnp.log(jnp.maximum(scale, 1e-6) / low) / step


def dead_zone(
    residual: jax.Array, scale: jax.Array, strength: jax.Array, family: str = "gaussian"
) -> jax.Array:
    """Moves residuals towards 0, so that rounding them weighs rate against distortion.

    A symbol of 1 costs more bits than one of 0, and the more so, the smaller the scale. Rounding at
    one half ignores that; rate-distortion optimised quantisation rounds up only what repays the
    bits. With a squared error of d quantiser steps worth a d bits, the best threshold for an
    isolated symbol lies (difference in bits) / (2 a) above one half. An encoder's choice: decoders
    know nothing of it.

    Args:
      residual: float32 [...], in quantiser steps.
      scale: float32 [...], of its distribution.
      strength: [...], 1 / (2 a). Gradients flow to it, and to the residual as if nothing was done.
      family: of the distribution, see `BITS`.
    """
    scale = jnp.maximum(scale, SCALE_MIN)
    bits = BITS[family](jnp.ones_like(scale), scale) - BITS[family](jnp.zeros_like(scale), scale)
    magnitude, sign, bits = lax.stop_gradient((jnp.abs(residual), jnp.sign(residual), bits))
    return residual - sign * jnp.minimum(magnitude, bits * strength)


def scale_of_level(level: jax.Array) -> jax.Array:
    """The scale that stands for a level: the middle, in the logarithm, of those that it covers."""
    return SCALE_MIN * jnp.exp(LEVEL_STEP * (level + 0.5))


def _bits(probability: jax.Array, as_published: bool) -> jax.Array:
    probability = lower_bound(probability, PROBABILITY_MIN)
    if as_published:
        return jnp.maximum(-jnp.log2(probability + PUBLISHED_MIN), 0)
    return -jnp.log2(probability)


def gaussian_bits(value: jax.Array, scale: jax.Array, as_published: bool = False) -> jax.Array:
    """Bits of values in unit intervals under N(0, scale): -log2(P(value - 1/2 < X < value + 1/2)).

    Args:
      value: float32 [...], symbols or noisy stand-ins.
      scale: float32 [...], raw network output; bounded below by 0.11.
      as_published: count as the DCVC family reports its estimates: scales are bounded by 1e-5 only,
        and probabilities have 1e-5 added, so that no symbol counts more than 16.6 bits.
    """
    scale = lower_bound(scale, PUBLISHED_MIN if as_published else SCALE_MIN)
    # Both arguments on the negative side, where the cumulative distribution keeps its precision.
    magnitude = jnp.abs(value)
    factor = 1.0 / (scale * jnp.sqrt(2.0))
    upper = jax.scipy.special.erfc((magnitude - 0.5) * factor)
    lower = jax.scipy.special.erfc((magnitude + 0.5) * factor)
    return _bits(0.5 * (upper - lower), as_published)


def laplace_bits(value: jax.Array, scale: jax.Array, as_published: bool = False) -> jax.Array:
    """As `gaussian_bits`, under exp(-|x| / scale) / (2 scale), for scales of 0.01 or more."""
    scale = lower_bound(scale, PUBLISHED_MIN if as_published else LAPLACE_SCALE_MIN)
    magnitude = jnp.abs(value)
    far, near = (magnitude + 0.5) / scale, (magnitude - 0.5) / scale
    # In the middle interval `near` is negative, and what lies beyond either end is missing.
    middle = 1 - 0.5 * (jnp.exp(-far) + jnp.exp(jnp.minimum(near, 0)))
    beside = 0.5 * (jnp.exp(-jnp.maximum(near, 0)) - jnp.exp(-far))
    return _bits(jnp.where(near < 0, middle, beside), as_published)


def sparse_bits(value: jax.Array, scale: jax.Array, as_published: bool = False) -> jax.Array:
    """As `laplace_bits` at `SPARSE` times the scale.

    For latents that are nearly all 0 behind a dead zone, such as transform coefficients: the levels
    of scales reach down to where one symbol of 1,400 is not 0, and large ones are not as dear as
    under a Gaussian (Lam and Goodman 2000 on why transform coefficients are Laplacian).
    """
    return laplace_bits(value, SPARSE * scale, as_published)


BITS = {"gaussian": gaussian_bits, "laplace": laplace_bits, "sparse": sparse_bits}


def factorized_bits(value: jax.Array, chain: jax.Array) -> jax.Array:
    """Bits of hyper-latents [b, h, w, c] under their learned prior, chain [b, c, 11]."""
    chain = chain[:, None, None]
    upper = factorized_logits(chain, value + 0.5)
    lower = factorized_logits(chain, value - 0.5)
    sign = jax.lax.stop_gradient(-jnp.sign(upper + lower))
    probability = jnp.abs(jax.nn.sigmoid(sign * upper) - jax.nn.sigmoid(sign * lower))
    return -jnp.log2(lower_bound(probability, PROBABILITY_MIN))


def list_bits(scale: jax.Array, margin: float) -> jax.Array:
    """Side information of the calibrated mode, an estimate: [batch, ...] -> bits, [batch].

    As many as it takes at least to say which of the coded elements have a level less than `margin`
    from the next one (arXiv 2309.11276, `nvc_jax.entropy.calibration`). Without gradients.
    """
    level = level_of_scale(lax.stop_gradient(scale))
    near = jnp.abs(level - jnp.round(level)) < margin
    first = math.floor(math.log(SKIP_SCALE / SCALE_MIN) / LEVEL_STEP)
    listed = near & (level > first - 0.5) & (level < LEVELS - 0.5)
    share = listed.reshape(len(scale), -1).mean(1)
    count = scale.size // len(scale)
    entropy = -(xlogy(share, share) + xlogy(1 - share, 1 - share)) / math.log(2)
    return count * entropy
