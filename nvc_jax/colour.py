"""Y, U, V and R, G, B, for codecs that work on the latter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Y, U, V of BT.709 in limited range, as shares of 255, are OFFSET + FROM_RGB @ (R, G, B in [0, 1]).
OFFSET = np.array([16, 128, 128]) / 255
FROM_RGB = (
    np.array(
        [
            [0.2126, 0.7152, 0.0722],
            [-0.2126 / 1.8556, -0.7152 / 1.8556, 0.5],
            [0.5, -0.7152 / 1.5748, -0.0722 / 1.5748],
        ]
    )
    * np.array([[219], [224], [224]])
    / 255
)


def to_rgb(yuv: jax.Array) -> jax.Array:
    """Float32 [..., 3], a little beyond [0, 1] for colours that no screen shows."""
    return _times(np.linalg.inv(FROM_RGB), yuv - jnp.asarray(OFFSET, jnp.float32))


def from_rgb(rgb: jax.Array) -> jax.Array:
    """Inverse of `to_rgb`."""
    return _times(FROM_RGB, rgb) + jnp.asarray(OFFSET, jnp.float32)


def for_codec(codec: nn.Module, yuv: jax.Array) -> jax.Array:
    """Y, U, V in the colours that a codec works on."""
    return to_rgb(yuv) if codec.rgb else yuv


def from_codec(codec: nn.Module, pictures: jax.Array) -> jax.Array:
    """Inverse of `for_codec`."""
    return from_rgb(pictures) if codec.rgb else pictures


def _times(matrix: np.ndarray, pixels: jax.Array) -> jax.Array:
    return jnp.dot(pixels, jnp.asarray(matrix.T, jnp.float32), precision=jax.lax.Precision.HIGHEST)
