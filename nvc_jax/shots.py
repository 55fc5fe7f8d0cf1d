"""Hard cuts between the shots of a video, from jumps of the luma histogram."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")

BINS = 64
# Our own choices: a cut moves at least this share of the samples to another bin, and this many
# times as many as the pictures next to it. A flash or a fast fade changes several in a row.
LEAST_SHARE = 0.15
LEAST_RATIO = 3.0


def with_cuts(
    pictures: Iterable[T], luma: Callable[[T], np.ndarray] = lambda planes: planes.y
) -> Iterator[tuple[T, bool]]:
    """Yields every picture, one late, and whether it is the first after a cut.

    luma: gives the uint8 plane of a picture.
    """
    histogram, held, before, here = None, [], 0.0, 0.0
    for picture in pictures:
        plane = luma(picture)
        counts = np.bincount(plane.ravel() >> 2, minlength=BINS) / plane.size
        after = 0.0 if histogram is None else float(np.abs(counts - histogram).sum() / 2)
        if held:
            yield held.pop(), here >= max(LEAST_SHARE, LEAST_RATIO * max(before, after))
            before = here
        held, here, histogram = [picture], after, counts
    if held:
        yield held.pop(), here >= max(LEAST_SHARE, LEAST_RATIO * before)


def scene_cuts(lumas: Iterable[np.ndarray]) -> list[int]:
    """Indices of the first frame after each hard cut; lumas: uint8 [height, width], in order."""
    return [n for n, (_, cut) in enumerate(with_cuts(lumas, lambda plane: plane)) if cut]
