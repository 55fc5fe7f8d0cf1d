"""Clips made of photographs: that what moves is where it should be, and how they are drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.data import synthetic_motion
from nvc_jax.data.clips import Clip, ClipSet
from nvc_jax.data.pipeline import batches, iterate, memory_sources, open_sets
from nvc_jax.data.synthetic_motion import Scene, Scenes, Way, film, seen
from nvc_jax.errors import NvcError


def flat(y, u=128, v=128, size=64, frames=1):
    luma, chroma = (frames, size, size), (frames, size // 2, size // 2)
    return Clip(*(np.full(s, x, np.uint8) for s, x in ((luma, y), (chroma, u), (chroma, v))))


def slopes(height=200, width=240):
    """Y = column, U = column / 2, V = row / 2: says where each sample came from."""
    y = np.broadcast_to(np.arange(width, dtype=np.uint8), (1, height, width))
    rows, columns = np.mgrid[: height // 2, : width // 2].astype(np.uint8)
    return Clip(y, columns[None], rows[None])


def noise(height=96, width=128):
    rng = np.random.default_rng(0)
    shapes = ((height, width), (height // 2, width // 2), (height // 2, width // 2))
    return Clip(*(rng.integers(0, 256, (1, *shape)).astype(np.uint8) for shape in shapes))


def filmed(scene, seed=0, frames=5, crop=32):
    sample = np.empty((frames, crop, crop, 3), np.uint8)
    film(scene, sample, np.random.default_rng(seed))
    return sample


def only(monkeypatch, *shares):
    """Of all that may happen in a clip, these happen always and others never."""
    for name in ("TURN_SHARE", "ZOOM_SHARE", "FRONT_SHARE", "LIGHT_SHARE"):
        monkeypatch.setattr(synthetic_motion, name, 2.0 if name in shares else 0.0)
    monkeypatch.setattr(synthetic_motion, "FLIP_SHARE", 0.0)


def test_whole_pixels_are_copied():
    picture = noise().y[0]
    ways = Way(np.array([40.5 + 30.5j, 43.5 + 25.5j]), np.ones(2, complex))
    (result,) = seen([picture], ways, 16)
    np.testing.assert_array_equal(result[0], picture[23:39, 33:49])
    np.testing.assert_array_equal(result[1], picture[18:34, 36:52])


@pytest.mark.parametrize("step", [0.25, 1.5, -2.75])
def test_a_known_translation_is_there(step):
    picture = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8), (64, 64))
    centres = 31.5 + 31.5j + step * np.arange(4)
    across, down = (
        seen([p], Way(centres, np.ones(4, complex)), 16)[0] for p in (picture, picture.T)
    )
    first = 4 * np.arange(24, 40)
    for time in range(4):
        np.testing.assert_array_equal(across[time], np.tile(first + int(4 * step * time), (16, 1)))
        np.testing.assert_array_equal(down[time], np.tile(first[:, None], (1, 16)))


def test_quarter_turns_and_factors_of_two():
    picture = noise().y[0, :32, :32]
    middle = 15.5 + 15.5j
    (turned,) = seen([picture], Way(np.array([middle]), np.array([1j])), 32)
    # Its last row and column are but 255 of 256 parts of the way to the border.
    difference = turned[0].astype(int) - np.rot90(picture)
    assert np.abs(difference).max() <= 1
    (small,) = seen([picture], Way(np.array([middle]), np.array([2 + 0j])), 16)
    means = picture.reshape(16, 2, 16, 2).astype(float).mean((1, 3))
    np.testing.assert_allclose(small[0], means, atol=0.5)


def test_pictures_go_on_as_they_end():
    picture = noise().y[0]
    (result,) = seen([picture], Way(np.array([-50 - 50j, 500 + 30.5j]), np.ones(2, complex)), 8)
    assert (result[0] == picture[0, 0]).all()
    border = picture[27:35, -1:].astype(int)
    assert np.abs(result[1] - border).max() <= 1


def test_cameras_pan_smoothly_and_stay_on_the_photograph(monkeypatch):
    only(monkeypatch)
    scene, speeds = Scene(slopes(), ()), []
    for seed in range(60):
        y, u, v = np.moveaxis(filmed(scene, seed).astype(float), -1, 0)
        assert y.min() >= 0 and y.max() <= 239 and v.max() <= 99
        # No border is shown: it would not rise any more.
        assert (np.diff(y, axis=2) >= 0).all() and np.ptp(y, axis=2).min() >= 29
        # Chroma is that of the same place.
        pairs = y.reshape(5, 16, 2, 16, 2).mean((2, 4))
        np.testing.assert_allclose(u[:, ::2, ::2], (pairs - 0.5) / 2, atol=1.1)
        moves = np.diff(y.mean((1, 2)))
        assert np.ptp(moves) <= 0.5 * np.abs(moves).max() + 1
        speeds.append(np.hypot(moves[0], 2 * np.diff(v.mean((1, 2)))[0]))
    assert np.mean(np.array(speeds) > 0.5) > 0.5
    assert np.max(speeds) > 8


@pytest.mark.parametrize("share", ["TURN_SHARE", "ZOOM_SHARE"])
def test_cameras_turn_and_zoom(monkeypatch, share):
    only(monkeypatch, share)
    monkeypatch.setattr(synthetic_motion, share[:4], 0.03)
    changes = []
    for seed in range(20):
        luma = filmed(Scene(slopes(), ()), seed, crop=64)[..., 0].astype(float)
        # Luma rises along the columns only: what it rises by along both tells the factor.
        across = (luma[:, :, -1] - luma[:, :, 0]).mean(1) / 63
        down = (luma[:, -1] - luma[:, 0]).mean(1) / 63
        size, angle = np.hypot(across, down), np.arctan2(down, across)
        turns, zooms = np.ptp(angle), np.ptp(np.log(size))
        changed, kept = (turns, zooms) if share == "TURN_SHARE" else (zooms, turns)
        assert kept < 0.03
        changes.append(changed)
    assert np.max(changes) > 0.1


def test_something_passes_in_front(monkeypatch):
    only(monkeypatch, "FRONT_SHARE")
    scene, sizes, places = Scene(flat(200, u=0), (flat(50, u=255),)), [], []
    for seed in range(40):
        luma, u = filmed(scene, seed, crop=64)[..., :2].astype(float).transpose(3, 0, 1, 2)
        cover = (200 - luma) / 150
        assert cover.min() >= 0 and cover.max() <= 1
        np.testing.assert_allclose(u.mean((1, 2)) / 255, cover.mean((1, 2)), atol=0.01)
        sizes.append(cover.mean())
        if (cover.sum((1, 2)) > 1).all():
            columns = (cover * np.arange(64)).sum((1, 2)) / cover.sum((1, 2))
            places.append(np.ptp(columns))
    assert 0.02 < np.mean(sizes) < 0.3
    assert np.max(places) > 10 and len(places) > 20


def test_light_changes_smoothly(monkeypatch):
    only(monkeypatch, "LIGHT_SHARE")
    scene, ranges = Scene(flat(116, u=148), ()), []
    for seed in range(20):
        y, u, _ = filmed(scene, seed)[:, 0, 0].astype(float).T
        rises = np.diff(y)
        assert (rises >= 0).all() or (rises <= 0).all()
        np.testing.assert_allclose((u - 128) / 20, (y - 16) / 100, atol=0.03)
        ranges.append(np.ptp(y))
    assert max(ranges) > 5


def test_clips_follow_from_the_generator():
    scene = Scenes([noise(), slopes(), noise(64, 64)])[0]
    for seed in range(5):
        np.testing.assert_array_equal(filmed(scene, seed), filmed(scene, seed))
        assert not np.array_equal(filmed(scene, seed), filmed(scene, seed + 1))


@settings(max_examples=40)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    frames=st.integers(1, 4),
    crop=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_photograph_fills_any_clip(height, width, frames, crop, seed):
    scene = Scene(slopes(2 * height, 2 * width), (noise(2 * width, 2 * height),))
    result = filmed(scene, seed, frames, 2 * crop)
    chroma = result[..., 1:]
    np.testing.assert_array_equal(chroma[:, ::2, ::2].repeat(2, 1).repeat(2, 2), chroma)


def draw(share, count=400, **options):
    """Batches in which Y is 200 in clips of videos, and 50 in those made of photographs."""
    clips = ClipSet((flat(200, size=16, frames=4),), (flat(50, size=16), flat(50, size=16)))
    options = {"seed": 1, "batch": count, "frames": 2, "crop": 8, "cut_share": 0.0} | options
    return batches(memory_sources(clips, 0.0, share), **options)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shares_are_respected(share, monkeypatch):
    only(monkeypatch)
    luma = draw(share)[0][..., 0]
    assert set(np.unique(luma)) <= {50, 200}
    assert abs(np.mean(luma == 50) - share) < 0.02


def test_image_share_is_of_the_other_samples():
    clips = ClipSet((flat(200, frames=4),), (flat(50),))
    weights = [source.weight for source in memory_sources(clips, 0.25, 0.2)]
    np.testing.assert_allclose(weights, [0.6, 0.2, 0.2])
    weights = [source.weight for source in memory_sources(ClipSet((), clips.images), 0.25, 0.2)]
    np.testing.assert_allclose(weights, [0.8, 0.2])


def test_batches_go_on_where_they_were():
    clips = ClipSet((flat(200, size=32, frames=4),), (noise(64, 64), slopes(64, 64)))
    options = {"seed": 1, "frames": 3, "crop": 16, "cut_share": 0.5}
    made = batches(memory_sources(clips, 0.2, 0.7), batch=4, **options)
    first = [made[step] for step in range(4)]
    some = iterate(batches(memory_sources(clips, 0.2, 0.7), batch=4, **options), 1)
    for batch in first[1:]:
        np.testing.assert_array_equal(next(some), batch)
    parts = [
        batches(memory_sources(clips, 0.2, 0.7), batch=4, **options, process=p, processes=2)[2]
        for p in range(2)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), first[2])


@pytest.mark.parametrize("share", [-0.1, 1.5, "half", True, None])
def test_wrong_shares_are_refused(share):
    with pytest.raises(NvcError, match=r"config.data.synthetic_share is .*; it must be") as error:
        open_sets({"folder": "", "synthetic_share": share})
    assert "\n" not in str(error.value)


def test_clips_need_photographs_and_a_folder():
    clips = ClipSet((flat(200, frames=4),), ())
    assert len(memory_sources(clips, 0.25)) == 1
    with pytest.raises(NvcError, match="no photographs") as error:
        memory_sources(clips, 0.25, 0.5)
    assert "\n" not in str(error.value)
    with pytest.raises(NvcError, match="synthetic_share is nothing that sets can have"):
        open_sets({"sets": (), "synthetic_share": 0.5})
    assert len(open_sets({"folder": "", "synthetic_share": 0.5})) == 3
