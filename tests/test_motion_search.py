"""Motion search: known motion is found, bits are saved, nothing is found where nothing is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nvc_jax.nn.compensation import compensate
from nvc_jax.nn.motion import MAX_VECTOR, PRECISION, field_bits
from nvc_jax.nn.motion_search import search

WEIGHT = 0.18 * (14 / 255) ** 2
found = jax.jit(search)


def moved(height, width, down, across, seed=0):
    """A picture of waves, and a reference that has it some quarters of a sample away."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    picture = reference = 0
    for _ in range(60):
        fy, fx = rng.normal(0, 0.5, 2)
        size, phase = 0.03 / (1 + 4 * np.hypot(fy, fx)), rng.uniform(0, 6.3)
        picture = picture + size * np.cos(fy * y + fx * x + phase)
        back = fy * (y - down / PRECISION) + fx * (x - across / PRECISION)
        reference = reference + size * np.cos(back + phase)
    return tuple((0.5 + p).astype(np.float32) for p in (picture, reference))


def one(picture, reference, weight=WEIGHT, previous=None):
    picture, reference = jnp.asarray(picture)[None], jnp.asarray(reference)[None]
    return np.asarray(found(picture, reference, jnp.full(1, weight), previous))[0]


@pytest.mark.parametrize(
    "down, across", [(4, -8), (0, 30 * 4), (-28 * 4, 64), (2, -6), (5, 0), (-9, 3), (1, 33)]
)
def test_finds_shifts(down, across):
    field = one(*moved(96, 128, down, across))
    inner = field[4:-4, 4:-4] if max(abs(down), abs(across)) > 40 else field[1:-1, 1:-1]
    assert (inner[..., 2] == 1).all()
    right = (inner[..., :2] == (down, across)).all(-1)
    assert right.mean() > 0.9
    assert np.abs(inner[..., :2] - (down, across)).max() <= 1 or right.mean() > 0.95


def test_panning_costs_little():
    """A scene that moves as a whole, with noise, has one vector nearly everywhere."""
    picture, reference = moved(96, 128, 6, -20)
    noise = np.random.default_rng(1).normal(0, 0.01, picture.shape)
    field = one(picture, reference + noise.astype(np.float32))
    inner = field[:, 1:]  # the column at the border shows what the reference lacks
    assert (inner[..., :2] == (6, -20)).all(-1).mean() > 0.98
    assert float(field_bits(inner[None])[0]) < 100


def test_copies_what_does_not_move():
    picture = moved(96, 128, 0, 0)[0]
    for weight in (0.0, WEIGHT, 100.0):
        field = one(picture, picture, weight)
        assert not field[..., :2].any()
        assert (field[..., 2] == 1).all()


def test_copies_where_motion_is_not_worth_its_bits():
    picture = moved(96, 128, 0, 0)[0]
    noise = np.random.default_rng(2).normal(0, 0.005, picture.shape)
    field = one(picture, picture + noise.astype(np.float32))
    assert not field[..., :2].any()
    field = one(*moved(96, 128, 8, 8), weight=1e6)
    assert not field[..., :2].any()
    assert (field[..., 2] == 1).all()


def test_flat_pictures_are_copied():
    flat = np.full((48, 80), 0.3, np.float32)
    field = one(flat, flat, 0.0)
    assert not field[..., :2].any()
    assert (field[..., 2] == 1).all()


def test_scene_cuts_are_mostly_none():
    rng = np.random.default_rng(3)
    smooth = np.kron(rng.random((12, 16)), np.ones((8, 8))).astype(np.float32)
    field = one(smooth, rng.random((96, 128)).astype(np.float32))
    assert (field[..., 2] == 0).mean() > 0.8
    assert not field[field[..., 2] == 0].any()


def test_nothing_is_predicted_behind_a_scene_cut():
    """Though for some blocks something alike is found by chance."""
    behind = np.random.default_rng(3).random((96, 128)).astype(np.float32)
    behind[:, :64] = 0.5
    assert not one(behind, moved(96, 128, 0, 0)[0]).any()


def test_grain_is_no_scene_cut():
    picture, reference = moved(96, 128, 4, -8)
    rng = np.random.default_rng(5)
    grain = picture.std() / 2 * rng.standard_normal((2, *picture.shape)).astype(np.float32)
    assert one(picture + grain[0], reference + grain[1])[..., 2].mean() > 0.5


def test_what_was_hidden_is_none():
    """Flat background that a busy foreground leaves; the rest of the picture is still predicted."""
    picture = moved(96, 128, 0, 0)[0]
    reference = picture.copy()
    picture[32:64, 32:64] = 0.9
    reference[:, :] = np.random.default_rng(4).random(reference.shape) * 0.2 + reference * 0.2
    reference[:, 80:] = picture[:, 80:]
    field = one(picture, reference)
    assert (field[:, 11:, 2] == 1).all()


@pytest.mark.parametrize("height, width", [(16, 16), (48, 80), (64, 16), (80, 144)])
def test_sizes(height, width):
    picture, reference = moved(height, width, 4, -4)
    field = one(picture, reference)
    assert field.shape == (height // 8, width // 8, 3)
    assert field.dtype == np.int16
    predicted = compensate(jnp.asarray(reference)[None, ..., None], jnp.asarray(field)[None])
    after = np.mean((np.asarray(predicted)[0, ..., 0] - picture) ** 2)
    assert after < np.mean((reference - picture) ** 2) / 4


def test_batch_is_each_alone():
    pairs = [moved(64, 96, 8, 3), moved(64, 96, -13, 40, seed=5)]
    weights = jnp.array([WEIGHT, WEIGHT / 10])
    previous = np.random.default_rng(6).integers(-40, 40, (2, 8, 12, 3)).astype(np.int16)
    previous[..., 2] = 1
    pictures, references = (jnp.stack(p) for p in zip(*pairs, strict=True))
    both = found(pictures, references, weights, jnp.asarray(previous))
    for i in range(2):
        each = slice(i, i + 1)
        alone = found(pictures[each], references[each], weights[each], jnp.asarray(previous[each]))
        assert (both[each] == alone).all()


def test_previous_reaches_further():
    """Motion beyond the range of the search is followed if the unit before had it."""
    down, across = 0, 60 * PRECISION
    picture, reference = moved(64, 208, down, across)
    previous = np.broadcast_to(np.array([down, across, 1], np.int16), (1, 8, 26, 3))
    field = one(picture, reference, previous=jnp.asarray(previous))
    assert (field[2:-2, 8:16, :2] == (down, across)).all(-1).mean() > 0.9


def test_vectors_stay_within_limits():
    rng = np.random.default_rng(7)
    picture, reference = rng.random((2, 64, 96)).astype(np.float32)
    previous = rng.integers(-MAX_VECTOR, MAX_VECTOR + 1, (1, 8, 12, 3)).astype(np.int16)
    previous[..., 2] = 1
    field = one(picture, reference, 0.0, jnp.asarray(previous)).astype(int)
    assert np.abs(field[..., :2]).max() <= MAX_VECTOR
    begins = 32 * np.indices((8, 12)).transpose(1, 2, 0) + field[..., :2]
    sides = np.array([64, 96]) * PRECISION
    assert (begins >= -64 * PRECISION).all()
    assert (begins + 32 <= sides + 64 * PRECISION).all()


def test_in_training_steps():
    picture, reference = moved(48, 80, 4, -4)

    @jax.jit
    def gradient(gain):
        def loss(gain):
            ours, theirs = gain * jnp.asarray(picture)[None], jnp.asarray(reference)[None]
            field = search(ours, theirs, gain * jnp.full(1, WEIGHT))
            predicted = compensate(theirs[..., None], field)[..., 0]
            return jnp.square(ours - predicted).mean()

        return jax.grad(loss)(gain)

    assert np.isfinite(gradient(1.0))
    assert gradient(1.5) > 0
