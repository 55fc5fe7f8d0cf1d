"""The report: well-formed, self-contained, and it says what the results say."""

import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nvc_jax.evaluation.bdrate import bd_table
from nvc_jax.evaluation.report import Line, _spread, _ticks, html_report, plot, print_tables

QUALITIES = (30.0, 33.0, 36.0, 39.0)


def point(clip, codec, kind, step, factor):
    quality = QUALITIES[step]
    base = {
        "clip": clip,
        "codec": codec,
        "kind": kind,
        "setting": f"qp {8 + 16 * step}" if kind == "nvc" else f"crf {40 - 6 * step}",
        "file_bytes": 1000 * 2**step,
        "bpp": 0.05 * 2**step * factor,
        "encode_fps": 10.0,
        "decode_fps": 20.0,
        "psnr": quality,
        "psnr_y": quality,
        "psnr_u": quality,
        "psnr_v": quality,
        "ms_ssim": 0.9 + 0.02 * step,
        "ms_ssim_db": 10.0 + 2 * step,
        "frames": 6,
        "frame_psnr": [quality] * 3 + [quality - 9, quality - 3, quality + 3],
        "frame_ms_ssim": [0.95] * 6,
        "crop": f"crops/{codec}{step}.png",
    }
    if kind == "anchor":
        words = {"preset": "medium", "structure": "low delay: no look-ahead"}
        return base | words | {"command": f"ffmpeg -crf {step} <x>"}
    return base | {
        "encode_fps_steady": 15.0,
        "decode_fps_steady": None,
        "checks": {
            "checksums_ok": 4,
            "units": 4,
            "frames_compared": 6,
            "differing_samples": 0,
            "largest_difference": 0,
            "passed": True,
        },
        "units": [
            {"frames": frames, "bytes": 100 + frames[0]} for frames in ([0], [1, 2], [3, 4], [5])
        ],
    }


@pytest.fixture
def results():
    points = [point("a<b", "ours", "nvc", step, 1.25) for step in range(4)]
    points += [point("a<b", "x265-lowdelay", "anchor", step, 1.0) for step in range(4)]
    points.append(
        {
            "clip": "a<b",
            "codec": "vvenc",
            "kind": "anchor",
            "setting": "qp 18",
            "error": "signal 4",
        }
    )
    return {
        "created_utc": "2030-01-02T03:04:05+00:00",
        "machine": {"cpu": "Abacus", "cores": 2, "system": "Linux", "python": "3.12", "jax": "1"},
        "config": {"models": ["ours"], "frames": 6},
        "clips": [
            {
                "name": "a<b",
                "width": 64,
                "height": 48,
                "fps": "30000/1001",
                "frames": 6,
                "cuts": [3],
                "crop": [3, 0, 0, 48, 64],
            }
        ],
        "notes": ["a note"],
        "ffmpeg": "ffmpeg version 9",
        "points": points,
        "bd_rates": [row for key in ("psnr", "ms_ssim_db") for row in bd_table(points, key)],
    }


class Balance(HTMLParser):
    """Fails on tags that do not close in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(results, tmp_path):
    page = html_report(results, tmp_path)
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"(src|href)=\"(?!#|data:)|url\(|@import|<script|http", page)
    assert "a<b" not in page
    assert "a&lt;b" in page
    plots = re.findall(r"<figure>(<svg.*?</svg>)<figcaption>", page)
    assert len(plots) == 4
    for svg in plots:
        ET.fromstring(svg)


def test_the_page_says_what_was_measured(results, tmp_path):
    pytest.importorskip("bjontegaard", reason="optional extra `anchors`")
    page = html_report(results, tmp_path)
    for text in (
        "4 of 4 streams passed",
        "+25.0 %",
        "100 % of range",
        "x265-lowdelay",
        "preset medium, low delay",
        "ffmpeg -crf 0 &lt;x&gt;",
        "failed (a&lt;b, qp 18): signal 4",
        "Abacus, 2 cores",
        "29.97 per second",
        "a note",
        "First 6 frames",
    ):
        assert text in page, text


def test_models_are_compared_with_the_first(results, tmp_path):
    pytest.importorskip("bjontegaard", reason="optional extra `anchors`")
    results["points"] += [point("a<b", "other", "nvc", step, 1.0) for step in range(4)]
    results["bd_rates"] = bd_table(results["points"], "psnr")
    page = html_report(results, tmp_path)
    assert "other against ours<small>ours</small>" in page and "-20.0 %" in page
    with io.StringIO() as text:
        print_tables(results, Console(file=text, width=200))
        assert "ours (ours)" in text.getvalue()


def test_an_anchor_that_failed_leaves_the_rest_of_the_page(results, tmp_path):
    pytest.importorskip("bjontegaard", reason="optional extra `anchors`")
    results["bd_rates"] = bd_table(results["points"], "psnr", [("ours", "vvenc")])
    assert "ours against vvenc<small>failed</small>" in html_report(results, tmp_path)


def test_recovery_after_a_cut_is_stated_in_frames_and_units(results, tmp_path):
    # After the cut: -9, -3, +3 dB; mean -3; so the second frame is back, in the same unit.
    page = html_report(results, tmp_path)
    assert "Cut at frame 3, qp 8" in page
    assert "(27.00 dB over 3 frames) 1 frame (0 units) after it" in page


def test_failures_are_shown_in_the_page_and_the_terminal(results, tmp_path):
    checks = results["points"][0]["checks"]
    checks.update(passed=False, differing_samples=7, largest_difference=2)
    results["points"][1] = {
        "clip": "a<b",
        "codec": "ours",
        "kind": "nvc",
        "setting": "qp 24",
        "error": "decode ended with status 2",
    }
    page = html_report(results, tmp_path)
    assert "2 of 4 streams passed" in page
    assert "7 samples differ (by up to 2)" in page
    assert "decode ended with status 2" in page
    assert '"checks bad"' in page
    text = terminal(results)
    assert text.count("FAILED") == 2
    assert "a<b, ours, qp 24: decode ended with status 2" in text


def test_a_page_without_anchors_or_any_measured_point(results, tmp_path):
    results["points"] = results["points"][:4]
    results["bd_rates"] = []
    page = html_report(results, tmp_path)
    assert "BD-rate" not in page
    results["points"] = [{**p, "error": "broken"} for p in results["points"]]
    assert "None of our streams could be measured" in html_report(results, tmp_path)


def terminal(results) -> str:
    output = io.StringIO()
    print_tables(results, Console(file=output, width=200))
    return output.getvalue()


def test_tables_for_the_terminal(results):
    text = terminal(results)
    assert "0.0625" in text
    assert "15.0 / n/a" in text
    if results["bd_rates"][0]["mean_percent"] is not None:
        assert "+25.0 %" in text


def test_plots_show_values_and_cut_curves_at_the_frame():
    line = Line("codec", 2, [(0.01, 20.0), (0.1, 30.0), (1.0, 40.0)], markers=True)
    svg = plot([line], "bpp", "dB", log_x=True, y_range=(25, 35), marks=[(0.2, "cut")])
    tree = ET.fromstring(svg)
    titles = [title.text for title in tree.iter("title")]
    assert "codec: bpp 0.1, dB 30" in titles
    assert [float(t.text) for t in tree.iter("text") if t.text in ("0.1", "30")] == [0.1, 30.0]
    assert "cut" in [t.text for t in tree.iter("text")]
    assert len(list(tree.iter("svg"))) == 2  # the page and, in it, the frame that cuts


@settings(max_examples=100)
@given(st.floats(1e-4, 1e4), st.floats(1.001, 1e4), st.booleans())
def test_ticks_lie_inside_and_are_not_too_many(low, ratio, log):
    ticks = _ticks(low, low * ratio, log)
    assert 2 <= len(ticks) <= 16
    assert all(low * 0.999999 <= tick <= low * ratio * 1.000001 for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_labels_at_line_ends_do_not_overlap():
    assert _spread([10, 12, 100], 10, 200) == [10, 22, 100]
    assert _spread([195, 196, 197], 10, 200) == [173, 185, 197]
    assert _spread([5, 5], 10, 200) == [10, 22]
