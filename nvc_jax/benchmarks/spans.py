"""Bits of B-frames against the distance of their references, for one model beside others.

What BRHVC (arXiv 2511.08938) is built for: the coarse layers of a hierarchy, whose references are
far away. Every clip is coded in groups as usual; each B-frame then counts under its layer's span,
the distance of its references, rounded up to a power of two. Rates are the bytes that its packet
has in the file, distortions those of the encoder's reconstruction.
"""

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from nvc_jax import bitstream
from nvc_jax import codec as coding
from nvc_jax import schedule as schedules
from nvc_jax.benchmarks.clips import compiled_once, encode_clip, progress, read_clip
from nvc_jax.errors import NvcError
from nvc_jax.evaluation.bdrate import bd_rate, mean_percent
from nvc_jax.models import released

# model -> span -> clip -> (bits per pixel, PSNR) by qp
Curves = dict[str, dict[int, dict[str, list[tuple[float, float]]]]]


def benchmark(
    clips: list[str], models: list[str], qps: list[int], frames: int, size: tuple[int, int]
) -> dict[str, Any]:
    """Codes everything, prints a table and returns it.

    Args:
      clips: paths; models: names or files, of which the first is the one compared with.
      qps: at least four, for BD-rates.
      frames, size: of a clip at most, which is cut to them.

    Raises:
      NvcError: a model or clips without B-frames, or a clip or model that cannot be read.
    """
    curves: Curves = {}
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("", total=len(models) * len(clips) * len(qps))
        for name in models:
            model = released.load(name)
            if not schedules.in_layers(coding.schedule_for(model)):
                raise NvcError(f"'{model.name}' has no B-frames")
            by_span = curves.setdefault(name, defaultdict(lambda: defaultdict(list)))
            prepared = compiled_once(model)
            for clip in clips:
                info, pictures = read_clip(clip, size, frames)
                for qp in qps:
                    bar.update(task, description=f"{model.name}, {Path(clip).name}, qp {qp}")
                    path = Path(folder) / "clip.nvc"
                    points = _points(prepared(info), info, pictures, qp, path)
                    for span, point in points.items():
                        by_span[span][clip].append(point)
                    bar.advance(task)
    rows = summarise(curves)
    if not rows:
        raise NvcError(f"{frames} frames have no B-frames among them; give more")
    _print(rows)
    return {"rows": rows, "clips": clips, "qps": qps, "frames": frames, "size": size}


def _points(codec, info, pictures, qp: int, path: Path) -> dict[int, tuple[float, float]]:
    """Span -> (bits per pixel, PSNR 6:1:1), means over the B-frames of this span."""
    _, scores = encode_clip(codec, info, pictures, qp, path)
    order = coding.schedule_for(codec.model)
    plan = schedules.plan(order, len(pictures))
    written = bitstream.stream_info(path)["units"]
    found = defaultdict(list)
    for unit, packet, psnr in zip(plan, written, scores, strict=True):
        if len(set(unit.refs)) == 2 and unit.ratio < 1:  # the others lie behind their references
            bpp = 8 * packet["bytes"] / (codec.width * codec.height)
            found[2 << unit.layer].append((bpp, psnr))
    return {span: tuple(np.mean(points, axis=0).tolist()) for span, points in found.items()}


def summarise(curves: Curves) -> list[dict[str, Any]]:
    """One entry per model and span: its rate against the first model's, and at equal quality."""
    base = next(iter(curves.values()))
    result = []
    for model, by_span in curves.items():
        for span, by_clip in sorted(by_span.items()):
            anchors = base[span]
            rates = [bd_rate(anchors[clip], points) for clip, points in by_clip.items()]
            equal = [_bpp_at(points, _middle(anchors[clip])) for clip, points in by_clip.items()]
            result.append(
                {
                    "model": model,
                    "span": span,
                    "bpp_at_equal_psnr": float(np.exp(np.mean(np.log(equal)))),
                    "bd_rate_percent": mean_percent(rates),
                    "points": dict(by_clip),
                }
            )
    return result


def _middle(curve: list[tuple[float, float]]) -> float:
    qualities = [psnr for _, psnr in curve]
    return (min(qualities) + max(qualities)) / 2


def _bpp_at(curve: list[tuple[float, float]], psnr: float) -> float:
    """Of a piecewise exponential curve; at its ends where it does not reach so far."""
    rates, qualities = zip(*sorted(curve, key=lambda point: point[1]), strict=True)
    return float(np.exp(np.interp(psnr, qualities, np.log(rates))))


def _print(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["model"]) for row in rows)
    print(f"{'':{width}}  span  bpp at equal PSNR  BD-rate against the first model")
    for row in rows:
        rate = row["bd_rate_percent"]
        shown = "-" if rate is None else f"{rate:+.1f} %"
        print(f"{row['model']:{width}} {row['span']:5} {row['bpp_at_equal_psnr']:18.4f} {shown:>9}")


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draws rates and BD-rates against spans into a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bits, rates = figure.subplots(1, 2)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        spans = [row["span"] for row in own]
        label = model.removesuffix(".safetensors")
        bits.plot(spans, [row["bpp_at_equal_psnr"] for row in own], "o-", label=label)
        known = [(r["span"], r["bd_rate_percent"]) for r in own if r["bd_rate_percent"] is not None]
        if known:
            rates.plot(*zip(*known, strict=True), "o-", label=label)
    spans = sorted({row["span"] for row in rows})
    for axes, label in ((bits, "bits per pixel at equal PSNR"), (rates, "BD-rate, %")):
        axes.set_xlim(spans[0] / 1.2, spans[-1] * 1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(spans, [str(span) for span in spans])
        axes.set_xlabel("distance of the references, frames")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    bits.set_yscale("log")
    bits.legend()
    figure.savefig(path, dpi=150)
