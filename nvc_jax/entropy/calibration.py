"""Calibration side information: float scales that two machines round to the same table.

Source: Tian, Li, Lin, Zhang, Zhang, "Towards real-time neural video codec for cross-platform
application using calibration information", MM'23 (arXiv 2309.11276). A scale has the real-valued
level r = log(scale / least scale) / step, and its table is the integer below r. Where r lies within
a margin of an integer, another machine may find another table; the encoder lists those elements,
and both sides take the *nearest* integer there, whose decision points lie half a level away.

What is guaranteed: if no machine's r differs from the encoder's by the margin or more, all machines
use the same tables. Nothing guarantees the condition; a checksum tells when it did not hold.

Differences from the printed scheme, each for a reason:
  * the margin is applied to r before it is clamped, so clamped elements are never listed;
  * an element that is skipped under either of its tables is not listed;
  * scales are compared with thresholds, so no logarithm comes between network and decision;
  * positions are listed per coding step, and a Rice code is there beside the printed fixed-length
    one, whose length follows the largest gap and not, as in the printed figures, the mean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nvc_jax.errors import NvcError, StreamError

if TYPE_CHECKING:  # readers of containers do without JAX
    import jax

# How a scale becomes a level, and with it a probability table: the values of a stream's header.
FLOAT = 0  # by comparing the network's float scale: right where encoder and decoder round alike
CALIBRATED = 1  # the same, with the scheme of this module
EXACT = 2  # computed with integers from decoded symbols, see `nvc_jax.nn.integer`: right everywhere
ENTROPY_MODES = ("float", "calibrated", "exact")

# Margins are 2^-e levels for e in this range.
LEAST_EXPONENT, LARGEST_EXPONENT = 5, 20
# Unless one is given: over four times the largest difference of levels that `nvc calibrate` has
# shown between settings of XLA for CPUs (8e-5, docs/cross_platform.md).
MARGIN_EXPONENT = 11
RICE, FIXED = 0, 1


class Margin(NamedTuple):
    """Thresholds of one margin, float32, for L levels; JAX arrays inside a program.

    Attributes:
      below: [L], entry k: scales below this, in level k, could be in level k - 1 elsewhere.
      above: [L], entry k: scales at or above this, in level k, could be in level k + 1 elsewhere.
      middle: [L], entry k: scales at or above this, in level k, are nearest to k + 1.
    """

    below: np.ndarray
    above: np.ndarray
    middle: np.ndarray


def ladder(boundaries: np.ndarray) -> tuple[float, float]:
    """(logarithm of the first boundary, distance between logarithms) of log-spaced boundaries."""
    first, last = np.log(np.asarray(boundaries, np.float64)[[0, -1]])
    return first, (last - first) / (len(boundaries) - 1)


def margin(boundaries: np.ndarray, exponent: int) -> Margin:
    """The thresholds of the margin 2^-exponent levels.

    Args:
      boundaries: float32 [L - 1], log-spaced, as in `CodingSpec`.
      exponent: 5..20.

    Raises:
      NvcError: exponent out of range.
    """
    if not LEAST_EXPONENT <= exponent <= LARGEST_EXPONENT:
        raise NvcError(
            f"a calibration margin of 2^-{exponent} is out of range; it must lie between "
            f"2^-{LARGEST_EXPONENT} and 2^-{LEAST_EXPONENT}"
        )
    first, step = ladder(boundaries)
    edges = np.concatenate([[-np.inf], boundaries, [np.nan]]).astype(np.float64)
    reach = np.exp(2.0**-exponent * step)
    # Outwards to the next float32: the smallest margins are hardly wider than that.
    below = np.nextafter((edges[:-1] * reach).astype(np.float32), np.float32(np.inf))
    above = np.nextafter((edges[1:] / reach).astype(np.float32), np.float32(-np.inf))
    below[0] = -np.inf
    middle = np.exp(first + step * (np.arange(len(edges) - 1) - 0.5)).astype(np.float32)
    middle[-1] = np.nan  # nothing reaches it
    return Margin(below, above, middle)


def uncertain(scale: jax.Array, floor: jax.Array, margin: Margin, skip_below: int) -> jax.Array:
    """Which elements the encoder lists: bool, like scale (float32) and floor (int32)."""
    low = floor - (scale < margin.below[floor])
    high = floor + (scale >= margin.above[floor])
    return (low != high) & (high >= skip_below)


def nearest(scale: jax.Array, floor: jax.Array, margin: Margin) -> jax.Array:
    """Level of listed elements, int32."""
    return floor + (scale >= margin.middle[floor])


def write_flags(flags: Sequence[np.ndarray], code: int | None = None) -> bytes:
    """Codes the positions of the listed elements; nothing at all if there are none.

    Per step: the count plus one in Elias gamma; if there are any, one bit that names the code of
    the gaps: RICE with its parameter in 4 bits, or FIXED with its length in 5 bits. A gap is the
    number of elements since the listed one before. Zero bits fill up the last byte.

    Args:
      flags: bool [n] per step.
      code: RICE or FIXED for all steps; by default whichever is shorter.
    """
    if not any(step.any() for step in flags):
        return b""
    bits = []
    for step in flags:
        positions = np.flatnonzero(step)
        count = f"{len(positions) + 1:b}"
        bits += ["0" * (len(count) - 1), count]
        if len(positions):
            gaps = np.diff(positions, prepend=-1) - 1
            coded = (_rice(gaps), _fixed(gaps))
            bits.append(min(coded, key=len) if code is None else coded[code])
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def _rice(gaps: np.ndarray) -> str:
    def length(k):
        return int((gaps >> k).sum()) + len(gaps) * (k + 1)

    k = min(range(16), key=length)
    low = [f"{gap & (1 << k) - 1:0{k}b}" if k else "" for gap in gaps.tolist()]
    high = (gaps >> k).tolist()
    return f"0{k:04b}" + "".join("1" * q + "0" + r for q, r in zip(high, low, strict=True))


def _fixed(gaps: np.ndarray) -> str:
    width = int(gaps.max()).bit_length()
    return f"1{width:05b}" + "".join(f"{gap:0{width}b}" if width else "" for gap in gaps.tolist())


def read_flags(data: bytes, sizes: Sequence[int]) -> np.ndarray:
    """Inverse of `write_flags` for steps of these sizes: bool [sum(sizes)].

    Raises:
      StreamError: no such data can have been written.
    """
    flags = np.zeros(sum(sizes), bool)
    if not data:
        return flags
    text = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}"
    start = place = 0
    try:
        for size in sizes:
            ones = text.index("1", place)
            end = 2 * ones - place + 1
            count, place = int(text[ones:end], 2) - 1, end
            _check(end <= len(text) and count <= size)
            if count:
                gaps, place = _read_gaps(text, place, count)
                positions = np.cumsum(np.add(gaps, 1)) - 1
                _check(positions[-1] < size)
                flags[start + positions] = True
            start += size
        _check(place <= len(text) < place + 8 and "1" not in text[place:])
    except ValueError:
        raise StreamError("the list of calibrated elements is damaged") from None
    return flags


def _read_gaps(text: str, place: int, count: int) -> tuple[list[int], int]:
    gaps = []
    if text[place : place + 1] == "0":
        k, place = int(text[place + 1 : place + 5], 2), place + 5
        for _ in range(count):
            zero = text.index("0", place)
            end = zero + 1 + k
            _check(end <= len(text))
            gaps.append((zero - place << k) + (int(text[zero + 1 : end], 2) if k else 0))
            place = end
    else:
        width, place = int(text[place + 1 : place + 6], 2), place + 6
        end = place + count * width
        _check(end <= len(text))
        gaps = [int(text[i : i + width], 2) for i in range(place, end, width)] if width else []
        gaps, place = gaps or [0] * count, end
    return gaps, place


def _check(condition: bool) -> None:
    """Fails as str.index and int do when the bits have run out."""
    if not condition:
        raise ValueError
