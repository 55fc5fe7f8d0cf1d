"""BD-rate: known differences, refusals with a reason, the table over clips."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.errors import NvcError
from nvc_jax.evaluation.bdrate import bd_rate, bd_table, mean_percent

CURVE = [(0.05, 30.0), (0.1, 33.0), (0.2, 36.2), (0.4, 39.0)]


@pytest.fixture(autouse=True)
def _package():
    pytest.importorskip("bjontegaard", reason="optional extra `anchors`")


@settings(max_examples=20)
@given(st.floats(0.3, 3.0), st.permutations(range(4)))
def test_a_constant_factor_in_rate_is_found(factor, order):
    test = [(CURVE[i][0] * factor, CURVE[i][1]) for i in order]
    result = bd_rate(CURVE, test)
    assert result.percent == pytest.approx(100 * (factor - 1), abs=1e-6)
    assert result.reason is None
    assert result.overlap == (30.0, 39.0)
    assert result.overlap_percent == pytest.approx(100)


def test_against_straight_lines_integrated_by_hand():
    # log10 rate = quality / 10 and quality / 10 + 0.01 (quality - 30) over 30..40.
    qualities = np.linspace(30, 40, 6)
    anchor = [(10 ** (q / 10), q) for q in qualities]
    test = [(10 ** (q / 10 + 0.01 * (q - 30)), q) for q in qualities]
    assert bd_rate(anchor, test).percent == pytest.approx(100 * (10**0.05 - 1))


def test_only_the_common_interval_counts():
    longer = [(0.001, 10.0), (0.02, 27.0), *CURVE, (0.9, 44.0)]
    result = bd_rate(longer, [(2 * rate, quality) for rate, quality in CURVE])
    assert result.overlap == (30.0, 39.0)
    assert 90 < result.percent < 110
    reverse = bd_rate(CURVE, [(2 * rate, quality) for rate, quality in longer])
    assert reverse.overlap_percent == pytest.approx(100 * 9 / 34)


@pytest.mark.parametrize(
    ("anchor", "test", "reason"),
    [
        (CURVE, CURVE[:3], "tested codec has 3 points"),
        (CURVE[:2], CURVE, "anchor has 2 points"),
        (CURVE, [(rate, quality - 20) for rate, quality in CURVE], "below the anchor"),
        (CURVE, [(rate, quality + 20) for rate, quality in CURVE], "above the anchor"),
        (CURVE, [(rate, quality - 8) for rate, quality in CURVE], "only 11 %"),
        (CURVE, [*CURVE[:3], (0.4, 36.0)], "does not rise"),
        (CURVE, [*CURVE, (0.4, 41.0)], "does not rise"),
    ],
)
def test_curves_without_a_figure_say_why(anchor, test, reason):
    result = bd_rate(anchor, test)
    assert result.percent is None
    assert reason in result.reason


@pytest.mark.parametrize("point", [(0.0, 30.0), (-1.0, 30.0), (0.1, float("nan"))])
def test_impossible_points_are_refused(point):
    with pytest.raises(NvcError, match="point"):
        bd_rate(CURVE, [*CURVE, point])


def test_without_the_package_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bjontegaard", None)
    assert "pip install" in bd_rate(CURVE, CURVE).reason


def test_mean_leaves_out_what_does_not_exist():
    known = bd_rate(CURVE, [(1.5 * rate, quality) for rate, quality in CURVE])
    unknown = bd_rate(CURVE, CURVE[:2])
    assert mean_percent([known, unknown]) == pytest.approx(50)
    assert mean_percent([unknown]) is None


def test_table_has_a_row_per_model_and_anchor():
    def points(clip, codec, kind, factor):
        return [
            {"clip": clip, "codec": codec, "kind": kind, "bpp": factor * rate, "psnr": quality}
            for rate, quality in CURVE
        ]

    measured = [
        *points("a", "ours", "nvc", 1.2),
        *points("b", "ours", "nvc", 1.4),
        *points("a", "x265", "anchor", 1.0),
        *points("b", "x265", "anchor", 1.0)[:2],
        {"clip": "b", "codec": "vvenc", "kind": "anchor", "setting": "qp 1", "error": "crashed"},
    ]
    (row,) = bd_table(measured, "psnr")
    assert (row["model"], row["anchor"], row["quality"]) == ("ours", "x265", "psnr")
    assert row["clips"]["a"]["percent"] == pytest.approx(20)
    assert row["clips"]["b"]["percent"] is None
    assert row["mean_percent"] == pytest.approx(20)
    more = [*measured, *points("a", "more", "nvc", 1.8), *points("a", "most", "nvc", 2.4)]
    rows = {(row["model"], row["anchor"]): row["mean_percent"] for row in bd_table(more, "psnr")}
    assert set(rows) == {(m, "x265") for m in ("ours", "more", "most")} | {
        (m, "ours") for m in ("more", "most")
    }
    assert rows["most", "ours"] == pytest.approx(100)
    (row,) = bd_table(more, "psnr", [("most", "more")])
    assert (row["model"], row["anchor"]) == ("most", "more")
    assert row["mean_percent"] == pytest.approx(100 * (2.4 / 1.8 - 1))
