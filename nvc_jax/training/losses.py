"""Rate-distortion loss of DCVC-UF (arXiv 2606.04410), loss of motion, constraint on scales.

Pictures are in [0, 1]: planes Y, U, V at 4:4:4 but where another colour space is named.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from nvc_jax.entropy.likelihood import LEVELS, SCALE_MAX, SCALE_MIN, SKIP_SCALE, level_of_scale
from nvc_jax.nn.flow import MotionErrors
from nvc_jax.nn.warp import halve, warp
from nvc_jax.quality import d_yuv

VISIBLE = 0.02  # differences below cost next to nothing, see `visible`


class CodedClip(NamedTuple):
    """What a codec makes of a clip, a path or a run of units.

    Attributes:
      bpp: of "z", "y", "y_float", "side" (see `nvc_jax.entropy.bottleneck.Estimate`), [batch], bits
        per pixel of one frame, weighted sums over units.
      distortion: [batch], weighted sum over frames.
      recon: [batch, frames, height, width, 3], Y, U, V.
      penalty: [batch], of the scales, per pixel of one frame, weighted sum over units.
      refs: what the next unit would refer to; () where nothing follows.
      motion: of references, [batch] each, means over units; None for codecs without motion.
      misjudged: [batch], cross-entropy of the reliability classifier, mean over the references of
        which it is known how far they are to be trusted; 0 if there were none.
    """

    bpp: dict[str, jax.Array]
    distortion: jax.Array
    recon: jax.Array
    penalty: jax.Array
    refs: tuple = ()
    motion: MotionErrors | None = None
    misjudged: jax.Array | float = 0.0


def yuv_to_rgb(yuv: jax.Array) -> jax.Array:
    """BT.709 full range, without clipping. [..., 3] -> [..., 3]."""
    y, u, v = jnp.moveaxis(yuv, -1, 0)
    red = y + 2 * (1 - 0.2126) * (v - 0.5)
    blue = y + 2 * (1 - 0.0722) * (u - 0.5)
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    return jnp.stack([red, green, blue], axis=-1)


def distortion(recon: jax.Array, target: jax.Array) -> jax.Array:
    """0.8 D_yuv + 0.2 D_rgb per picture, [..., h, w, 3] -> [...].

    D_yuv: `nvc_jax.quality.d_yuv`; D_rgb is the sum of the squared errors of R, G and B.
    """
    planes = jnp.mean((recon - target) ** 2, axis=(-3, -2))
    rgb = jnp.mean((yuv_to_rgb(recon) - yuv_to_rgb(target)) ** 2, axis=(-3, -2))
    return 0.8 * d_yuv(planes, jnp) + 0.2 * rgb.sum(-1)


def psnr(recon: jax.Array, target: jax.Array) -> jax.Array:
    """Per plane, dB: [..., h, w, 3] -> [..., 3]; clipped pictures, peak 1."""
    mse = jnp.mean((jnp.clip(recon, 0, 1) - target) ** 2, axis=(-3, -2))
    return -10 * jnp.log10(jnp.maximum(mse, 1e-10))


def visible(difference: jax.Array) -> jax.Array:
    """What is wrong with a prediction, difference [b, h, w, 3] in any colours -> [b].

    It grows as the bits that the difference would take: where that is large, and as a rule beyond
    repair, being less wrong counts little, so that what can be found decides; in squares of
    differences just that would count most.
    """
    return jnp.log1p((difference / VISIBLE) ** 2).mean((1, 2, 3)) / 2


def motion(target: jax.Array, reference: jax.Array, flow: jax.Array) -> jax.Array:
    """How badly a reference fits after motion.

    Also at a half and a quarter of the size, where motion is found before details are.

    Args:
      target, reference: [b, h, w, 3] in any colours, sides multiples of 4.
      flow: [b, h, w, 2] in pixels, see `nvc_jax.nn.warp`.

    Returns:
      [b], see `visible`.
    """
    total = visible(target - warp(reference, flow))
    for weight in (0.5, 0.25):
        target, reference, flow = halve(target), halve(reference), halve(flow) / 2
        total += weight * visible(target - warp(reference, flow))
    return total


def scale_penalty(config: ml_collections.ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """Piecewise Gaussian constraint: keeps scales away from the boundaries of their levels.

    Source: Tian et al. (arXiv 2309.11276). With d the distance of the real-valued level from the
    middle of its interval, so that boundaries have d = 1/2: 0 where d < eta, else (G(0) - G(d))^2
    with G a Gaussian density around 1/2 of width delta. The printed delta of 1 makes it nearly flat
    there; 0.1 or the hinge have a slope. Levels so low that they are never coded are left alone.

    Args:
      config: `variant` "gaussian" or "hinge" ((d - eta)^2), `eta`, `delta`; `beta` is its weight;
        `levels`, `scale_min`, `scale_max`, `skip_scale` of the tables, by default a release's.

    Returns:
      An elementwise function of float scales.
    """
    levels, low = config.get("levels", LEVELS), config.get("scale_min", SCALE_MIN)
    step = math.log(config.get("scale_max", SCALE_MAX) / low) / (levels - 1)
    # The boundary above which elements are coded counts too.
    first = math.floor(math.log(config.get("skip_scale", SKIP_SCALE) / low) / step) - 0.5

    def density(d):
        width = config.delta
        return jnp.exp(-0.5 * ((d - 0.5) / width) ** 2) / (width * math.sqrt(2 * math.pi))

    def penalty(scale):
        level = level_of_scale(scale, low, step)
        d = jnp.abs(level - jnp.floor(level) - 0.5)
        if config.variant == "hinge":
            value = (d - config.eta) ** 2
        else:
            value = (density(0.0) - density(d)) ** 2
        active = (d >= config.eta) & (level >= max(first, config.eta)) & (level < levels - 1)
        return jnp.where(active, value, 0.0)

    return penalty
