"""Degraded pictures, which stand for coded ones as first references of training clips.

UI2C (arXiv 2510.14431) trains one model for intra and inter by drawing the first reference of a
clip at random from {blank, true previous frame, perturbed previous frame}; so does
`nvc_jax.training.step.first_refs`. The kinds of perturbation and their shares are our choice: white
noise, and for half of the perturbed references a loss that looks like coding (8x8 cosine transform
with coarse quantisation, or a 4x4 box blur).
"""

import jax
import jax.numpy as jnp
import numpy as np

BLANK = 0.5


def _cosine_basis(n: int) -> np.ndarray:
    k, x = np.arange(n)[:, None], np.arange(n)[None, :]
    basis = np.sqrt(2 / n) * np.cos(np.pi * (x + 0.5) * k / n)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def coarse_transform(frame: jax.Array, step: jax.Array) -> jax.Array:
    """Quantises 8x8 cosine coefficients: frame [b, h, w, c], step [b] in pixel units."""
    b, h, w, c = frame.shape
    basis = _cosine_basis(8)
    blocks = frame.reshape(b, h // 8, 8, w // 8, 8, c)
    coefficients = jnp.einsum("ki,bhiwjc,lj->bhkwlc", basis, blocks, basis)
    step = step[:, None, None, None, None, None]
    coefficients = jnp.round(coefficients / step) * step
    return jnp.einsum("ki,bhkwlc,lj->bhiwjc", basis, coefficients, basis).reshape(frame.shape)


def box_blur(frame: jax.Array) -> jax.Array:
    """Averages 4x4 cells: [b, h, w, c] -> same."""
    b, h, w, c = frame.shape
    cells = frame.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4), keepdims=True)
    return jnp.broadcast_to(cells, (b, h // 4, 4, w // 4, 4, c)).reshape(frame.shape)


def degraded(key: jax.Array, frame: jax.Array) -> jax.Array:
    """Each sample with white noise, or half of them as if badly coded. [b, h, w, 3] -> same."""
    keys = jax.random.split(key, 5)
    b = frame.shape[0]

    def column(x):
        return x[:, None, None, None]

    noise_std = jax.random.uniform(keys[0], (b,), maxval=0.1)
    noisy = frame + column(noise_std) * jax.random.normal(keys[1], frame.shape)
    step = jax.random.uniform(keys[2], (b,), minval=0.05, maxval=0.6)
    coded = jnp.where(
        column(jax.random.bernoulli(keys[3], 0.5, (b,))),
        coarse_transform(frame, step),
        box_blur(frame),
    )
    coded = coded + 0.2 * (noisy - frame)
    return jnp.where(column(jax.random.bernoulli(keys[4], 0.5, (b,))), coded, noisy)
