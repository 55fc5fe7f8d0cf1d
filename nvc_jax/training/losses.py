"""Rate-distortion loss of DCVC-UF (arXiv 2606.04410) and UI2C's frame weights.

Pictures are Y, U, V planes at 4:4:4 in [0, 1].
"""

import jax
import jax.numpy as jnp

QP_COUNT = 64
# Lambda at qp 0 and qp 63.
LAMBDA_RANGE = {"image": (10.0, 2048.0), "video": (1.0, 768.0)}
# Weights on the distortion by frame number modulo 8; the better-coded frames count more.
FRAME_WEIGHTS = (0.52, 1.33, 0.52, 0.83, 0.52, 0.83, 0.52, 0.83)


def lambda_of_qp(qp: jax.Array, kind: str) -> jax.Array:
    """Lagrangian weight of the distortion: log-linear in qp over `LAMBDA_RANGE[kind]`."""
    low, high = LAMBDA_RANGE[kind]
    return low * jnp.exp(jnp.log(high / low) * qp / (QP_COUNT - 1))


def yuv_to_rgb(yuv: jax.Array) -> jax.Array:
    """BT.709 full range, without clipping. [..., 3] -> [..., 3]."""
    y, u, v = jnp.moveaxis(yuv, -1, 0)
    red = y + 2 * (1 - 0.2126) * (v - 0.5)
    blue = y + 2 * (1 - 0.0722) * (u - 0.5)
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    return jnp.stack([red, green, blue], axis=-1)


def distortion(recon: jax.Array, target: jax.Array) -> jax.Array:
    """0.8 D_yuv + 0.2 D_rgb per picture, [..., h, w, 3] -> [...].

    D_yuv is three times the geometric mean of the planes' squared errors with weights 10:1:1 (a
    floor of 1e-6 keeps it from vanishing with any single plane), D_rgb the sum of the squared
    errors of R, G and B.
    """
    planes = jnp.maximum(jnp.mean((recon - target) ** 2, axis=(-3, -2)), 1e-6)
    d_yuv = 3 * jnp.exp(jnp.log(planes) @ jnp.asarray([10.0, 1.0, 1.0]) / 12)
    rgb = jnp.mean((yuv_to_rgb(recon) - yuv_to_rgb(target)) ** 2, axis=(-3, -2))
    return 0.8 * d_yuv + 0.2 * rgb.sum(-1)


def psnr(recon: jax.Array, target: jax.Array) -> jax.Array:
    """Per plane, dB: [..., h, w, 3] -> [..., 3]; clipped pictures, peak 1."""
    mse = jnp.mean((jnp.clip(recon, 0, 1) - target) ** 2, axis=(-3, -2))
    return -10 * jnp.log10(jnp.maximum(mse, 1e-10))
