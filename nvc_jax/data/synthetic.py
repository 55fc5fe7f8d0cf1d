"""Clips made up from nothing, for tests, benchmarks, and whoever has no data at hand."""

import numpy as np

from nvc_jax.data.clips import Clip, ClipSet
from nvc_jax.video import Planes


def moving_texture(width: int, height: int, frames: int, seed: int = 0) -> list[Planes]:
    """A smooth random texture that drifts, with a little noise."""
    rng = np.random.default_rng(seed)
    rows, cols = np.arange(height)[:, None], np.arange(width)[None, :]
    waves = [(rng.normal(0, 0.15, 2), rng.uniform(0, 6.28), rng.uniform(4, 25)) for _ in range(8)]
    pictures = []
    for t in range(frames):
        luma = 128 + sum(
            amplitude * np.sin(f[0] * (rows + t) + f[1] * (cols + 2 * t) + phase)
            for f, phase, amplitude in waves
        )
        luma = np.clip(luma + rng.normal(0, 1, luma.shape), 0, 255).astype(np.uint8)
        half = luma[::2, ::2]
        pictures.append(Planes(luma, half // 2 + 64, 191 - half // 2))
    return pictures


def made_up_clips() -> ClipSet:
    """Four videos and two pictures of different textures."""
    clips = [
        Clip(*map(np.stack, zip(*moving_texture(160, 128, 24, s), strict=True))) for s in range(4)
    ]
    stills = [Clip(*(plane[None] for plane in moving_texture(192, 128, 1, s)[0])) for s in (4, 5)]
    return ClipSet(tuple(clips), tuple(stills))
