"""Batches: random cuts, mixtures, and that they follow from their number alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.data.clips import Clip, ClipSet
from nvc_jax.data.pipeline import batches, iterate, memory_sources
from nvc_jax.errors import NvcError


def coordinates(frames, height, width, mark=0):
    """A clip that says where each sample came from: Y = column, U = 2x2 row, V = frame + mark."""
    y = np.broadcast_to(np.arange(width, dtype=np.uint8), (frames, height, width))
    rows = np.arange(height // 2, dtype=np.uint8)[:, None]
    u = np.broadcast_to(rows, (frames, height // 2, width // 2))
    times = np.arange(mark, mark + frames, dtype=np.uint8)[:, None, None]
    return Clip(y, u, np.broadcast_to(times, u.shape))


def draw(clips, step=0, batch=8, frames=5, crop=16, image_share=0.0, cut_share=0.0):
    options = {"batch": batch, "frames": frames, "crop": crop, "cut_share": cut_share}
    made = batches(memory_sources(clips, image_share), seed=3, **options)
    return made[step].astype(int)


def video(frames=30, height=64, width=96):
    return ClipSet((coordinates(frames, height, width),), ())


def image(height=200, width=240):
    return ClipSet((), (coordinates(1, height, width),))


def mixture():
    return ClipSet((coordinates(30, 64, 96),), (coordinates(1, 64, 64),))


def test_a_batch_depends_on_its_number_only():
    sources = memory_sources(mixture(), 0.5)
    options = {"batch": 4, "frames": 5, "crop": 32}
    first = [batches(sources, seed=1, **options)[step] for step in range(4)]
    again = batches(sources, seed=1, **options)
    for step in (3, 2, 1, 0):
        np.testing.assert_array_equal(again[step], first[step])
    for workers in (0, 2):
        some = iterate(again, 1, workers)
        for batch in first[1:]:
            np.testing.assert_array_equal(next(some), batch)
    assert first[0].shape == (4, 5, 32, 32, 3)
    assert first[0].dtype == np.uint8
    other = batches(sources, seed=2, **options)[0]
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch(processes):
    sources = memory_sources(mixture(), 0.5)
    options = {"seed": 5, "batch": 8, "frames": 3, "crop": 16}
    parts = [batches(sources, **options, process=p, processes=processes) for p in range(processes)]
    for step, whole in zip(range(3), batches(sources, **options), strict=False):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole)
    with pytest.raises(NvcError, match="cannot be shared"):
        batches(sources, **options, processes=3)


def test_all_clips_are_seen_before_any_is_seen_again():
    clips = tuple(coordinates(4, 16, 16, mark=10 * n) for n in range(12))
    seen = draw(ClipSet((), clips), image_share=1.0, batch=12, frames=1)[:, 0, 0, 0, 2] // 10
    assert sorted(seen) == list(range(12))


def test_video_crops_keep_planes_aligned_and_still():
    lefts, mirrored = set(), set()
    for sample in draw(video(), batch=64):
        luma, rows = sample[..., 0], sample[..., 1]
        direction = luma[0, 0, 1] - luma[0, 0, 0]
        left = luma[0, 0].min()
        columns = left + np.arange(16)[::direction]
        assert left % 2 == 0 and abs(direction) == 1
        assert (luma == columns).all()  # the same window in every frame
        assert (rows == (rows[0, 0, 0] + np.arange(16) // 2)[:, None]).all()
        assert rows.max() < 32 and luma.max() < 96
        lefts.add(left)
        mirrored.add(direction)
    assert len(lefts) > 15 and max(lefts) > 60 and min(lefts) < 20
    assert mirrored == {-1, 1}


def test_time_runs_both_ways_at_full_or_half_rate():
    steps = np.diff(draw(video(), batch=400)[..., 0, 0, 2])
    assert (steps == steps[:, :1]).all()
    share = {speed: (steps[:, 0] == speed).mean() for speed in (-2, -1, 1, 2)}
    assert sum(share.values()) == 1
    assert 0.1 < share[2] + share[-2] < 0.3
    assert 0.4 < share[1] + share[2] < 0.6


def test_short_videos_bounce():
    for times in draw(video(frames=3), batch=50, frames=9)[..., 0, 0, 2]:
        assert set(times) == {0, 1, 2}
        assert (np.abs(np.diff(times)) == 1).all()
        turns = times[1:-1][times[:-2] == times[2:]]
        assert set(turns) == {0, 2}


def test_of_clips_that_are_a_little_too_short_only_the_end_bounces():
    for times in draw(video(frames=8), batch=50, frames=9)[..., 0, 0, 2]:
        there = [*range(8), 6]
        assert list(times) in (there, there[::-1])


def test_images_drift_at_even_constant_velocity():
    speeds = []
    for sample in draw(image(), batch=300, crop=32, image_share=1.0):
        lefts, tops = sample[:, 0, :, 0].min(axis=1), 2 * sample[:, 0, 0, 1]
        for positions, room in ((lefts, 240 - 32), (tops, 200 - 32)):
            moves = np.diff(positions)
            assert (moves % 2 == 0).all() and np.abs(moves).max() <= 8
            assert positions.min() >= 0 and positions.max() <= room
            if 40 < positions[0] < room - 40:  # too far from the borders to bounce
                assert (moves == moves[0]).all()
        speeds.append((lefts[1] - lefts[0], tops[1] - tops[0]))
    still = np.mean([speed == (0, 0) for speed in speeds])
    assert 0.2 < still < 0.4
    assert len(set(speeds)) > 50


def test_windows_bounce_off_the_borders_of_an_image():
    for sample in draw(image(40, 40), batch=50, frames=60, crop=32, image_share=1.0):
        lefts = sample[:, 0, :, 0].min(axis=1)
        assert lefts.min() >= 0 and lefts.max() <= 8


@settings(max_examples=30)
@given(
    frames=st.integers(1, 4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    wanted=st.integers(1, 9),
    crop=st.integers(1, 10),
)
def test_any_source_fills_any_crop(frames, height, width, wanted, crop):
    clip = coordinates(frames, 2 * height, 2 * width)
    clips = ClipSet((clip,), ()) if frames > 1 else ClipSet((), (clip,))
    samples = draw(clips, frames=wanted, crop=2 * crop, batch=2)
    assert samples.shape == (2, wanted, 2 * crop, 2 * crop, 3)
    assert samples[..., 0].max() < 2 * width and samples[..., 1].max() < height
    assert samples[..., 2].max() < frames


def test_tiny_sources_are_replicated():
    sample = draw(video(height=8, width=8), batch=20, crop=16)
    luma = np.sort(sample[..., 0], axis=-1)  # undoes the mirroring
    assert (luma == np.minimum(np.arange(16), 7)).all()
    assert (sample[..., 1] == np.minimum(np.arange(16) // 2, 3)[:, None]).all()


def test_images_and_videos_are_mixed_as_asked():
    clips = ClipSet((coordinates(30, 32, 32, mark=1),), (coordinates(1, 32, 32),))
    from_image = draw(clips, batch=400, image_share=0.25)[:, 0, 0, 0, 2] == 0
    assert 0.17 < from_image.mean() < 0.33
    assert (draw(clips, image_share=1.0)[:, 0, 0, 0, 2] == 0).all()
    assert (draw(clips, image_share=0.0)[:, 0, 0, 0, 2] > 0).all()


def test_videos_are_drawn_by_pixels_and_frames():
    clips = ClipSet((coordinates(10, 32, 32), coordinates(15, 32, 64, mark=100)), ())
    second = draw(clips, batch=400)[:, 0, 0, 0, 2] >= 100
    assert 0.68 < second.mean() < 0.82  # 3 / 4


def test_cuts_take_frame_0_from_another_clip():
    clips = ClipSet((coordinates(10, 32, 32), coordinates(10, 32, 32, mark=100)), ())
    scene = draw(clips, batch=400, cut_share=0.3)[..., 0, 0, 2] >= 100
    assert (scene[:, 1:] == scene[:, 1:2]).all()
    # Half of the other clips are the same clip.
    assert 0.09 < (scene[:, 0] != scene[:, 1]).mean() < 0.21


@pytest.mark.parametrize("wrong", [{"crop": 15}, {"crop": 0}, {"batch": 0}, {"frames": 0}])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(NvcError):
        draw(video(), **wrong)
    with pytest.raises(NvcError, match="no clip"):
        draw(ClipSet((), ()))
