"""Calibrated scales: what the margin promises, which elements are listed, and their positions."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.entropy import calibration
from nvc_jax.entropy.calibration import FIXED, RICE, margin, nearest, read_flags, write_flags
from nvc_jax.errors import NvcError, StreamError

SKIP_BELOW = 6


class Ladder:
    """Log-spaced scales; `levels` of them, from `low` to `high`."""

    def __init__(self, levels, low, high):
        self.levels, self.low = levels, low
        self.step = np.log(high / low) / (levels - 1)
        self.boundaries = self.scale(np.arange(1, levels))

    def scale(self, level):
        level = np.asarray(level, np.float64)
        return (self.low * np.exp(self.step * level)).astype(np.float32)

    def floor(self, scale):
        return (scale[..., None] >= self.boundaries).sum(-1)

    def margin(self, exponent):
        return margin(self.boundaries, exponent)


PRINTED, OURS = Ladder(32, 0.01, 64), Ladder(64, 0.11, 32)


def calibrated(ladder, scale, flags, exponent):
    """A decoder's levels."""
    floor = ladder.floor(scale)
    return np.where(flags, nearest(scale, floor, ladder.margin(exponent)), floor)


def listed(ladder, scale, exponent):
    """The encoder's flags."""
    return calibration.uncertain(scale, ladder.floor(scale), ladder.margin(exponent), SKIP_BELOW)


def levels_near_boundaries(ladder, exponent, count=20_000, seed=0):
    """Levels spread over everything, most within a few margins of an integer."""
    rng = np.random.default_rng(seed)
    near = rng.integers(-2, ladder.levels + 2, count) + rng.uniform(-4, 4, count) * 2.0**-exponent
    return np.concatenate([near, rng.uniform(-3, ladder.levels + 3, count)])


@pytest.mark.parametrize("exponent", range(5, 21))
@pytest.mark.parametrize("ladder", [PRINTED, OURS], ids=["printed", "ours"])
def test_errors_within_the_margin_change_no_table(ladder, exponent):
    level = levels_near_boundaries(ladder, exponent)
    error = np.random.default_rng(1).uniform(-1, 1, level.shape) * 2.0**-exponent
    here, there = ladder.scale(level), ladder.scale(level + error)
    # Rounding to float32 is an error, too, and larger than the smallest margins.
    wide = abs(np.log(there.astype(np.float64) / here)) / ladder.step < 2.0**-exponent
    here, there = here[wide], there[wide]
    flags = listed(ladder, here, exponent)
    ours, theirs = (calibrated(ladder, s, flags, exponent) for s in (here, there))
    coded = np.maximum(ours, theirs) >= SKIP_BELOW
    np.testing.assert_array_equal(ours[coded], theirs[coded])
    unprotected = ladder.floor(here) != ladder.floor(there)
    assert unprotected[coded].sum() > 100  # the error is one that matters


def test_errors_beyond_the_margin_are_not_promised_anything():
    level = levels_near_boundaries(OURS, 10)
    here, there = OURS.scale(level), OURS.scale(level + 3 * 2.0**-10)
    flags = listed(OURS, here, 10)
    assert (calibrated(OURS, here, flags, 10) != calibrated(OURS, there, flags, 10)).any()


def test_only_uncertain_and_coded_elements_are_listed():
    exponent, m = 8, 2.0**-8
    level = np.array([-1, -m / 2, m / 2, 1, 5 + m / 2, 6 - m / 2, 6 + m / 2, 6 + 2 * m, 6.5])
    level = np.append(level, [31 - m / 2, 31 + m / 2, 31.5, 32 - m / 2, 40])
    # No boundary at 0 or 32; at 1 and 5 both sides are skipped; at 6 one side is coded.
    expected = np.isin(level, [6 - m / 2, 6 + m / 2, 31 - m / 2, 31 + m / 2])
    assert expected.sum() == 4
    np.testing.assert_array_equal(listed(PRINTED, PRINTED.scale(level), exponent), expected)
    assert not listed(PRINTED, np.float32([np.nan, np.inf, -np.inf, -1, 0]), exponent).any()


@pytest.mark.parametrize("ladder", [PRINTED, OURS], ids=["printed", "ours"])
def test_the_number_of_listed_elements_follows_the_margin(ladder):
    level = np.random.default_rng(0).uniform(SKIP_BELOW, ladder.levels - 1, 1_000_000)
    for exponent in (6, 9, 12):
        share = listed(ladder, ladder.scale(level), exponent).mean()
        assert share == pytest.approx(2.0 ** (1 - exponent), 0.1)


@pytest.mark.parametrize("exponent", [4, 21])
def test_margins_out_of_range_are_refused(exponent):
    with pytest.raises(NvcError, match="out of range"):
        OURS.margin(exponent)


steps = st.lists(
    st.tuples(st.integers(0, 300), st.floats(0, 1), st.integers(0, 2**32)), min_size=1, max_size=4
).map(lambda drawn: [np.random.default_rng(seed).random(n) < share**3 for n, share, seed in drawn])


@settings(max_examples=300)
@given(steps, st.sampled_from([None, RICE, FIXED]))
def test_positions_come_back(flags, code):
    data = write_flags(flags, code)
    np.testing.assert_array_equal(read_flags(data, [len(f) for f in flags]), np.concatenate(flags))
    if code is not None:
        assert len(write_flags(flags)) <= len(data)


def test_nothing_listed_takes_no_bytes():
    assert write_flags([np.zeros(10, bool), np.zeros(0, bool)]) == b""


@settings(max_examples=500)
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
