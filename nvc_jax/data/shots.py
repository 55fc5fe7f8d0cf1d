"""Shot boundaries, so that no clip contains a hard cut unless it is wanted."""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from nvc_jax.video import Planes

BLOCK = 16  # pixels
HISTORY = 8  # changes whose median a cut is compared with, which one cut among them hardly moves
# Our own choices: a cut changes the block means by this many grey levels on average, and by this
# many times what the pictures before it did.
LEAST_CHANGE = 12.0
LEAST_RATIO = 3.0


def thumbnail(luma: np.ndarray) -> np.ndarray:
    """Means of 16 x 16 blocks, float32; luma: uint8 [height, width], at least 16 x 16."""
    rows, cols = (n // BLOCK for n in luma.shape)
    blocks = luma[: rows * BLOCK, : cols * BLOCK].reshape(rows, BLOCK, cols, BLOCK)
    return blocks.mean((1, 3), dtype=np.float32)


def with_cuts(pictures: Iterable[Planes]) -> Iterator[tuple[Planes, bool]]:
    """Yields every picture, and whether a new shot starts with it (not for the first one)."""
    history: deque[float] = deque(maxlen=HISTORY)
    before = None
    for picture in pictures:
        after = thumbnail(picture.y)
        cut = False
        if before is not None:
            change = float(np.abs(after - before).mean())
            usual = float(np.median(history)) if history else 0.0
            cut = change > max(LEAST_CHANGE, LEAST_RATIO * usual)
            history.append(change)
        yield picture, cut
        before = after
