"""What benchmarks do with clips: cut them to a size and some frames, code them into files."""

import functools
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nvc_jax import bitstream, codec, unit_program
from nvc_jax.metrics import psnr_611
from nvc_jax.models.released import Released
from nvc_jax.schedule import Schedule
from nvc_jax.unit_program import UnitCodec
from nvc_jax.video import Planes, VideoInfo, open_video


def read_clip(path: str, size: tuple[int, int], frames: int) -> tuple[VideoInfo, list[Planes]]:
    """The first pictures of a clip, of which the middle is cut out, (width, height) at most."""
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

    return VideoInfo(width, height, info.fps), [cut(planes) for planes in islice(pictures, frames)]


def compiled_once(model: Released) -> Callable[..., UnitCodec]:
    """prepared(info of a clip, entropy mode, margin exponents): as `unit_program.prepare`.

    Every size and entropy mode is compiled but once.
    """

    @functools.cache
    def compiled(width, height, entropy_mode):
        return unit_program.prepare(model, width, height, entropy_mode)

    def prepared(
        info: VideoInfo, entropy_mode: int | None = None, exponents: tuple = ()
    ) -> UnitCodec:
        found = compiled(info.width, info.height, entropy_mode)
        return unit_program.with_margins(found, exponents) if exponents else found

    return prepared


def encode_clip(
    unit_codec: UnitCodec,
    info: VideoInfo,
    pictures: list[Planes],
    qp: int,
    path: Path,
    schedule: Schedule | None = None,
) -> tuple[list[codec.EncodedUnit], list[float]]:
    """Encodes pictures into a file, by default in the model's own order.

    Returns:
      The `EncodedUnit`s, and PSNR 6:1:1 of every picture, both in the order of coding.
    """
    schedule = schedule or codec.schedule_for(unit_codec.model)
    units, scores = [], []
    with bitstream.write_stream(path, codec.make_header(unit_codec, info, schedule)) as out:
        for unit in codec.encode(unit_codec, pictures, qp, schedule, render=True):
            out.write(unit.packet)
            units.append(unit)
            scores += map(psnr_611, unit.pictures, unit.recons)
    return units, scores


def progress() -> Progress:
    """A bar on stderr, for what takes minutes; nothing is left of it."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
