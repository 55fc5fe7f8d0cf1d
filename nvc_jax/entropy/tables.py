"""Integer probability tables: the only thing about probabilities that the host coder knows."""

from typing import NamedTuple

import numpy as np

from nvc_jax.errors import NvcError

PRECISION_BITS = 16
TOTAL = 1 << PRECISION_BITS
MAX_ENTRIES = 32767


class CdfTables(NamedTuple):
    """Cumulative frequencies of integer symbols, one row per table.

    Entry k of a table stands for the value offset + k, except the last one, the escape: it stands
    for every other int16 value, which then follows as 16 raw bits.

    Attributes:
      cdf: uint32 [tables, max_size + 1]; 0 = cdf[t, 0] < ... < cdf[t, size[t]] = 65536, the rest
        of the row is 65536.
      size: int32 [tables], entries including the escape, 2..32767.
      offset: int32 [tables], value of entry 0.
    """

    cdf: np.ndarray
    size: np.ndarray
    offset: np.ndarray


def validate(tables: CdfTables) -> None:
    """Checks everything that the coder relies on.

    Raises:
      NvcError: names the first table that breaks a rule, and the rule.
    """
    cdf, size, offset = (np.asarray(a) for a in tables)
    for name, array, dims, dtype in (
        ("cdf", cdf, 2, np.uint32),
        ("size", size, 1, np.int32),
        ("offset", offset, 1, np.int32),
    ):
        if array.dtype != dtype or array.ndim != dims:
            raise NvcError(
                f"probability tables: {name} is {array.dtype} with {array.ndim} dimensions, "
                f"not {np.dtype(dtype)} with {dims}; the model file is damaged"
            )
    if not 1 <= len(size) <= TOTAL - 1 or not len(size) == len(offset) == len(cdf):
        raise NvcError(
            f"probability tables: {len(cdf)} rows, {len(size)} sizes, {len(offset)} offsets; "
            f"there must be equally many, between 1 and {TOTAL - 1}"
        )
    largest = min(cdf.shape[1] - 1, MAX_ENTRIES)
    column = np.arange(cdf.shape[1] - 1)
    inside = column < size[:, None]
    steps = np.diff(cdf.astype(np.int64), axis=1)
    last = np.take_along_axis(cdf, np.clip(size, 0, largest)[:, None], axis=1)[:, 0]
    for wrong, rule in (
        ((size < 2) | (size > largest), f"has a size outside 2..{largest}"),
        ((offset < -32768) | (offset + np.maximum(size, 2) - 2 > 32767), "leaves the int16 range"),
        (cdf[:, 0] != 0, "does not start at 0"),
        (last != TOTAL, f"does not sum to {TOTAL}"),
        ((inside & (steps < 1)).any(1), "has an entry without probability"),
        ((~inside & (steps != 0)).any(1), f"is not padded with {TOTAL}"),
    ):
        if wrong.any():
            table = int(np.flatnonzero(wrong)[0])
            raise NvcError(f"probability table {table} {rule}; the model file is damaged")
