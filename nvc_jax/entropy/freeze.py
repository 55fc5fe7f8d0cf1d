"""Builds the integer probability tables of a released model, once, in float64.

What is built here is stored in the model and hashed; decoders never run this.
"""

import math
from collections.abc import Callable

import numpy as np

from nvc_jax.entropy.likelihood import SPARSE
from nvc_jax.entropy.tables import TOTAL, CdfTables

# Values rarer than this go through the escape entry: two counts of 65536, about where an entry of
# its own would no longer pay for the counts it takes from the others.
TAIL_MASS = 2.0 / TOTAL


def quantize_pmf(pmf: np.ndarray) -> np.ndarray:
    """Frequencies >= 1 that sum to 65536 and lose little against pmf [n] (sums to 1).

    Rounds, then gives or takes single counts where the expected code length suffers least.
    """
    frequency = np.maximum(1, np.round(pmf * TOTAL)).astype(np.int64)
    while (error := int(frequency.sum()) - TOTAL) != 0:
        if error > 0:
            cost = np.where(
                frequency > 1, pmf * np.log2(frequency / np.maximum(frequency - 1, 1)), np.inf
            )
            frequency[np.argmin(cost)] -= 1
        else:
            gain = pmf * np.log2((frequency + 1) / frequency)
            frequency[np.argmax(gain)] += 1
    return frequency


def _table(values_pmf: np.ndarray) -> np.ndarray:
    """Adds the escape entry and quantises: float64 [n] -> int64 [n + 1]."""
    escape = max(1.0 - values_pmf.sum(), 1.0 / TOTAL)
    pmf = np.append(values_pmf, escape)
    return quantize_pmf(pmf / pmf.sum())


def _stack(frequencies: list[np.ndarray], offsets: list[int]) -> CdfTables:
    size = np.array([len(f) for f in frequencies], np.int32)
    cdf = np.full((len(size), size.max() + 1), TOTAL, np.uint32)
    cdf[:, 0] = 0
    for row, frequency in zip(cdf, frequencies, strict=True):
        row[1 : len(frequency) + 1] = np.cumsum(frequency)
    return CdfTables(cdf, size, np.array(offsets, np.int32))


def gaussian_tables(scales: np.ndarray) -> CdfTables:
    """One table per scale of a zero-mean Gaussian over integers, float64 [levels]."""
    return _symmetric(scales, lambda x, scale: 0.5 * math.erfc(x / (scale * math.sqrt(2))))


def laplace_tables(scales: np.ndarray) -> CdfTables:
    """One table per scale of a zero-mean Laplace distribution over integers, float64 [levels]."""
    return _symmetric(scales, lambda x, scale: 0.5 * math.exp(-x / scale))


def sparse_tables(scales: np.ndarray) -> CdfTables:
    """One table per scale of `likelihood.sparse_bits`, float64 [levels]."""
    return laplace_tables(SPARSE * scales)


TABLES = {"gaussian": gaussian_tables, "laplace": laplace_tables, "sparse": sparse_tables}


def _symmetric(scales: np.ndarray, tail: Callable[[float, float], float]) -> CdfTables:
    """Tables of P(X > x) = tail(x, scale), x >= 0, around 0."""
    frequencies, offsets = [], []
    for scale in scales:
        upper = lambda x: tail(x, scale)  # noqa: B023, E731
        radius = 1
        while 2 * upper(radius + 0.5) > TAIL_MASS:
            radius += 1
        half = [upper(k - 0.5) - upper(k + 0.5) for k in range(1, radius + 1)]
        pmf = np.array([*half[::-1], 1 - 2 * upper(0.5), *half])
        frequencies.append(_table(pmf))
        offsets.append(-radius)
    return _stack(frequencies, offsets)


def factorized_tables(chain: np.ndarray, radius: int = 100) -> CdfTables:
    """Tables of learned scalar distributions, chain float64 [n, 11] as in `nn.hyperprior`."""
    edges = np.arange(-radius, radius + 2) - 0.5
    x = np.broadcast_to(edges, (len(chain), len(edges)))
    for i in range(4):
        x = x * np.logaddexp(0, chain[:, i, None]) + chain[:, 4 + i, None]
        if i < 3:
            x = x + np.tanh(x) * np.tanh(chain[:, 8 + i, None])
    cdf = 0.5 * (1 + np.tanh(0.5 * x))
    frequencies, offsets = [], []
    for row in cdf:
        inside = np.flatnonzero((row[1:] > TAIL_MASS / 2) & (row[:-1] < 1 - TAIL_MASS / 2))
        first, last = (inside[0], inside[-1]) if len(inside) else (radius, radius)
        frequencies.append(_table(np.diff(row)[first : last + 1]))
        offsets.append(int(first) - radius)
    return _stack(frequencies, offsets)


def concatenate(*parts: CdfTables) -> CdfTables:
    """The tables of all parts, in this order."""
    width = max(t.cdf.shape[1] for t in parts)
    cdf = [
        np.pad(t.cdf, ((0, 0), (0, width - t.cdf.shape[1])), constant_values=TOTAL) for t in parts
    ]
    return CdfTables(
        np.concatenate(cdf),
        np.concatenate([t.size for t in parts]),
        np.concatenate([t.offset for t in parts]),
    )
