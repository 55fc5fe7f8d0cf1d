"""In-memory training clips: loading, the random cuts, exact resume."""

import logging
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.data.clips import Clip, ClipSet, load_clips, sample_batch, stats
from nvc_jax.errors import NvcError
from nvc_jax.video import Planes, VideoInfo, write_video


def coordinates(frames, height, width, mark=0):
    """A clip that says where each sample came from: Y = column, U = 2x2 row, V = frame + mark."""
    y = np.broadcast_to(np.arange(width, dtype=np.uint8), (frames, height, width))
    rows = np.arange(height // 2, dtype=np.uint8)[:, None]
    u = np.broadcast_to(rows, (frames, height // 2, width // 2))
    times = np.arange(mark, mark + frames, dtype=np.uint8)[:, None, None]
    return Clip(y, u, np.broadcast_to(times, u.shape))


def draw(clips, step=0, batch=8, frames=5, crop=16, image_share=0.0, cut_share=0.0):
    options = {"batch": batch, "frames": frames, "crop": crop}
    options |= {"image_share": image_share, "cut_share": cut_share}
    return sample_batch(clips, seed=3, step=step, **options)["frames"].astype(int)


def video(frames=30, height=64, width=96):
    return ClipSet((coordinates(frames, height, width),), ())


def image(height=200, width=240):
    return ClipSet((), (coordinates(1, height, width),))


# --- cutting ---------------------------------------------------------------------------------


def test_a_batch_depends_on_its_arguments_only():
    clips = ClipSet((coordinates(30, 64, 96),), (coordinates(1, 64, 64),))
    options = {"batch": 4, "frames": 5, "crop": 32, "image_share": 0.5}
    first = [sample_batch(clips, seed=1, step=step, **options)["frames"] for step in range(4)]
    again = [sample_batch(clips, seed=1, step=step, **options)["frames"] for step in (3, 2, 1, 0)]
    for a, b in zip(first, reversed(again), strict=True):
        assert a.shape == (4, 5, 32, 32, 3) and a.dtype == np.uint8
        np.testing.assert_array_equal(a, b)
    other = sample_batch(clips, seed=2, step=0, **options)["frames"]
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], other)


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
    assert 0.22 < (scene[:, 0] != scene[:, 1]).mean() < 0.38
    assert draw(video(), cut_share=1.0).shape  # alone there is nothing to cut to


@pytest.mark.parametrize("wrong", [{"crop": 15}, {"crop": 0}, {"batch": 0}, {"frames": 0}])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(NvcError):
        draw(video(), **wrong)


# --- loading ---------------------------------------------------------------------------------


def save(path, count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    chroma = ((height + 1) // 2, (width + 1) // 2)
    shapes = ((height, width), chroma, chroma)
    path.parent.mkdir(exist_ok=True)
    pictures = [Planes(*(rng.integers(0, 256, s, np.uint8) for s in shapes)) for _ in range(count)]
    with write_video(path, VideoInfo(width, height, Fraction(25))) as out:
        for planes in pictures:
            out.write(planes)
    return pictures


def test_folder_is_read_in_order_and_damaged_files_are_named(tmp_path, caplog):
    last = save(tmp_path / "b/z.mkv", 4, 17, 33)
    first = save(tmp_path / "a.y4m", 6, 16, 24, seed=1)
    still = save(tmp_path / "c/still.mkv", 1, 20, 20, seed=2)
    save(tmp_path / "speck.y4m", 2, 1, 9)
    save(tmp_path / ".hidden.y4m", 2, 8, 8)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all" * 100)
    (tmp_path / "empty.mkv").touch()
    damaged = bytearray((tmp_path / "a.y4m").read_bytes())
    damaged[-582:-577] = b"BROKE"
    (tmp_path / "damaged.y4m").write_bytes(damaged)

    with caplog.at_level(logging.WARNING):
        clips = load_clips(tmp_path, progress=False)
    assert len(clips.skipped) == 4
    for name in ("broken.mp4", "empty.mkv", "damaged.y4m", "speck.y4m", "4 of 7"):
        assert name in caplog.text

    assert [clip.y.shape for clip in clips.videos] == [(6, 16, 24), (4, 16, 32)]
    assert [clip.y.shape for clip in clips.images] == [(1, 20, 20)]
    for clip, pictures in zip(clips.videos + clips.images, (first, last, still), strict=True):
        height, width = clip.y.shape[1:]
        np.testing.assert_array_equal(clip.y, [p.y[:height, :width] for p in pictures])
        half = [
            (p.u[: height // 2, : width // 2], p.v[: height // 2, : width // 2]) for p in pictures
        ]
        np.testing.assert_array_equal(np.stack([clip.u, clip.v], axis=1), half)

    assert stats(clips) == {
        "videos": 2,
        "video_frames": 10,
        "images": 1,
        "skipped_files": 4,
        "gigabytes": (6 * 16 * 24 + 4 * 16 * 32 + 20 * 20) * 1.5e-9,
    }
    assert len(load_clips(tmp_path, max_frames_per_clip=3, progress=False).videos[0].y) == 3


def test_useless_folders_are_refused(tmp_path):
    with pytest.raises(NvcError, match="no such folder"):
        load_clips(tmp_path / "missing")
    with pytest.raises(NvcError, match="none of its 0"):
        load_clips(tmp_path)
    (tmp_path / "words.txt").write_text("words " * 100)
    with pytest.raises(NvcError, match="none of its 1"):
        load_clips(tmp_path)
