"""Calibrated scales: what the margin promises, which elements are listed, and their positions."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.entropy import calibration
from nvc_jax.entropy.calibration import FIXED, RICE, margin, nearest, read_flags, write_flags
from nvc_jax.errors import NvcError, StreamError

LEVELS = 32
LOGS = np.linspace(np.log(0.01), np.log(64), LEVELS)  # the published range
STEP = LOGS[1] - LOGS[0]
BOUNDARIES = np.exp(LOGS[1:]).astype(np.float32)
SKIP_BELOW = 6


def scale_at(level):
    return np.exp(LOGS[0] + STEP * np.asarray(level, np.float64)).astype(np.float32)


def floor_of(scale):
    return (scale[..., None] >= BOUNDARIES).sum(-1)


def calibrated(scale, flags, exponent):
    """A decoder's levels."""
    floor = floor_of(scale)
    return np.where(flags, nearest(scale, floor, margin(BOUNDARIES, exponent)), floor)


def listed(scale, exponent):
    """The encoder's flags."""
    return calibration.uncertain(scale, floor_of(scale), margin(BOUNDARIES, exponent), SKIP_BELOW)


def levels_near_boundaries(exponent, count=20_000, seed=0):
    """Levels spread over everything, most within a few margins of an integer."""
    rng = np.random.default_rng(seed)
    near = rng.integers(-2, LEVELS + 2, count) + rng.uniform(-4, 4, count) * 2.0**-exponent
    return np.concatenate([near, rng.uniform(-3, LEVELS + 3, count)])


# float32 scales hold the logarithm to about 2^-22 levels, so the smallest margins say less.
@pytest.mark.parametrize("exponent", range(5, 19))
def test_errors_within_the_margin_change_no_table(exponent):
    level = levels_near_boundaries(exponent)
    error = np.random.default_rng(1).uniform(-1, 1, level.shape) * 2.0**-exponent * 0.9
    here, there = scale_at(level), scale_at(level + error)
    flags = listed(here, exponent)
    ours, theirs = (calibrated(s, flags, exponent) for s in (here, there))
    coded = np.maximum(ours, theirs) >= SKIP_BELOW
    np.testing.assert_array_equal(ours[coded], theirs[coded])
    unprotected = floor_of(here) != floor_of(there)
    assert unprotected[coded].sum() > 100  # the error is one that matters


def test_errors_beyond_the_margin_are_not_promised_anything():
    level = levels_near_boundaries(10)
    here, there = scale_at(level), scale_at(level + 3 * 2.0**-10)
    flags = listed(here, 10)
    assert (calibrated(here, flags, 10) != calibrated(there, flags, 10)).any()


def test_only_uncertain_and_coded_elements_are_listed():
    exponent, m = 8, 2.0**-8
    level = np.array([-1, -m / 2, m / 2, 1, 5 + m / 2, 6 - m / 2, 6 + m / 2, 6 + 2 * m, 6.5])
    level = np.append(level, [31 - m / 2, 31 + m / 2, 31.5, 32 - m / 2, 40])
    # No boundary at 0 or 32; at 1 and 5 both sides are skipped; at 6 one side is coded.
    expected = np.isin(level, [6 - m / 2, 6 + m / 2, 31 - m / 2, 31 + m / 2])
    assert expected.sum() == 4
    np.testing.assert_array_equal(listed(scale_at(level), exponent), expected)
    assert not listed(np.float32([np.nan, np.inf, -np.inf, -1, 0]), exponent).any()


def test_the_number_of_listed_elements_follows_the_margin():
    level = np.random.default_rng(0).uniform(SKIP_BELOW, LEVELS - 1, 1_000_000)
    for exponent in (6, 9, 12):
        assert listed(scale_at(level), exponent).mean() == pytest.approx(2.0 ** (1 - exponent), 0.1)


@pytest.mark.parametrize("exponent", [4, 21])
def test_margins_out_of_range_are_refused(exponent):
    with pytest.raises(NvcError, match="out of range"):
        margin(BOUNDARIES, exponent)


steps = st.lists(
    st.tuples(st.integers(0, 300), st.floats(0, 1), st.integers(0, 2**32)), min_size=1, max_size=4
).map(lambda drawn: [np.random.default_rng(seed).random(n) < share**3 for n, share, seed in drawn])


@settings(deadline=None, max_examples=300)
@given(steps, st.sampled_from([None, RICE, FIXED]))
def test_positions_come_back(flags, code):
    data = write_flags(flags, code)
    np.testing.assert_array_equal(read_flags(data, [len(f) for f in flags]), np.concatenate(flags))
    if code is not None:
        assert len(write_flags(flags)) <= len(data)


def test_nothing_listed_takes_no_bytes():
    assert write_flags([np.zeros(10, bool), np.zeros(0, bool)]) == b""


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=40), st.lists(st.integers(0, 200), min_size=1, max_size=3))
def test_damaged_positions_are_noticed_or_harmless(data, sizes):
    with suppress(StreamError):
        assert read_flags(data, sizes).shape == (sum(sizes),)


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2])
def test_rice_codes_cost_about_what_the_positions_hold(share):
    flags = np.random.default_rng(0).random(737_280) < share
    bits = {code: 8 * len(write_flags([flags], code)) / flags.sum() for code in (RICE, FIXED)}
    entropy = -np.log2(share) - (1 - share) / share * np.log2(1 - share)
    assert entropy < bits[RICE] < 1.06 * entropy + 0.5
    assert bits[FIXED] > bits[RICE] + 1
