"""Conventional codecs: every one codes and decodes here, or says why not."""

import os
import shutil
import stat
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nvc_jax.errors import NvcError
from nvc_jax.evaluation import anchors
from nvc_jax.evaluation.anchors import ANCHORS, code_clip, ffmpeg_version, find_ffmpeg
from nvc_jax.metrics import clip_scores
from nvc_jax.video import Planes, VideoInfo


@pytest.fixture(scope="module")
def ffmpeg() -> str:
    try:
        return find_ffmpeg()
    except NvcError as error:
        pytest.skip(str(error))


def moving(width: int, height: int, frames: int) -> list[Planes]:
    """A smooth pattern that moves two samples a frame."""

    def plane(h, w, shift):
        x, y = np.arange(w) + shift, np.arange(h)[:, None]
        return (128 + 60 * np.sin(x / 9) + 50 * np.cos(y / 7 + x / 31)).astype(np.uint8)

    half = (height + 1) // 2, (width + 1) // 2
    return [
        Planes(plane(height, width, 2 * i), plane(*half, i), plane(*half, i + 5))
        for i in range(frames)
    ]


def code(name, quality, clip, tmp_path, ffmpeg, preset=None, intra_period=0):
    anchor = ANCHORS[name]
    height, width = clip[0].y.shape
    coded = tmp_path / f"{name}{quality}{anchor.suffix}"
    facts, decoded = code_clip(
        anchor,
        preset or anchor.preset,
        quality,
        clip,
        VideoInfo(width, height, Fraction(25)),
        coded,
        tmp_path,
        ffmpeg,
        intra_period,
    )
    assert coded.stat().st_size == facts["file_bytes"]
    return facts, list(decoded)


@pytest.mark.parametrize("name", list(ANCHORS))
def test_codes_decodes_and_trades_rate_for_quality(name, tmp_path, ffmpeg):
    clip = moving(96, 80, 9)
    best, worst = ANCHORS[name].qualities[0], ANCHORS[name].qualities[-1]
    fine, fine_frames = code(name, best, clip, tmp_path, ffmpeg)
    coarse, coarse_frames = code(name, worst, clip, tmp_path, ffmpeg)
    assert fine["file_bytes"] > coarse["file_bytes"]
    assert clip_scores(clip, fine_frames)["psnr"] > 38
    assert clip_scores(clip, coarse_frames)["psnr"] > 18
    assert fine["command"].startswith("ffmpeg ")
    assert str(tmp_path) not in fine["command"] + fine["decode_command"]
    assert fine["setting"].endswith(str(best))
    assert fine["encode_seconds"] > 0
    assert fine["decode_seconds"] > 0


@pytest.mark.parametrize("name", list(ANCHORS))
@pytest.mark.parametrize(("width", "height", "frames"), [(17, 9, 1), (99, 77, 3)])
def test_odd_and_tiny_sizes_are_padded_and_cropped(name, width, height, frames, tmp_path, ffmpeg):
    clip = moving(width, height, frames)
    facts, decoded = code(name, ANCHORS[name].qualities[1], clip, tmp_path, ffmpeg)
    assert facts["coded_size"] == [max(side + side % 2, 64) for side in (width, height)]
    assert clip_scores(clip, decoded)["psnr"] > 33


# VVenC has no intra picture where the clip ends within the period that it would begin.
@pytest.mark.parametrize("period", [0, 32])
@pytest.mark.parametrize("name, every_32", [("x264", 3), ("x265", 3), ("vvenc", 2)])
def test_pictures_are_intra_only_where_they_should(name, every_32, period, tmp_path, ffmpeg):
    clip = moving(64, 64, 70)  # longer than the encoders' usual intra periods at 25 fps
    facts, _ = code(name, 30, clip, tmp_path, ffmpeg, intra_period=period)
    assert ("every 32" in facts["structure"]) == (period > 0)
    data = (tmp_path / f"coded{ANCHORS[name].suffix}").read_bytes()
    starts = [part[:2] for part in data.split(b"\x00\x00\x01")[1:]]
    unit_types = {
        "x264": [start[0] & 31 for start in starts],
        "x265": [start[0] >> 1 & 63 for start in starts],
        "vvenc": [start[1] >> 3 for start in starts],
    }[name]
    random_access = {"x264": {5}, "x265": set(range(16, 24)), "vvenc": {7, 8, 9}}[name]
    assert sum(unit in random_access for unit in unit_types) == (every_32 if period else 1)


def test_ten_bit_pictures_are_rounded_to_nearest(tmp_path):
    values = np.array([0, 1, 2, 509, 510, 1021, 1022, 1023], "<u2")
    luma = np.resize(values, 64 * 64)
    raw = np.concatenate([luma, np.full(2 * 32 * 32, 514, "<u2")])
    (tmp_path / "raw").write_bytes(raw.tobytes())
    info = VideoInfo(63, 61, Fraction(25))
    (planes,) = anchors._read_raw(tmp_path / "raw", 64, 64, info, "yuv420p10le")
    assert planes.y.shape == (61, 63)
    assert planes.u.shape == (31, 32)
    assert planes.y[0, :8].tolist() == [0, 0, 1, 127, 128, 255, 255, 255]
    assert np.all(planes.v == 129)


def test_a_missing_binary_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
    with pytest.raises(NvcError, match="IMAGEIO_FFMPEG_EXE"):
        find_ffmpeg()
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(NvcError, match="pip install"):
        find_ffmpeg()


def test_a_bad_preset_is_an_error_with_the_encoders_words(tmp_path, ffmpeg):
    with pytest.raises(NvcError, match="ffmpeg failed"):
        code("x264", 30, moving(64, 64, 2), tmp_path, ffmpeg, preset="warp9")


@pytest.mark.skipif(os.name == "nt", reason="the stand-ins are shell scripts")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -ILL $$", "signal 4"),
        ("echo no such encoder >&2; exit 3", "status 3: no such encoder"),
        ("for last; do :; done; : > $last", "wrote an empty file"),
        ("for last; do :; done; echo x > $last", "coded 2 pictures but 0 came back"),
    ],
)
def test_a_binary_that_fails_is_an_error_not_a_crash(script, message, tmp_path):
    binary = tmp_path / "ffmpeg"
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(NvcError, match=message):
        code("x264", 30, moving(64, 64, 2), tmp_path, str(binary))


def test_the_environment_chooses_the_binary(monkeypatch, ffmpeg):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg)
    assert find_ffmpeg() == str(Path(ffmpeg).absolute())
    assert "ffmpeg version" in ffmpeg_version(ffmpeg)


def test_a_binary_that_is_no_ffmpeg_is_refused():
    with pytest.raises(NvcError, match="is no FFmpeg"):
        ffmpeg_version(shutil.which("true"))
