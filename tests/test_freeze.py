"""Frozen tables: valid, close to what they stand for, and every value can be coded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nvc_jax.entropy import coder, tables
from nvc_jax.entropy.freeze import (
    TABLES,
    TOTAL,
    concatenate,
    factorized_tables,
    gaussian_tables,
    quantize_pmf,
)
from nvc_jax.entropy.likelihood import SPARSE

SCALES = np.geomspace(0.11, 40, 30)


def row(t: tables.CdfTables, number: int):
    """(values without the escape, probabilities with the escape last) of one table."""
    size = t.size[number]
    frequencies = np.diff(t.cdf[number].astype(np.int64))[:size]
    return t.offset[number] + np.arange(size - 1), frequencies / TOTAL


def expected_bits(t: tables.CdfTables, number: int, pmf) -> float:
    """Code length under a table of what is distributed as pmf(values)."""
    values, probability = row(t, number)
    inside = pmf(values)
    bits = -np.log2(probability)
    return float(inside @ bits[:-1] + max(0.0, 1 - inside.sum()) * (bits[-1] + 16))


def entropy(pmf) -> float:
    p = pmf(np.arange(-2000, 2001))
    p = p[p > 0]
    return float(-(p @ np.log2(p)))


def random_chains(seed: int, count: int = 8) -> np.ndarray:
    """Like trained ones: from spikes to wide and skewed distributions."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (count, 11)) * rng.uniform(0.1, 1.5, (count, 1))


def factorized_pmf(chain: np.ndarray):
    def cdf(x):
        for i in range(4):
            x = x * np.logaddexp(0, chain[i]) + chain[4 + i]
            if i < 3:
                x = x + np.tanh(x) * np.tanh(chain[8 + i])
        return stats.logistic.cdf(x)

    return lambda values: cdf(values + 0.5) - cdf(values - 0.5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=400).filter(lambda p: sum(p) > 0.01))
def test_quantized_probabilities_lose_little(weights):
    pmf = np.array(weights) / sum(weights)
    frequency = quantize_pmf(pmf)
    assert frequency.sum() == TOTAL and frequency.min() >= 1
    likely = pmf > 0
    loss = pmf[likely] @ np.log2(pmf[likely] * TOTAL / frequency[likely])
    assert loss <= 2 * len(pmf) / TOTAL  # one count in 65536 per entry costs 1.44 / 65536 bits


@given(st.integers(2, 1000))
@settings(max_examples=20)
def test_many_unlikely_entries_fit(count):
    pmf = np.full(count, 1e-12)
    pmf[count // 2] = 1
    frequency = quantize_pmf(pmf / pmf.sum())
    assert frequency.sum() == TOTAL
    assert frequency[count // 2] == TOTAL - count + 1


DISTRIBUTIONS = {
    "gaussian": stats.norm,
    "laplace": stats.laplace,
    "sparse": lambda scale: stats.laplace(scale=SPARSE * scale),
}


@pytest.mark.parametrize("family", TABLES)
def test_scale_tables_are_valid_and_symmetric(family):
    t = TABLES[family](SCALES)
    tables.validate(t)
    for number in range(len(SCALES)):
        values, probability = row(t, number)
        assert values[0] == -values[-1]
        steps = np.diff(probability[: len(values) // 2 + 1])
        assert (steps >= -1 / TOTAL).all(), "rises to the middle"
        assert abs(probability[:-1] - probability[-2::-1]).max() <= 1 / TOTAL


@pytest.mark.parametrize("number", range(len(SCALES)))
@pytest.mark.parametrize("family", TABLES)
def test_scale_tables_code_their_distribution_well(family, number):
    scale = SCALES[number]

    def pmf(values):
        tail = DISTRIBUTIONS[family](scale=scale).sf
        return np.where(
            values == 0, 1 - 2 * tail(0.5), tail(abs(values) - 0.5) - tail(abs(values) + 0.5)
        )

    loss = expected_bits(TABLES[family](SCALES), number, pmf) - entropy(pmf)
    assert 0 <= loss < {"gaussian": 0.002, "laplace": 0.004, "sparse": 0.004}[family]


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_factorized_tables_code_their_distribution_well(seed):
    chains = random_chains(seed)
    t = factorized_tables(chains)
    tables.validate(t)
    for number, chain in enumerate(chains):
        pmf = factorized_pmf(chain)
        outside = 1 - pmf(np.arange(-100, 101)).sum()
        loss = expected_bits(t, number, pmf) - entropy(pmf)
        assert loss < 0.003 + 20 * outside


@pytest.mark.parametrize("shift", [-1e4, -120.0, 120.0, 1e4])
def test_factorized_tables_of_distributions_beyond_their_radius_are_valid(shift):
    chain = np.zeros((1, 11))
    chain[:, 7] = shift
    t = factorized_tables(chain)
    tables.validate(t)
    assert row(t, 0)[1][-1] > 0.9  # the escape stands for nearly everything


def test_every_value_can_be_coded_with_every_table():
    t = concatenate(gaussian_tables(SCALES), factorized_tables(random_chains(0)))
    prepared = coder.prepare(t)
    edges = [v for k in (0, 10, 29, 35) for v in row(t, k)[0][[0, -1]]]
    values = np.unique([-32768, -32767, -101, -1, 0, 1, 101, 32767, *edges, *np.add(edges, 1)])
    index = np.repeat(np.arange(len(t.size), dtype=np.uint16), len(values))
    symbols = np.tile(values, len(t.size)).astype(np.int16)
    payload = np.frombuffer(coder.encode([(symbols, index)], prepared), np.uint8)
    state = coder.begin_decode(payload, payload.size)
    decoded, state = coder.decode_step(payload, state, index, prepared)
    coder.finish_decode(payload, state)
    np.testing.assert_array_equal(decoded, symbols)


def test_concatenation_keeps_each_table():
    first, second = gaussian_tables(SCALES[:5]), factorized_tables(random_chains(1))
    for a, b in ((first, second), (second, first)):
        both = concatenate(a, b)
        tables.validate(both)
        for number in range(len(both.size)):
            source, k = (a, number) if number < len(a.size) else (b, number - len(a.size))
            for ours, theirs in zip(row(both, number), row(source, k), strict=True):
                np.testing.assert_array_equal(ours, theirs)
