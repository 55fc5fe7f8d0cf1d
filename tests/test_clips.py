"""Training clips in memory."""

import logging

import numpy as np
import pytest
from conftest import write_clip

from nvc_jax.data.clips import load_clips, stats
from nvc_jax.errors import NvcError
from nvc_jax.video import Planes


def save(path, count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    chroma = ((height + 1) // 2, (width + 1) // 2)
    shapes = ((height, width), chroma, chroma)
    path.parent.mkdir(exist_ok=True)
    pictures = [Planes(*(rng.integers(0, 256, s, np.uint8) for s in shapes)) for _ in range(count)]
    write_clip(path, pictures)
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


def test_useless_folders_are_refused(tmp_path):
    with pytest.raises(NvcError, match="no such folder"):
        load_clips(tmp_path / "missing")
    with pytest.raises(NvcError, match="none of its 0"):
        load_clips(tmp_path)
    (tmp_path / "words.txt").write_text("words " * 100)
    with pytest.raises(NvcError, match="none of its 1"):
        load_clips(tmp_path)
