"""Video files to and from 8-bit 4:2:0 planes.

`open_video` reads whatever FFmpeg (through PyAV) reads, one picture at a time, so memory does not
grow with the length of a clip. `write_video` writes Y4M, raw YUV, lossless FFV1 in Matroska and
visually lossless H.264 in MP4. Colour is described by ITU-T H.273 code points and travels from the
input file to the output file untouched.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from nvc_jax.errors import NvcError
from nvc_jax.files import replacing

WRITABLE = {
    ".y4m": "uncompressed",
    ".mkv": "lossless FFV1",
    ".mp4": "H.264 viewing copy, not lossless",
    ".yuv": "raw planes without any header",
}
# What a folder is searched for; FFmpeg reads more.
VIDEO_SUFFIXES = (
    ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".y4m",
)  # fmt: skip
DEFAULT_FPS = Fraction(25)  # what FFmpeg assumes too
# PyAV 19 no longer stumbles over titles that are not UTF-8, nor knows the option.
_OPEN_OPTIONS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
_RGB_MATRIX, _BT709_MATRIX, _UNSPECIFIED = 0, 1, 2


class Planes(NamedTuple):
    """One 8-bit 4:2:0 picture; chroma of odd sizes is rounded up."""

    y: np.ndarray  # uint8 [height, width]
    u: np.ndarray  # uint8 [ceil(height / 2), ceil(width / 2)]
    v: np.ndarray  # same as u


@dataclass(frozen=True)
class Colour:
    """ITU-T H.273 code points; 2 = unspecified. A file silent about its range counts as limited."""

    primaries: int = 2
    transfer: int = 2
    matrix: int = 2
    full_range: bool = False


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself."""

    width: int
    height: int
    fps: Fraction
    colour: Colour = Colour()
    frame_count: int | None = None  # an estimate for progress bars; None when the file is silent


def open_video(
    path: str | os.PathLike,
    size: tuple[int, int] | None = None,
    fps: Fraction | int | str | None = None,
) -> tuple[VideoInfo, Iterator[Planes]]:
    """Open a video or a still image for reading.

    Args:
      path: any file that FFmpeg reads; a still image is a clip of one frame. With `size`, or when
        the name ends in `.yuv`, the file is raw 8-bit planar 4:2:0: Y, U and V of each picture one
        after the other, without header or padding.
      size: (width, height) of a raw file.
      fps: frames per second; overrides what the file says. Files that say nothing get 25.

    Returns:
      The description and a lazy iterator of pictures, each of which owns its (contiguous, writable)
      arrays. The file is closed when the iterator is exhausted, closed or dropped.

    Conversions: other YUV formats (4:2:2, 4:4:4, more than 8 bits) become 8-bit 4:2:0 and keep
    their matrix and range; RGB becomes BT.709 limited range, keeping primaries and transfer; grey
    becomes luma with neutral chroma; transparency is dropped. Rotation flags (phones) are applied.
    Every coded picture counts once: variable frame rates are not resampled.

    Raises:
      NvcError: missing, empty, unreadable or damaged file, no video in it, or a raw file whose size
        does not fit; from the iterator: a picture that does not decode, or changes size. A
        container file that ends early without a damaged picture is just a shorter clip.
    """
    path = Path(path)
    _check_input(path)
    fps = None if fps is None else _parse_fps(fps)
    if size is not None:
        return _open_raw(path, size, fps or DEFAULT_FPS)
    if path.suffix.lower() == ".yuv":
        raise NvcError(f"{path}: a raw .yuv file has no header; give its --size WIDTHxHEIGHT")
    return _open_container(path, fps)


def _check_input(path: Path) -> None:
    if not path.exists():
        raise NvcError(f"{path}: no such file")
    if not path.is_file():
        raise NvcError(f"{path}: not a file; give one video file")
    if path.stat().st_size == 0:
        raise NvcError(f"{path}: the file is empty")


def _parse_fps(fps: Fraction | int | str) -> Fraction:
    try:
        value = Fraction(fps)
    except (ValueError, TypeError, ArithmeticError):
        value = Fraction(0)
    if not 0 < value <= 1_000_000 or value.denominator > 1_000_000:
        raise NvcError(f"frame rate {fps}: not a usable number; examples are 25 and 30000/1001")
    return value


def _open_raw(
    path: Path, size: tuple[int, int], fps: Fraction
) -> tuple[VideoInfo, Iterator[Planes]]:
    width, height = size
    if width < 1 or height < 1:
        raise NvcError(f"size {width}x{height}: width and height must be positive")
    luma = width * height
    chroma_shape = ((height + 1) // 2, (width + 1) // 2)
    chroma = chroma_shape[0] * chroma_shape[1]
    frame_bytes = luma + 2 * chroma
    count, rest = divmod(path.stat().st_size, frame_bytes)
    if rest or not count:
        raise NvcError(
            f"{path}: {count} frames of {width}x{height} in 8-bit 4:2:0 leave {rest} of "
            f"{path.stat().st_size} bytes over; check --size"
        )

    def frames() -> Iterator[Planes]:
        with _reading(path), path.open("rb") as file:
            for index in range(count):
                data = np.fromfile(file, np.uint8, frame_bytes)
                if data.size != frame_bytes:
                    raise NvcError(f"{path}: the file shrank while frame {index} was being read")
                yield Planes(
                    data[:luma].reshape(height, width),
                    data[luma : luma + chroma].reshape(chroma_shape),
                    data[luma + chroma :].reshape(chroma_shape),
                )

    return VideoInfo(width, height, fps, Colour(), count), frames()


@contextmanager
def _reading(path: Path):
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        hint = ""
        if isinstance(error, av.InvalidDataError):
            hint = "; FFmpeg must know the format, or say --size WIDTHxHEIGHT for raw 8-bit 4:2:0"
        raise NvcError(f"{path}: cannot be read ({_reason(error)}){hint}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _open_container(path: Path, fps: Fraction | None) -> tuple[VideoInfo, Iterator[Planes]]:
    with _reading(path):
        # Absolute, so that FFmpeg never takes a colon in the name for a protocol.
        container = av.open(str(path.absolute()), **_OPEN_OPTIONS)
    try:
        # FFmpeg shows any text file as a film of a terminal; nobody means that.
        stream = None if container.format.name == "tty" else container.streams.best("video")
        if stream is None:
            raise NvcError(f"{path}: there is no video in this file")
        stream.thread_type = "AUTO"
        # The first picture, not the header, has the last word on size and colour.
        decoded = _decode(path, container, stream)
        first = next(decoded, None)
        if first is None:
            raise NvcError(f"{path}: the file holds no pictures")
    except BaseException:
        container.close()
        raise
    height, width = first[0].y.shape
    rate = fps or _frame_rate(stream)
    info = VideoInfo(width, height, rate, first[1], _frame_count(container, stream, rate))

    def frames() -> Iterator[Planes]:
        with container:
            for index, (planes, _) in enumerate(chain([first], decoded)):
                if planes.y.shape != (height, width):
                    raise NvcError(
                        f"{path}: frame {index} is {planes.y.shape[1]}x{planes.y.shape[0]}, the "
                        f"frames before it {width}x{height}; cut or rescale the file first"
                    )
                yield planes

    return info, frames()


def _decode(path: Path, container, stream) -> Iterator[tuple[Planes, Colour]]:
    # Local, because readers left open are closed when the interpreter ends, after its modules.
    unreadable = (av.FFmpegError, OSError)
    index = 0
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise NvcError(f"{path}: frame {index} is damaged; only what precedes it is usable")
            yield _to_planes(frame)
            index += 1
    except unreadable as error:
        raise NvcError(
            f"{path}: frame {index} cannot be decoded ({_reason(error)}); the file is damaged or "
            "truncated there"
        ) from error


def _frame_rate(stream) -> Fraction:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate:
            return Fraction(rate)
    return DEFAULT_FPS


def _frame_count(container, stream, fps: Fraction) -> int | None:
    if stream.frames > 0:
        return stream.frames
    if container.duration and container.duration > 0:
        return round(container.duration * fps / av.time_base)
    return None


def _to_planes(frame: av.VideoFrame) -> tuple[Planes, Colour]:
    """Samples and colour of one decoded picture, converted to 8-bit 4:2:0 where necessary."""
    layout = frame.format
    matrix, full_range = int(frame.colorspace), frame.color_range == ColorRange.JPEG
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    if layout.name in ("yuv420p", "yuvj420p"):
        full_range |= layout.name == "yuvj420p"  # FFmpeg's old name for full range
    elif layout.is_rgb or layout.has_palette:
        matrix, full_range = _BT709_MATRIX, False
        frame = _convert(frame, ColorRange.JPEG, ColorRange.MPEG, Colorspace.ITU709)
    elif len(layout.components) <= 2:  # grey: swscale wants it to be called full range
        full_range = frame.color_range != ColorRange.MPEG
        frame = _convert(frame, ColorRange.JPEG, ColorRange.JPEG)
    else:
        full_range |= layout.name.startswith("yuvj")
        samples = ColorRange.JPEG if full_range else ColorRange.MPEG
        frame = _convert(frame, samples, samples)
    if matrix == _RGB_MATRIX:  # a contradiction in the file: the samples are YUV
        matrix = _UNSPECIFIED
    planes = Planes(*(_rotate(_plane_array(plane), frame.rotation) for plane in frame.planes))
    return planes, Colour(primaries, transfer, matrix, full_range)


def _convert(frame, source_range, target_range, target_matrix=None) -> av.VideoFrame:
    return frame.reformat(
        format="yuv420p",
        src_color_range=source_range,
        dst_color_range=target_range,
        dst_colorspace=target_matrix,
        # Chroma samples become the average of the area they cover, and rounding is exact.
        interpolation=Interpolation.AREA
        | Interpolation.ACCURATE_RND
        | Interpolation.FULL_CHR_H_INP
        | Interpolation.BITEXACT,
    )


def _plane_array(plane) -> np.ndarray:
    """uint8 [height, width] copy of a plane, without the padding at the end of its lines."""
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return lines[: plane.height, : plane.width].copy()


def _rotate(plane: np.ndarray, degrees: int) -> np.ndarray:
    """Turn a plane counter-clockwise by a multiple of 90 degrees."""
    turns = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(plane, turns)) if turns else plane


@contextmanager
def write_video(path: str | os.PathLike, info: VideoInfo):
    """Write a video; the extension of `path` says how.

    `.mkv` lossless FFV1; `.y4m` and `.yuv` uncompressed; `.mp4` H.264 at CRF 10, meant for viewing.
    The file appears under its name only when it is complete: pictures go to a hidden file beside
    it, which replaces `path` when the `with` block ends and is removed when it fails or is
    interrupted. Y4M carries only size, rate and range of `info`, `.yuv` nothing. Y4M must name a
    chroma position and says `420jpeg`, FFmpeg's choice too when the position is unknown.

    Yields:
      An object whose `write(planes)` appends one picture of the size in `info`.

    Raises:
      NvcError: unknown extension, a directory that is missing or not writable, a full disk, a size
        the format cannot hold (MP4: odd), or no picture was written.
      ValueError: planes of the wrong shape or type.
    """
    path = Path(path)
    kind = path.suffix.lower()
    _check_output(path, kind, info)
    with replacing(path) as hidden:
        with _writing(path):
            if kind in (".y4m", ".yuv"):
                writer = _PlainWriter(path, hidden, info, headers=kind == ".y4m")
            else:
                writer = _EncodedWriter(path, hidden, info, lossless=kind == ".mkv")
        try:
            yield writer
            if not writer.count:
                raise NvcError(f"{path}: not written, because there were no pictures")
            with _writing(path):
                writer.close()
        except BaseException:
            writer.discard()
            raise


def _check_output(path: Path, kind: str, info: VideoInfo) -> None:
    if kind not in WRITABLE:
        choices = ", ".join(f"{ending} ({what})" for ending, what in WRITABLE.items())
        raise NvcError(f"{path}: cannot write files of this kind; choose one of {choices}")
    if kind == ".mp4" and (info.width % 2 or info.height % 2):
        raise NvcError(
            f"{path}: H.264 needs even sizes, the video is {info.width}x{info.height}; "
            "write .mkv or .y4m instead"
        )


@contextmanager
def _writing(path: Path):
    try:
        yield
    except (av.FFmpegError, OSError, OverflowError) as error:
        raise NvcError(f"{path}: cannot be written ({_reason(error)})") from error


class _PlainWriter:
    """Planes one after the other, for Y4M with its text headers (see the yuv4mpeg(5) manual)."""

    def __init__(self, path: Path, hidden: Path, info: VideoInfo, headers: bool):
        self.path, self.info, self.count = path, info, 0
        self.file = hidden.open("wb")
        self.picture_header = b"FRAME\n" if headers else b""
        if headers:
            self.file.write(
                f"YUV4MPEG2 W{info.width} H{info.height} "
                f"F{info.fps.numerator}:{info.fps.denominator} Ip A0:0 C420jpeg "
                f"XCOLORRANGE={'FULL' if info.colour.full_range else 'LIMITED'}\n".encode()
            )

    def write(self, planes: Planes) -> None:
        _check_planes(planes, self.info)
        with _writing(self.path):
            self.file.write(self.picture_header)
            for plane in planes:
                self.file.write(np.ascontiguousarray(plane))
        self.count += 1

    def close(self) -> None:
        self.file.close()

    def discard(self) -> None:
        with suppress(OSError):
            self.file.close()


class _EncodedWriter:
    """FFV1 or H.264 through FFmpeg."""

    def __init__(self, path: Path, hidden: Path, info: VideoInfo, lossless: bool):
        self.path, self.info, self.count = path, info, 0
        if lossless:
            # FFmpeg's own number of slices suits all but pictures of a few pixels.
            codec = "ffv1"
            options = {"slices": "1"} if max(info.width, info.height) <= 288 else {}
        else:
            codec, options = "libx264", {"crf": "10", "preset": "veryfast"}
        self.container = av.open(str(hidden.absolute()), "w")
        self.stream = self.container.add_stream(codec, rate=info.fps, options=options)
        self.stream.thread_type = "AUTO"
        self.stream.pix_fmt = "yuv420p"
        self.stream.width, self.stream.height = info.width, info.height
        _set_colour(self.stream.codec_context, info.colour)
        self.stream.codec_context.open()  # unusable settings fail here, not at the first picture

    def write(self, planes: Planes) -> None:
        _check_planes(planes, self.info)
        frame = av.VideoFrame(self.info.width, self.info.height, "yuv420p")
        for target, plane in zip(frame.planes, planes, strict=True):
            lines = np.frombuffer(target, np.uint8).reshape(-1, target.line_size)
            lines[: target.height, : target.width] = plane
        frame.pts, frame.time_base = self.count, 1 / self.info.fps
        _set_colour(frame, self.info.colour)
        with _writing(self.path):
            self.container.mux(self.stream.encode(frame))
        self.count += 1

    def close(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()

    def discard(self) -> None:
        with suppress(av.FFmpegError, OSError):
            self.container.close()


def _set_colour(target: av.VideoFrame | av.VideoCodecContext, colour: Colour) -> None:
    target.color_range = ColorRange.JPEG if colour.full_range else ColorRange.MPEG
    target.colorspace = colour.matrix
    target.color_primaries = colour.primaries
    target.color_trc = colour.transfer


def _check_planes(planes: Planes, info: VideoInfo) -> None:
    chroma = ((info.height + 1) // 2, (info.width + 1) // 2)
    for plane, shape in zip(planes, ((info.height, info.width), chroma, chroma), strict=True):
        if plane.shape != shape or plane.dtype != np.uint8:
            raise ValueError(f"plane {plane.dtype} {plane.shape}, expected uint8 {shape}")
