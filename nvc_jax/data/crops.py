"""Random pieces of clips: crops, flips, time reversal, and clips longer than their source."""

import numpy as np

from nvc_jax.data.clips import Clip

FLIP_SHARE = 0.5
REVERSE_SHARE = 0.5
# Our own choices, not from a paper: half frame rate adds larger motion; a drifting window over a
# photograph is a noise-free pan, as fast as 8 pixels per frame.
HALF_RATE_SHARE = 0.2
STILL_SHARE = 0.3
MAX_DRIFT = 8


def cut_out(clip: Clip, sample: np.ndarray, rng: np.random.Generator) -> None:
    """Fill `sample`, uint8 [frames, crop, crop, 3], with a random piece of the clip."""
    frames, crop = sample.shape[:2]
    length, height, width = clip.y.shape
    steps = np.arange(frames)

    stride = 2 if rng.random() < HALF_RATE_SHARE and length > 2 * (frames - 1) else 1
    spare = length - 1 - stride * (frames - 1)
    # Where a clip is too short, no more of it than must be runs backwards.
    start = rng.integers(max(spare, 0) + 1)
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
