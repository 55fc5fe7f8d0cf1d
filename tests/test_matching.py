"""Motion that decoders find for themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvc_jax.models.uni_lvc import SEARCH
from nvc_jax.nn.matching import block_errors, motion_between
from nvc_jax.nn.warp import warp

pytestmark = pytest.mark.usefixtures("quick_compilation")
LEVELS = jnp.full(len(SEARCH), 9.0), jnp.full(len(SEARCH), 0.5)


def texture(height, width, down=0.0, right=0.0):
    """Waves of many directions and lengths, displaced: float32 [1, h, w, 1]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    lengths, angles, phases = rng.uniform(10, 90, 40), *rng.uniform(0, 2 * np.pi, (2, 40))
    waves = [
        np.sin(((x - right) * np.cos(a) + (y - down) * np.sin(a)) * 2 * np.pi / n + phase)
        for n, a, phase in zip(lengths, angles, phases, strict=True)
    ]
    return jnp.asarray(0.5 + np.sum(waves, 0) / 40, jnp.float32)[None, ..., None]


def test_block_errors_are_those_of_displaced_blocks():
    rng = np.random.default_rng(1)
    picture, reference = rng.random((2, 2, 8, 12), np.float32)
    found = block_errors(jnp.asarray(picture), jnp.asarray(reference), 2, 4)
    assert found.shape == (2, 2, 3, 25)
    for sample, row, column in np.ndindex(2, 2, 3):
        for number, (dy, dx) in enumerate(np.ndindex(5, 5)):
            rows = np.clip(np.arange(4 * row, 4 * row + 4) + dy - 2, 0, 7)
            columns = np.clip(np.arange(4 * column, 4 * column + 4) + dx - 2, 0, 11)
            ours = picture[sample, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            theirs = reference[sample][np.ix_(rows, columns)]
            expected = np.mean((ours - theirs) ** 2)
            np.testing.assert_allclose(found[sample, row, column, number], expected, rtol=1e-4)


@pytest.mark.parametrize("down, right", [(0, 0), (3, -5), (-2.5, 1.25), (14, 21)])
def test_displacements_are_found(down, right):
    """Parts of pixels, and more than one level reaches; but for what has left the picture."""
    picture, reference = texture(96, 128), texture(96, 128, down, right)
    flow = jax.jit(lambda a, b: motion_between(a, b, SEARCH, *LEVELS))(picture, reference)
    inner = flow[0, 32:64, 32:96]
    np.testing.assert_allclose(np.median(inner, (0, 1)), [right, down], atol=0.35)
    moved, still = (
        jnp.square(x - picture)[0, 32:64, 32:96].mean() for x in (warp(reference, flow), reference)
    )
    assert moved < 0.05 * still or ((down, right) == (0, 0) and moved < 1e-6)


def test_motion_has_gradients():
    """Towards a picture that the reference agrees with better."""
    picture, reference = texture(32, 32), texture(32, 32, 1, 1)

    def apart(picture, levels):
        flow = motion_between(picture, reference, SEARCH, *levels)
        return jnp.square(warp(reference, flow) - texture(32, 32)).mean()

    to_picture, to_levels = jax.jit(jax.grad(apart, (0, 1)))(picture, LEVELS)
    for slope in (to_picture, *to_levels):
        assert np.isfinite(slope).all() and np.abs(slope).max() > 0
