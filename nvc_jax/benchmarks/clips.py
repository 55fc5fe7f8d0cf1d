"""Clips as benchmarks take them: cut to a size and a number of frames, coded into a file."""

from fractions import Fraction
from itertools import islice
from pathlib import Path

from nvc_jax import bitstream
from nvc_jax import codec as coding
from nvc_jax.metrics import psnr_611
from nvc_jax.schedule import Schedule
from nvc_jax.unit_program import UnitCodec
from nvc_jax.video import Planes, VideoInfo, open_video


def clip_pictures(path: str, size: tuple[int, int], frames: int) -> list[Planes]:
    """The middle of a clip's pictures, cut to (width, height) at most."""
    info, pictures = open_video(path)
    width, height = min(size[0], info.width), min(size[1], info.height)
    left, top = (info.width - width) // 4 * 2, (info.height - height) // 4 * 2

    def cut(planes: Planes) -> Planes:
        y, u, v = planes
        rows, cols = (
            slice(top // 2, (top + height + 1) // 2),
            slice(left // 2, (left + width + 1) // 2),
        )
        return Planes(y[top : top + height, left : left + width], u[rows, cols], v[rows, cols])

    return [cut(planes) for planes in islice(pictures, frames)]


def encode_clip(
    codec: UnitCodec,
    pictures: list[Planes],
    fps: Fraction,
    qp: int,
    path: Path,
    schedule: Schedule | None = None,
) -> tuple[list[coding.EncodedUnit], list[float]]:
    """Encodes pictures into a file, by default in the model's own order.

    Returns:
      The `EncodedUnit`s, and PSNR 6:1:1 of every picture, both in the order of coding.
    """
    schedule = schedule or coding.schedule_for(codec.model)
    info = VideoInfo(codec.width, codec.height, fps)
    header = coding.make_header(codec, info, schedule)
    units, scores = [], []
    with bitstream.write_stream(path, header) as out:
        for unit in coding.encode(codec, pictures, qp, schedule, render=True):
            out.write(unit.packet)
            units.append(unit)
            scores += map(psnr_611, unit.pictures, unit.recons)
    return units, scores
