"""Bjontegaard delta rate: how many percent more bits one codec needs than another.

The mean difference of the two curves log(rate) over quality, over the interval of quality that
both curves cover (Bjontegaard, VCEG-M33, 2001), with Akima interpolation (the default here, as
Herglotz et al. recommend in "Beyond Bjontegaard", ICIP 2022) or piecewise cubic Hermite (PCHIP).
The numbers come from the package `bjontegaard` (optional extra `anchors`). A BD-rate says nothing
outside of the common interval, therefore that interval is part of every result.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from nvc_jax.errors import NvcError

MIN_POINTS = 4
MIN_OVERLAP_PERCENT = 25.0


class BdRate(NamedTuple):
    """Result of `bd_rate`. Negative percent: the tested codec needs fewer bits than the anchor."""

    percent: float | None  # None: there is no meaningful figure, `reason` says why
    reason: str | None
    overlap: tuple[float, float] | None  # the common interval of quality
    overlap_percent: float  # the part of the tested codec's interval that this is


def bd_rate(anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]) -> BdRate:
    """BD-rate of `test` relative to `anchor`, with Akima interpolation.

    Args:
      anchor, test: (rate, quality) points in any order; rate in any unit (both the same), quality
        in dB or whatever grows with quality.
    Returns:
      a `BdRate` whose percent is None, with a reason, when a curve has fewer than 4 points or does
      not rise, or when the curves share less than a quarter of the tested codec's interval.
    Raises:
      NvcError: a rate or quality that is no positive finite number.
    """
    for rate, quality in (*anchor, *test):
        if not (math.isfinite(quality) and math.isfinite(rate) and rate > 0):
            raise NvcError(f"BD-rate: ({rate}, {quality}) is not a (rate > 0, quality) point")
    for name, curve in (("anchor", anchor), ("tested codec", test)):
        if len(curve) < MIN_POINTS:
            return BdRate(None, f"the {name} has {len(curve)} points, 4 are needed", None, 0.0)
        ordered = sorted(curve)
        if any(a[0] == b[0] or a[1] >= b[1] for a, b in pairwise(ordered)):
            return BdRate(None, f"the quality of the {name} does not rise with rate", None, 0.0)

    anchor_rates, anchor_qualities = zip(*sorted(anchor), strict=True)
    test_rates, test_qualities = zip(*sorted(test), strict=True)
    low = max(anchor_qualities[0], test_qualities[0])
    high = min(anchor_qualities[-1], test_qualities[-1])
    if high <= low:
        which = "below" if test_qualities[-1] < anchor_qualities[0] else "above"
        return BdRate(
            None, f"no overlap: the tested codec lies {which} the anchor's range", None, 0.0
        )
    share = 100 * (high - low) / (test_qualities[-1] - test_qualities[0])
    if share < MIN_OVERLAP_PERCENT:
        return BdRate(None, f"only {share:.0f} % of the range overlaps", (low, high), share)

    try:
        with warnings.catch_warnings():
            # It imports matplotlib for plots that we do not make; what that warns of is not ours.
            warnings.simplefilter("ignore")
            import bjontegaard
    except ImportError:
        return BdRate(
            None,
            "needs the package bjontegaard: pip install 'nvc-jax[anchors]'",
            (low, high),
            share,
        )
    percent = bjontegaard.bd_rate(
        anchor_rates,
        anchor_qualities,
        test_rates,
        test_qualities,
        method="akima",
        require_matching_points=False,
        min_overlap=0,
    )
    return BdRate(float(percent), None, (low, high), share)


def mean_percent(results: Sequence[BdRate]) -> float | None:
    """Plain mean over clips of the figures that exist; None when there is none."""
    known = [result.percent for result in results if result.percent is not None]
    return sum(known) / len(known) if known else None


def bd_table(
    points: Sequence[dict], quality: str, against: Sequence[tuple[str, str]] = ()
) -> list[dict]:
    """BD-rates of models against anchors, clip by clip and as a mean over clips.

    Args:
      points: measured points as `nvc_jax.evaluation.runner.run_job` returns them; those with an
        `error` are left out.
      quality: which entry is the quality, "psnr" or "ms_ssim_db".
      against: pairs of a model and its anchor, which may be a model too. () for every model against
        every anchor, and those after the first model against that one.
    Returns:
      one dict per (model, anchor): `model`, `anchor`, `quality`, `mean_percent` (over the clips
      that have a figure; None without any) and `clips`, a dict from clip name to the fields of
      `BdRate`.
    """
    good = [point for point in points if "error" not in point]
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in good:
        curves.setdefault((point["codec"], point["clip"]), []).append(
            (point["bpp"], point[quality])
        )
    clips = list(dict.fromkeys(point["clip"] for point in good))
    models, anchors = (
        list(dict.fromkeys(p["codec"] for p in good if p["kind"] == kind))
        for kind in ("nvc", "anchor")
    )
    against = against or [
        (model, anchor)
        for number, model in enumerate(models)
        for anchor in anchors + models[: min(number, 1)]
    ]
    table = []
    for model, anchor in against:
        results = {
            clip: bd_rate(curves.get((anchor, clip), []), curves.get((model, clip), []))
            for clip in clips
        }
        table.append(
            {
                "model": model,
                "anchor": anchor,
                "quality": quality,
                "mean_percent": mean_percent(list(results.values())),
                "clips": {clip: result._asdict() for clip, result in results.items()},
            }
        )
    return table
