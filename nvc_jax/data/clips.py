"""Small training sets, held in memory as 4:2:0 planes and cut into random clips on the host.

A folder of videos and photographs is decoded once. After that a batch costs a few slices, so this
suits sets that fit in memory (about 1.5 bytes per pixel and frame). Every batch is a pure function
of (clips, seed, step): a run that stops at step n and resumes there sees exactly the same data.
"""

import logging
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvc_jax.errors import NvcError
from nvc_jax.video import open_video

FLIP_SHARE = 0.5
REVERSE_SHARE = 0.5
# Our own choices, not from a paper: half frame rate adds larger motion; a drifting window over a
# photograph is a noise-free pan, as fast as 8 pixels per frame.
HALF_RATE_SHARE = 0.2
STILL_SHARE = 0.3
MAX_DRIFT = 8

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


def load_clips(
    folder: str | PathLike, *, max_frames_per_clip: int | None = None, progress: bool = True
) -> ClipSet:
    """Decode every file below a folder, except hidden ones, into memory.

    Odd sizes lose their last line or column. Files of one frame count as images. Files that cannot
    be read completely are left out and named in one warning.

    Args:
      folder: searched recursively.
      max_frames_per_clip: read no more than the first frames of each file.
      progress: show a progress bar on standard error.

    Raises:
      NvcError: the folder does not exist or holds nothing readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NvcError(f"{folder}: no such folder; give one with videos or images in it")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    videos, images, skipped = [], [], []
    columns = [TextColumn("reading clips"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.description}")]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=len(paths))
        for path in paths:
            bar.update(task, description=path.name)
            try:
                clip = _load_clip(path, max_frames_per_clip)
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


def _load_clip(path: Path, max_frames: int | None) -> Clip:
    info, pictures = open_video(path)
    height, width = info.height // 2, info.width // 2
    if not height or not width:
        raise NvcError(f"{path}: {info.width}x{info.height} is too small; 2x2 is the least")
    with closing(pictures):
        y, u, v = zip(*islice(pictures, max_frames), strict=True)
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


def sample_batch(
    clips: ClipSet,
    *,
    seed: int,
    step: int,
    batch: int,
    frames: int,
    crop: int,
    image_share: float,
    cut_share: float = 0.05,
) -> dict[str, np.ndarray]:
    """Cut one batch of random clips; the same arguments always give the same batch.

    A sample comes from an image with probability `image_share`, else from a video with probability
    proportional to its area times its frames. It is a crop at a random even position, mirrored and
    reversed in time with probability 1/2 each. Clips that are too short bounce forwards and
    backwards; with probability 0.2 videos that are long enough are read at half their frame rate.
    Images become clips by a window that drifts at a constant velocity and bounces off the borders.
    Sources smaller than the crop are padded by replication at the right and bottom.

    Args:
      seed, step: not negative; together they seed the random numbers.
      batch, frames, crop: shape of the result; `crop` is even.
      image_share: share of samples from images (all or none if only one kind is present).
      cut_share: share of samples whose frame 0 comes from a different clip (a hard scene cut).

    Returns:
      {"frames": uint8 [batch, frames, crop, crop, 3]}: Y, U, V at 4:4:4, chroma repeated 2x2.

    Raises:
      NvcError: a size that is not positive, or an odd crop.
    """
    if min(batch, frames, crop) < 1 or crop % 2:
        raise NvcError(
            f"batch {batch}, frames {frames}, crop {crop}: all must be positive and the crop even"
        )
    rng = np.random.default_rng([seed, step])
    everything = clips.images + clips.videos
    video_ends = np.cumsum([clip.y.size for clip in clips.videos])
    samples = np.empty((batch, frames, crop, crop, 3), np.uint8)
    for sample in samples:
        if clips.images and (not clips.videos or rng.random() < image_share):
            index = rng.integers(len(clips.images))
        else:
            position = rng.integers(video_ends[-1])
            index = len(clips.images) + np.searchsorted(video_ends, position, side="right")
        _cut_out(everything[index], sample, rng)
        if len(everything) > 1 and rng.random() < cut_share:
            other = (index + rng.integers(1, len(everything))) % len(everything)
            _cut_out(everything[other], sample[:1], rng)
    return {"frames": samples}


def _cut_out(clip: Clip, sample: np.ndarray, rng: np.random.Generator) -> None:
    """Fill `sample`, uint8 [frames, crop, crop, 3], with a random piece of the clip."""
    frames, crop = sample.shape[:2]
    length, height, width = clip.y.shape
    steps = np.arange(frames)

    stride = 2 if rng.random() < HALF_RATE_SHARE and length > 2 * (frames - 1) else 1
    spare = length - 1 - stride * (frames - 1)
    start = rng.integers(spare + 1 if spare >= 0 else length)
    times = _bounce(start + stride * steps, length - 1)
    if rng.random() < REVERSE_SHARE:
        times = times[::-1]

    velocity = np.zeros(2, int)
    if length == 1 and rng.random() >= STILL_SHARE:
        velocity = 2 * rng.integers(-MAX_DRIFT // 2, MAX_DRIFT // 2 + 1, 2)
    tops, lefts = (
        _bounce(2 * rng.integers(room // 2 + 1) + speed * steps, room)
        for room, speed in zip((max(height - crop, 0), max(width - crop, 0)), velocity, strict=True)
    )

    mirror = slice(None, None, -1 if rng.random() < FLIP_SHARE else 1)
    for target, time, top, left in zip(sample, times, tops, lefts, strict=True):
        target[..., 0] = _window(clip.y[time], top, left, crop)[:, mirror]
        for channel, plane in ((1, clip.u[time]), (2, clip.v[time])):
            chroma = _window(plane, top // 2, left // 2, crop // 2)[:, mirror]
            target[..., channel] = chroma.repeat(2, axis=0).repeat(2, axis=1)


def _bounce(positions: np.ndarray, last: int) -> np.ndarray:
    """Reflect integers at 0 and `last`: 0, 1, ..., last, last - 1, ..., 0, 1, ..."""
    if last == 0:
        return np.zeros_like(positions)
    return last - np.abs(last - positions % (2 * last))


def _window(plane: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """A size x size piece of a plane, padded by replication where the plane is smaller."""
    window = plane[top : top + size, left : left + size]
    bottom, right = size - window.shape[0], size - window.shape[1]
    if bottom or right:
        window = np.pad(window, ((0, bottom), (0, right)), mode="edge")
    return window
