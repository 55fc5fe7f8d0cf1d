"""Reading and writing of video files: exactness, colour, conversions, damage, tidiness."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.errors import NvcError
from nvc_jax.video import Colour, Planes, VideoInfo, open_video, write_video

EVAL = Path(__file__).parents[1].parent / "shared/data/eval"
LOSSLESS = ("mkv", "y4m", "yuv")


def noise(width, height, count=1, seed=0):
    rng = np.random.default_rng(seed)
    chroma = ((height + 1) // 2, (width + 1) // 2)
    shapes = ((height, width), chroma, chroma)
    return [Planes(*(rng.integers(0, 256, s, np.uint8) for s in shapes)) for _ in range(count)]


def write(path, pictures, fps=Fraction(25), colour=None):
    height, width = pictures[0].y.shape
    with write_video(path, VideoInfo(width, height, fps, colour or Colour())) as out:
        for planes in pictures:
            out.write(planes)
    return path


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for plane_a, plane_b in zip(a, b, strict=True):
            np.testing.assert_array_equal(plane_a, plane_b)


def encode(path, codec, layout, planes, count=1, colour_range=0, rotation=0, options=None):
    """Write with PyAV directly; planes are uint8 [lines, bytes], as `layout` has them in memory."""
    lines, line_bytes = planes[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height = lines
        stream.width = line_bytes * 8 // av.VideoFormat(layout).padded_bits_per_pixel
        if len(planes) > 1:
            stream.width = line_bytes // (2 if "10" in layout else 1)
        stream.pix_fmt = layout
        stream.codec_context.color_range = colour_range
        if rotation:
            stream.set_display_rotation(rotation)
        for _ in range(count):
            frame = av.VideoFrame(stream.width, stream.height, layout)
            frame.color_range = colour_range
            for target, plane in zip(frame.planes, planes, strict=True):
                memory = np.frombuffer(target, np.uint8).reshape(-1, target.line_size)
                memory[: plane.shape[0], : plane.shape[1]] = plane
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@settings(max_examples=15)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    count=st.integers(1, 3),
    kind=st.sampled_from(LOSSLESS),
)
def test_lossless_kinds_round_trip_any_size(tmp_path_factory, width, height, count, kind):
    pictures = noise(width, height, count)
    path = write(tmp_path_factory.mktemp("clip") / f"a.{kind}", pictures)
    info, frames = open_video(path, size=(width, height) if kind == "yuv" else None)
    assert (info.width, info.height, info.frame_count) == (width, height, count)
    same(list(frames), pictures)


def test_pictures_own_contiguous_writable_arrays(tmp_path):
    for path in (
        write(tmp_path / "a.mkv", noise(33, 17, 2)),
        write(tmp_path / "a.yuv", noise(8, 8)),
    ):
        _, frames = open_video(path, size=(8, 8) if path.suffix == ".yuv" else None)
        for plane in next(frames):
            assert plane.flags.c_contiguous and plane.flags.writeable


@pytest.mark.parametrize("kind", ["mkv", "mp4", "y4m"])
@pytest.mark.parametrize("colour", [Colour(1, 1, 1, False), Colour(9, 16, 9, True), Colour()])
@pytest.mark.parametrize("fps", [Fraction(24), Fraction(30000, 1001), Fraction(15, 2)])
def test_colour_and_rate_survive(tmp_path, kind, colour, fps):
    info, frames = open_video(write(tmp_path / f"a.{kind}", noise(32, 16, 3), fps, colour))
    assert info.fps == fps
    expected = Colour(full_range=colour.full_range) if kind == "y4m" else colour
    assert info.colour == expected
    assert sum(1 for _ in frames) == 3


def test_mp4_is_visually_lossless(tmp_path):
    ramp = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8) + 40
    picture = Planes(ramp, ramp[::2, ::2] // 2 + 64, ramp[::2, ::2] // 3 + 64)
    _, frames = open_video(write(tmp_path / "a.mp4", [picture] * 3))
    for planes in frames:
        for got, want in zip(planes, picture, strict=True):
            assert np.abs(got.astype(int) - want).mean() < 1.5


def test_y4m_header_is_what_others_expect(tmp_path):
    path = write(tmp_path / "a.y4m", noise(5, 3), Fraction(30000, 1001))
    header, rest = path.read_bytes().split(b"\n", 1)
    assert header.split()[:4] == [b"YUV4MPEG2", b"W5", b"H3", b"F30000:1001"]
    assert len(rest) == len(b"FRAME\n") + 5 * 3 + 2 * 3 * 2


# --- conversions -----------------------------------------------------------------------------


def test_rgb_becomes_bt709_limited_range(tmp_path):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (12, 16, 3), np.uint8)
    rgb = blocks.repeat(2, axis=0).repeat(2, axis=1)
    path = encode(tmp_path / "a.png", "png", "rgb24", [rgb.reshape(24, -1)])
    info, frames = open_video(path)
    (planes,) = frames
    assert (info.fps, info.colour.matrix, info.colour.full_range) == (25, 1, False)
    luma = rgb @ [0.2126, 0.7152, 0.0722] / 255
    blue = (rgb[..., 2] / 255 - luma) / 1.8556
    red = (rgb[..., 0] / 255 - luma) / 1.5748
    assert np.abs(planes.y - (16 + 219 * luma)).max() < 0.6
    assert np.abs(planes.u - (128 + 224 * blue[::2, ::2])).max() < 0.6
    assert np.abs(planes.v - (128 + 224 * red[::2, ::2])).max() < 0.6


@pytest.mark.parametrize("colour_range", [0, 1, 2])
def test_444_keeps_luma_and_range_and_averages_chroma(tmp_path, colour_range):
    luma = np.tile(np.arange(0, 256, 4, np.uint8), (16, 1))
    chroma = np.random.default_rng(0).integers(0, 256, (8, 32), np.uint8)
    wide = chroma.repeat(2, axis=0).repeat(2, axis=1)
    path = encode(
        tmp_path / "a.mkv", "ffv1", "yuv444p", [luma, wide, wide], colour_range=colour_range
    )
    info, frames = open_video(path)
    assert info.colour.full_range == (colour_range == 2)
    same(list(frames), [Planes(luma, chroma, chroma)])


@pytest.mark.parametrize("colour_range", [0, 1, 2])
def test_ten_bits_become_eight(tmp_path, colour_range):
    luma = np.tile(np.arange(0, 1024, 16, np.uint16), (16, 1))
    chroma = luma[::2, ::2].copy()
    memory = [plane.view(np.uint8) for plane in (luma, chroma, chroma)]
    path = encode(tmp_path / "a.mkv", "ffv1", "yuv420p10le", memory, colour_range=colour_range)
    info, frames = open_video(path)
    (planes,) = frames
    assert info.colour.full_range == (colour_range == 2)
    assert np.abs(planes.y - luma / 4).max() <= 1
    assert np.abs(planes.u - chroma / 4).max() <= 1


def test_grey_image_keeps_its_values(tmp_path):
    grey = np.tile(np.arange(0, 256, 8, np.uint8), (9, 1))
    info, frames = open_video(encode(tmp_path / "a.png", "png", "gray", [grey]))
    neutral = np.full((5, 16), 128, np.uint8)
    assert info.colour.full_range
    same(list(frames), [Planes(grey, neutral, neutral)])


def test_jpeg_stays_full_range_without_resampling(tmp_path):
    (picture,) = noise(33, 17)
    flat = Planes(*(np.full_like(p, level) for p, level in zip(picture, (250, 90, 3), strict=True)))
    info, frames = open_video(encode(tmp_path / "a.jpg", "mjpeg", "yuvj420p", flat))
    assert info.colour.full_range and (info.width, info.height) == (33, 17)
    same(list(frames), [flat])


def test_rotation_flag_is_applied(tmp_path):
    (picture,) = noise(64, 48)
    path = encode(tmp_path / "a.mp4", "libx264", "yuv420p", picture, 1, 1, 90, {"qp": "0"})
    info, frames = open_video(path)
    assert (info.width, info.height) == (48, 64)
    same(list(frames), [Planes(*(np.rot90(plane) for plane in picture))])


# --- bad input -------------------------------------------------------------------------------


def fails(path, *mentions, **options):
    with pytest.raises(NvcError) as caught:
        list(open_video(path, **options)[1])
    for text in (Path(path).name, *mentions):
        assert text in str(caught.value)


def test_what_is_no_video_says_so(tmp_path):
    fails(tmp_path / "missing.mp4", "no such file")
    fails(tmp_path, "not a file")
    for name, content in (
        ("empty.mkv", b""),
        ("noise.mp4", np.random.default_rng(0).bytes(5000)),
        ("notes.txt", b"these are some words\n" * 50),
        ("header.y4m", b"YUV4MPEG2 W64 H48 F25:1\n"),
        ("zero.y4m", b"YUV4MPEG2 W0 H48 F25:1\nFRAME\n"),
    ):
        (tmp_path / name).write_bytes(content)
        fails(tmp_path / name)


def test_raw_files_need_a_size_that_fits(tmp_path):
    path = write(tmp_path / "a.yuv", noise(8, 6, 2))
    fails(path, "--size")
    fails(path, "12 of 144 bytes", "--size", size=(6, 7))
    fails(path, size=(1000, 1000))
    for size in ((0, 5), (-8, -6)):
        with pytest.raises(NvcError):
            open_video(path, size=size)
    info, _ = open_video(path, size=(8, 6), fps="30000/1001")
    assert info.fps == Fraction(30000, 1001)
    for fps in ("fast", 0, -1, "1/0", 1e300):
        with pytest.raises(NvcError, match="frame rate"):
            open_video(path, size=(8, 6), fps=fps)


def test_file_without_rate_gets_25(tmp_path):
    (tmp_path / "a.y4m").write_bytes(b"YUV4MPEG2 W2 H2 F0:0 C420jpeg\nFRAME\n" + bytes(6))
    info, frames = open_video(tmp_path / "a.y4m")
    assert info.fps == 25 and len(list(frames)) == 1


@pytest.mark.parametrize("kind", ["mkv", "y4m"])
def test_truncated_file_is_a_shorter_clip(tmp_path, kind):
    pictures = noise(64, 48, 8)
    path = write(tmp_path / f"a.{kind}", pictures)
    os.truncate(path, path.stat().st_size * 6 // 10)
    _, frames = open_video(path)
    got = list(frames)
    assert 3 <= len(got) <= 5
    same(got, pictures[: len(got)])


def test_damaged_picture_is_named(tmp_path):
    path = write(tmp_path / "a.y4m", noise(16, 16, 5))
    data = bytearray(path.read_bytes())
    third = len(data) - 3 * (6 + 384)
    data[third : third + 5] = b"BROKE"
    path.write_bytes(data)
    _, frames = open_video(path)
    next(frames), next(frames)
    with pytest.raises(NvcError, match="frame 2 cannot be decoded"):
        next(frames)


def test_title_in_an_unknown_encoding_is_harmless(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caf##"
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert b"Caf##" in data
    path.write_bytes(data.replace(b"Caf##", b"Caf\xe9 "))
    assert len(list(open_video(path)[1])) == 1


def test_change_of_size_is_refused(tmp_path):
    parts = [
        encode(tmp_path / f"{size}.h264", "libx264", "yuv420p", noise(size, size)[0], count=2)
        for size in (64, 32)
    ]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    fails(path, "frame 2 is 32x32", "64x64")


# --- tidy output -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mkv", "mp4", "y4m", "yuv"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failure_leaves_nothing_and_keeps_the_old_file(tmp_path, kind, error):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"precious")
    for written in (0, 2):
        with pytest.raises(error), write_video(path, VideoInfo(16, 16, Fraction(25))) as out:
            for planes in noise(16, 16, written):
                out.write(planes)
            assert path.read_bytes() == b"precious"
            raise error
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"precious"


def test_unusable_targets_are_refused(tmp_path):
    info = VideoInfo(15, 16, Fraction(25))
    for target, reason in (
        ("a.wmv", "y4m"),
        ("a", "y4m"),
        ("missing/a.mkv", "does not exist"),
        ("odd.mp4", "mkv"),
        ("none.mkv", "no pictures"),
        ("none.yuv", "no pictures"),
    ):
        with pytest.raises(NvcError, match=reason), write_video(tmp_path / target, info):
            pass
    (tmp_path / "folder.mkv").mkdir()
    with pytest.raises(NvcError, match="not a file"), write_video(tmp_path / "folder.mkv", info):
        pass
    assert os.listdir(tmp_path) == ["folder.mkv"]


@pytest.mark.parametrize("kind", ["mkv", "y4m"])
def test_planes_of_another_size_are_a_bug(tmp_path, kind):
    for wrong in (noise(16, 14)[0], Planes(*(p.astype(np.int16) for p in noise(16, 16)[0]))):
        info = VideoInfo(16, 16, Fraction(25))
        with pytest.raises(ValueError), write_video(tmp_path / f"a.{kind}", info) as out:
            out.write(wrong)


def test_evaluation_clip_copies_exactly(tmp_path):
    source = EVAL / "juggle_cif.mkv"
    if not source.exists():
        pytest.skip("the evaluation clips are not here")
    info, frames = open_video(source)
    pictures = list(frames)
    assert (info.width, info.height, info.fps, len(pictures)) == (352, 288, 24, 33)
    copy_info, copy = open_video(write(tmp_path / "a.mkv", pictures, info.fps, info.colour))
    assert copy_info.colour == info.colour
    same(list(copy), pictures)
