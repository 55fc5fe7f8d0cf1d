"""Small training sets, held in memory as 4:2:0 planes.

A folder of videos and photographs is decoded once. After that a batch costs a few slices (see
`nvc_jax.data.pipeline`), so this suits sets that fit in memory, at 1.5 bytes per pixel and frame.
"""

import logging
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvc_jax.errors import NvcError
from nvc_jax.files import visible_files
from nvc_jax.video import open_video

log = logging.getLogger(__name__)


class Clip(NamedTuple):
    """A video, or a photograph as a clip of one frame, of even height and width."""

    y: np.ndarray  # uint8 [frames, height, width]
    u: np.ndarray  # uint8 [frames, height / 2, width / 2]
    v: np.ndarray  # same as u


@dataclass(frozen=True)
class ClipSet:
    """Decoded training material, in the sorted order of the file names."""

    videos: tuple[Clip, ...]
    images: tuple[Clip, ...]
    skipped: tuple[str, ...] = ()  # one message per file that could not be read


def load_clips(folder: str | PathLike, *, progress: bool = True) -> ClipSet:
    """Decode every file below a folder, except hidden ones, into memory.

    Odd sizes lose their last line or column. Files of one frame count as images. Files that cannot
    be read completely are left out and named in one warning.

    Args:
      folder: searched recursively.
      progress: show a progress bar on standard error.

    Raises:
      NvcError: the folder does not exist or holds nothing readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NvcError(
            f"{folder}: no such folder; give one with videos or images in it (config.data.folder)"
        )
    paths = sorted(visible_files(folder))
    videos, images, skipped = [], [], []
    columns = [TextColumn("reading clips"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.description}")]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=len(paths))
        for path in paths:
            bar.update(task, description=path.name)
            try:
                clip = _load_clip(path)
                (images if len(clip.y) == 1 else videos).append(clip)
            except NvcError as error:
                skipped.append(str(error))
            bar.advance(task)
    if skipped:
        log.warning(
            "%d of %d files left out:\n  %s", len(skipped), len(paths), "\n  ".join(skipped)
        )
    if not videos and not images:
        raise NvcError(f"{folder}: none of its {len(paths)} files is a readable video or image")
    return ClipSet(tuple(videos), tuple(images), tuple(skipped))


def _load_clip(path: Path) -> Clip:
    info, pictures = open_video(path)
    height, width = info.height // 2, info.width // 2
    if not height or not width:
        raise NvcError(f"{path}: {info.width}x{info.height} is too small; 2x2 is the least")
    with closing(pictures):
        y, u, v = zip(*pictures, strict=True)
    return Clip(
        np.stack([plane[: 2 * height, : 2 * width] for plane in y]),
        np.stack([plane[:height, :width] for plane in u]),
        np.stack([plane[:height, :width] for plane in v]),
    )


def stats(clips: ClipSet) -> dict[str, int | float]:
    """Numbers for the run log; `gigabytes` is the host memory held by the planes (1e9 bytes)."""
    everything = clips.videos + clips.images
    return {
        "videos": len(clips.videos),
        "video_frames": sum(len(clip.y) for clip in clips.videos),
        "images": len(clips.images),
        "skipped_files": len(clips.skipped),
        "gigabytes": sum(plane.nbytes for clip in everything for plane in clip) / 1e9,
    }
