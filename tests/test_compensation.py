"""Motion compensation against a slow, obvious way of doing it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.nn import compensation
from nvc_jax.nn.compensation import (
    BLANK,
    compensate,
    compensate_cells,
    compensate_features,
    interpolation_kernel,
    window,
)
from nvc_jax.nn.motion import MAX_VECTOR


def picture(rng, *shape):
    return rng.random(shape, np.float32)


def random_field(rng, rows, columns, reach=60, none=0.2, batch=1):
    vectors = rng.integers(-reach, reach + 1, (batch, rows, columns, 2))
    used = rng.random((batch, rows, columns, 1)) >= none
    return np.concatenate([vectors * used, used], -1).astype(np.int16)


def sample(plane, y, x):
    """The plane [h, w] at a position in quarters of a sample, tap by tap."""
    kernel = interpolation_kernel().astype(np.float64)
    h, w = plane.shape
    rows = np.clip((y >> 2) + np.arange(-3, 5), 0, h - 1)
    columns = np.clip((x >> 2) + np.arange(-3, 5), 0, w - 1)
    return kernel[y & 3] @ plane[np.ix_(rows, columns)] @ kernel[x & 3]


def slowly(plane, field, overlap):
    """`compensate` of one plane [h, w], pixel by pixel."""
    h, w = plane.shape
    rows, columns, _ = field.shape
    block = h // rows
    coarser = 8 // block
    weight = np.outer(window(block), window(block)).astype(np.float64)
    out = np.full((h, w), BLANK)
    for y in range(h):
        for x in range(w):
            if not field[y // block, x // block, 2]:
                continue
            total = share = 0.0
            for row in range(rows) if overlap else [y // block]:
                for column in range(columns) if overlap else [x // block]:
                    i, j = (y - row * block + block // 2, x - column * block + block // 2)
                    inside = 0 <= i < 2 * block and 0 <= j < 2 * block
                    if not inside or not field[row, column, 2]:
                        continue
                    here = weight[i, j] if overlap else 1.0
                    down, across = (
                        (int(v) + coarser // 2) // coarser for v in field[row, column, :2]
                    )
                    total += here * sample(plane, 4 * y + down, 4 * x + across)
                    share += here
            out[y, x] = total / share
    return out


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("rows", "columns", "block"), [(2, 2, 8), (3, 4, 8), (4, 2, 4), (2, 6, 4)])
def test_as_the_slow_way(rows, columns, block, overlap):
    rng = np.random.default_rng(rows)
    plane = picture(rng, 1, rows * block, columns * block, 1)
    field = random_field(rng, rows, columns)
    ours = compensate(jnp.asarray(plane), jnp.asarray(field), overlap)[0, ..., 0]
    np.testing.assert_allclose(ours, slowly(plane[0, ..., 0], field[0], overlap), atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([9, 300, MAX_VECTOR]))
def test_far_outside_a_reference_is_as_at_its_border(seed, reach):
    rng = np.random.default_rng(seed)
    plane = picture(rng, 1, 16, 16, 1)
    field = random_field(rng, 2, 2, reach)
    ours = compensate(jnp.asarray(plane), jnp.asarray(field))[0, ..., 0]
    np.testing.assert_allclose(ours, slowly(plane[0, ..., 0], field[0], True), atol=2e-5)


def test_whole_pixels_copy():
    rng = np.random.default_rng(0)
    plane = picture(rng, 2, 48, 64, 2)
    field = np.broadcast_to(np.array([-8, 20, 1], np.int16), (2, 6, 8, 3))
    moved = compensate(jnp.asarray(plane), jnp.asarray(field))
    np.testing.assert_allclose(moved[:, 2:, :-5], plane[:, :-2, 5:], atol=1e-6)


def test_channels_and_samples_do_not_mix():
    rng = np.random.default_rng(0)
    plane, field = picture(rng, 3, 32, 16, 2), random_field(rng, 4, 2, batch=3)
    together = compensate(jnp.asarray(plane), jnp.asarray(field))
    for b in range(3):
        for c in range(2):
            alone = compensate(plane[b : b + 1, ..., c : c + 1], field[b : b + 1])
            np.testing.assert_allclose(together[b, ..., c], alone[0, ..., 0], atol=1e-6)


def test_nothing_moves_where_nothing_is_predicted():
    field = np.zeros((1, 2, 2, 3), np.int16)
    ones = jnp.ones((1, 16, 16, 1))
    assert (compensate(ones, field) == BLANK).all()
    assert not compensate_features(jnp.ones((1, 2, 2, 5)), field).any()
    assert not compensate_cells(jnp.ones((1, 2, 2, 5), jnp.int8), field).any()
    field[0, 0, 0, 2] = 1  # one block is predicted: it alone, and it entirely
    moved = compensate(ones, field)[0, ..., 0]
    np.testing.assert_allclose(moved[:8, :8], 1, atol=1e-6)
    assert (moved[8:] == BLANK).all() and (moved[:, 8:] == BLANK).all()


def test_gradients_are_finite_differences():
    rng = np.random.default_rng(0)
    plane, field = picture(rng, 1, 16, 24, 1), random_field(rng, 2, 3)
    wanted = picture(rng, 1, 16, 24, 1)

    def loss(plane):
        return jnp.sum(wanted * compensate(plane, field))

    gradient = jax.grad(loss)(jnp.asarray(plane))
    direction = picture(rng, *plane.shape)
    # Linear in the plane: any step gives the derivative.
    apart = float(loss(plane + direction)) - float(loss(plane))
    np.testing.assert_allclose(jnp.sum(gradient * direction), apart, rtol=1e-4)


def test_features_move_by_parts_of_a_cell():
    features = jnp.arange(6.0).reshape(1, 1, 6, 1) * jnp.ones((1, 2, 1, 1))
    field = np.broadcast_to(np.array([0, 8, 1], np.int16), (1, 2, 6, 3))  # two pixels of eight
    moved = compensate_features(features, field)
    np.testing.assert_allclose(moved[0, :, :, 0], [[0.25, 1.25, 2.25, 3.25, 4.25, 5.0]] * 2)


def test_memories_move_by_whole_cells_and_stay_integers():
    memory = jnp.arange(12, dtype=jnp.int8).reshape(1, 3, 4, 1)
    vectors = {(0, 15): (0, 0), (0, 16): (0, 1), (-17, 0): (-1, 0), (33, -48): (1, -1)}
    for vector, (down, across) in vectors.items():
        field = np.broadcast_to(np.array([*vector, 1], np.int16), (1, 3, 4, 3))
        moved = compensate_cells(memory, field)
        assert moved.dtype == jnp.int8
        rows, columns = np.clip(np.arange(3) + down, 0, 2), np.clip(np.arange(4) + across, 0, 3)
        np.testing.assert_array_equal(moved[0, ..., 0], memory[0, rows][:, columns, 0])


def test_the_kernel_keeps_flat_pictures_and_copies_at_whole_samples():
    kernel = interpolation_kernel()
    np.testing.assert_allclose(kernel.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(kernel[0], np.arange(8) == 3, atol=1e-6)
    np.testing.assert_allclose(kernel[1], kernel[3][::-1], atol=1e-6)
    assert compensation.PHASES == 4
