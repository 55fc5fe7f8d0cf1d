"""Conventional codecs to compare with: x264, x265, SVT-AV1 and VVenC, run through FFmpeg.

The binary is the one that the package `imageio-ffmpeg` ships (optional extra `anchors`), or the one
that the environment variable IMAGEIO_FFMPEG_EXE names. Every anchor codes the same 8-bit 4:2:0
frames as we do, from a raw file, and its size is that of the raw elementary stream it writes (IVF
for AV1), so containers cost next to nothing. Picture refresh is switched off: one intra picture at
the start, unless the encoder itself decides for one at a scene cut. All are tuned for PSNR where
they offer it, because PSNR is what we report. x264's and x265's informative text (0.6 and 2.3 kB of
settings in an SEI message) is left out, as it would count for much in short clips.

An anchor's default structure (bidirectional, delays of tens of frames) is an easier task than low
delay. The `-lowdelay` anchors have no bidirectional pictures and no look-ahead.
"""

import os
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvc_jax.errors import NvcError
from nvc_jax.video import Planes, VideoInfo

MIN_SIDE = 64  # smaller pictures are padded to this: some of the encoders refuse them


@dataclass(frozen=True)
class Anchor:
    """How to run one codec; `{preset}`, `{quality}` and `{intra}` in `arguments` are filled in."""

    name: str
    preset: str  # the default one
    structure: str  # in words, for the report
    quality: str  # what the numbers in `qualities` are called
    qualities: tuple[int, ...]  # from high to low quality, wide enough to cover any curve of ours
    arguments: str
    one_intra: str  # in the place of `{intra}`: one intra picture, at the beginning
    periodic: str  # the same for one every `{period}` pictures
    suffix: str  # of the file, and FFmpeg's name of the format
    pixel_format: str = "yuv420p"  # what it decodes to
    scene_cuts: bool = False  # whether it adds intra pictures there, but for `periodic`


_BIDIRECTIONAL = "bidirectional (default)"
_LOW_DELAY = "low delay: no bidirectional pictures, no look-ahead"
_KEYINT = "keyint={period}:min-keyint={period}:scenecut=0"

_X264 = "-c:v libx264 -preset {preset} -tune psnr -crf {quality} "
_X265 = "-c:v libx265 -preset {preset} -tune psnr -crf {quality} "
_NO_SEI = " -bsf:v filter_units=remove_types=6"

ANCHORS = {
    anchor.name: anchor
    for anchor in (
        Anchor(
            name="x264",
            preset="medium",
            structure=_BIDIRECTIONAL,
            quality="crf",
            qualities=(18, 24, 30, 36, 42, 48),
            arguments=_X264 + "-x264-params {intra}" + _NO_SEI,
            one_intra="keyint=infinite",
            periodic=_KEYINT,
            suffix=".h264",
            scene_cuts=True,
        ),
        Anchor(
            name="x264-lowdelay",
            preset="medium",
            structure=_LOW_DELAY,
            quality="crf",
            qualities=(18, 24, 30, 36, 42, 48),
            arguments=_X264
            + "-x264-params {intra}:bframes=0:rc-lookahead=0:sync-lookahead=0:mbtree=0"
            + _NO_SEI,
            one_intra="keyint=infinite:scenecut=0",
            periodic=_KEYINT,
            suffix=".h264",
        ),
        Anchor(
            name="x265",
            preset="medium",
            structure=_BIDIRECTIONAL,
            quality="crf",
            qualities=(18, 24, 30, 36, 42, 48),
            arguments=_X265 + "-x265-params {intra}:info=0:log-level=error",
            one_intra="keyint=-1",
            periodic=_KEYINT,
            suffix=".hevc",
            scene_cuts=True,
        ),
        Anchor(
            name="x265-lowdelay",
            preset="medium",
            structure=_LOW_DELAY,
            quality="crf",
            qualities=(18, 24, 30, 36, 42, 48),
            arguments=_X265
            + "-x265-params {intra}:bframes=0:rc-lookahead=0:cutree=0:info=0:log-level=error",
            one_intra="keyint=-1:scenecut=0",
            periodic=_KEYINT,
            suffix=".hevc",
        ),
        Anchor(
            name="svt-av1",
            preset="6",
            structure=_BIDIRECTIONAL,
            quality="crf",
            qualities=(13, 23, 33, 43, 53, 63),
            arguments="-c:v libsvtav1 -preset {preset} -crf {quality} "
            "-svtav1-params {intra}:tune=1",
            one_intra="keyint=-1",
            periodic="keyint={period}",
            suffix=".ivf",
        ),
        Anchor(
            name="vvenc",
            preset="faster",
            structure=_BIDIRECTIONAL,
            quality="qp",
            qualities=(18, 24, 30, 36, 42, 48),
            # VVenC works in 10 bit; what it decodes to is rounded to 8 bit before measuring. One
            # thread: with more, FFmpeg gives up waiting for the last pictures now and then, and
            # the file ends early or stays empty, with exit status 0.
            arguments="-c:v libvvenc -threads 1 -preset {preset} -qp {quality} -qpa 0 "
            "-vvenc-params {intra}",
            one_intra="intraperiod=-1",
            periodic="intraperiod={period}",
            suffix=".vvc",
            pixel_format="yuv420p10le",
        ),
    )
}


def find_ffmpeg() -> str:
    """Path of the FFmpeg binary.

    Raises:
      NvcError: there is none: the package `imageio-ffmpeg` is missing, or the environment variable
        IMAGEIO_FFMPEG_EXE names no file.
    """
    exe = os.environ.get("IMAGEIO_FFMPEG_EXE")
    if exe:
        if not Path(exe).is_file():
            raise NvcError(f"IMAGEIO_FFMPEG_EXE={exe}: no such file; correct or unset the variable")
        return str(Path(exe).absolute())
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except ImportError as error:
        raise NvcError(
            "the anchors need FFmpeg: pip install 'nvc-jax[anchors]', "
            "or let IMAGEIO_FFMPEG_EXE name a binary"
        ) from error
    except RuntimeError as error:  # imageio-ffmpeg's own message when it has no usable binary
        raise NvcError(f"the anchors need FFmpeg: {error}") from error


def ffmpeg_version(ffmpeg: str) -> str:
    """First line of `ffmpeg -version`. Raises NvcError when that does not run or says nothing."""
    lines = _run([ffmpeg, "-version"], Path.cwd())[0].splitlines()
    if not lines:
        raise NvcError(f"{ffmpeg} is no FFmpeg: it does not say its version")
    return lines[0]


def code_clip(
    anchor: Anchor,
    preset: str,
    quality: int,
    source: Iterable[Planes],
    info: VideoInfo,
    coded: Path,
    scratch: Path,
    ffmpeg: str,
    intra_period: int = 0,
) -> tuple[dict, Iterator[Planes]]:
    """Encode a clip with an anchor, decode the file again.

    Args:
      anchor, preset, quality: which codec at which operating point.
      source: pictures of info.height x info.width; read once.
      info: size and frame rate of the clip.
      coded: where the coded file goes; its suffix has to be `anchor.suffix`.
      scratch: an existing folder for the raw files (they stay there).
      ffmpeg: path of the binary.
      intra_period: an intra picture every so many (VVenC leaves out one that begins a period which
        the clip does not fill); 0 for one at the beginning, and at scene cuts that the
        anchors with `scene_cuts` find.
    Returns:
      (facts, decoded pictures). The facts: `file_bytes`, wall times `encode_seconds` and
      `decode_seconds` of the whole process (raw file in, raw file out), the exact `command`s with
      file names only, `preset`, `structure`, `setting`, and `coded_size` as (width, height): odd
      sizes and sizes below 64 are padded by repeating the border, and cropped after decoding.
    Raises:
      NvcError: the binary lacks the encoder, fails, or decodes another number of pictures.
    """
    width, height = (max(side + side % 2, MIN_SIDE) for side in (info.width, info.height))
    frames = _write_raw(source, width, height, scratch / "source.yuv")
    intra, structure = anchor.one_intra, f"{anchor.structure}, one intra picture"
    if intra_period:
        intra = anchor.periodic.format(period=intra_period)
        structure = f"{anchor.structure}, an intra picture every {intra_period}"
        if intra_period == 1:
            structure = "all intra: every picture on its own"
    elif anchor.scene_cuts:
        structure += " plus scene cuts"
    arguments = anchor.arguments.format(preset=preset, quality=quality, intra=intra).split()
    base = ["-hide_banner", "-v", "error", "-nostdin", "-y"]
    encode = [
        *base,
        *f"-f rawvideo -pix_fmt yuv420p -s {width}x{height} -r {info.fps} -i source.yuv".split(),
        *arguments,
        "coded" + anchor.suffix,
    ]
    decode = [
        *base,
        # The format is named because FFmpeg cannot always guess it from a short stream.
        *f"-f {anchor.suffix[1:]} -i coded{anchor.suffix} -fps_mode passthrough".split(),
        *f"-f rawvideo -pix_fmt {anchor.pixel_format} decoded.yuv".split(),
    ]
    _, encode_seconds = _run([ffmpeg, *encode], scratch)
    data = (scratch / ("coded" + anchor.suffix)).read_bytes()
    if not data:
        raise NvcError(f"{anchor.name} wrote an empty file")
    coded.write_bytes(data)
    _, decode_seconds = _run([ffmpeg, *decode], scratch)
    _check_length(scratch / "decoded.yuv", frames, width, height, anchor)
    facts = {
        "setting": f"{anchor.quality} {quality}",
        "preset": preset,
        "structure": structure,
        "command": shlex.join(["ffmpeg", *encode]),
        "decode_command": shlex.join(["ffmpeg", *decode]),
        "coded_size": [width, height],
        "file_bytes": len(data),
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
    }
    return facts, _read_raw(scratch / "decoded.yuv", width, height, info, anchor.pixel_format)


def _run(command: list[str], folder: Path) -> tuple[str, float]:
    """Output and wall time of a command that is expected to succeed."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise NvcError(f"{command[0]} cannot be run: {error.strerror}") from error
    seconds = time.perf_counter() - start
    if done.returncode < 0:  # killed, for example by an instruction that this CPU lacks
        raise NvcError(f"ffmpeg was ended by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise NvcError(f"ffmpeg failed with status {done.returncode}: {lines[0]}")
    return done.stdout, seconds


def _write_raw(source: Iterable[Planes], width: int, height: int, path: Path) -> int:
    """Write pictures as planar 8-bit 4:2:0 padded to width x height (even); returns how many."""
    count = 0
    with path.open("wb") as file:
        for count, planes in enumerate(source, 1):  # noqa: B007 (it is the result)
            for plane, divisor in zip(planes, (1, 2, 2), strict=True):
                missing = (height // divisor - plane.shape[0], width // divisor - plane.shape[1])
                padded = np.pad(plane, ((0, missing[0]), (0, missing[1])), mode="edge")
                file.write(padded.tobytes())
    return count


def _check_length(path: Path, frames: int, width: int, height: int, anchor: Anchor) -> None:
    picture_bytes = width * height * 3 // 2 * (2 if anchor.pixel_format.endswith("10le") else 1)
    decoded, rest = divmod(path.stat().st_size, picture_bytes)
    if rest or decoded != frames:  # FFmpeg does not call a stream that ends early an error
        raise NvcError(f"{anchor.name} coded {frames} pictures but {decoded} came back")


def _read_raw(
    path: Path, width: int, height: int, info: VideoInfo, pixel_format: str
) -> Iterator[Planes]:
    """Pictures of a raw file, in 8 bit (10 bit is rounded to nearest) and cropped to `info`."""
    ten_bit = pixel_format == "yuv420p10le"
    luma, chroma = width * height, width * height // 4
    crop = info.height, info.width
    chroma_crop = (info.height + 1) // 2, (info.width + 1) // 2
    with path.open("rb") as file:
        while True:
            data = np.fromfile(file, "<u2" if ten_bit else np.uint8, luma + 2 * chroma)
            if not data.size:
                return
            if ten_bit:
                data = np.minimum((data + 2) >> 2, 255).astype(np.uint8)
            y, u, v = np.split(data, [luma, luma + chroma])
            y, u, v = y.reshape(height, width), *(c.reshape(height // 2, -1) for c in (u, v))
            yield Planes(_top_left(y, crop), _top_left(u, chroma_crop), _top_left(v, chroma_crop))


def _top_left(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return plane[: size[0], : size[1]]
