"""One self-contained HTML page (and a table for the terminal) about the results of an evaluation.

The page needs nothing from anywhere else: plots are inline SVG with the values as hover titles,
pictures are inline PNG, the style follows the reader's light or dark preference.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nvc_jax.evaluation.runner import all_passed, limited
from nvc_jax.metrics import recovery_frames

# One colour and marker per family of anchors, low delay variants dashed, those with an intra period
# of their own dotted; our models take others in turn. Colours are the CSS variables --c0 to --c9.
_FAMILIES = {"x264": 2, "x265": 3, "svt-av1": 4, "vvenc": 5}
_MARKERS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M0,-5L5,0L0,5L-5,0z",
    "M-3.5,-3.5H3.5V3.5H-3.5z",
    "M0,-4.5L4.5,3.5H-4.5z",
    "M0,4.5L4.5,-3.5H-4.5z",
    "M-4,-1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4z",
    "M-3.5,-1.5H3.5V1.5H-3.5z",
    "M-1.5,-4.5H1.5V4.5H-1.5z",
    "M-4,-4L4,4L4,-4L-4,4z",
    "M-4,-4L4,4L-4,4L4,-4z",
)
_OURS = (0, 1, 6, 7, 8, 9)
_QUALITIES = {"psnr": "PSNR, dB", "ms_ssim_db": "MS-SSIM, dB"}


def write_report(results: dict, folder: Path) -> Path:
    """Write `report.html` into the work folder of an evaluation; returns its path.

    Args:
      results: what `nvc_jax.evaluation.runner.evaluate` returned (or its JSON file, loaded).
      folder: the work folder; its `crops/` are shown in the page.
    """
    path = Path(folder) / "report.html"
    path.write_text(html_report(results, Path(folder)), encoding="utf-8")
    return path


def html_report(results: dict, folder: Path) -> str:
    """The page as a string; see `write_report`."""
    models = ", ".join(_codecs([p for p in results["points"] if p["kind"] == "nvc"]))
    hardware = results["machine"]
    parts = [
        f"<h1>Evaluation of {escape(models)}</h1>",
        f'<p class="sub">{escape(results["created_utc"].replace("T", " "))} · '
        f"{_count(len(results['clips']), 'clip')} of up to {results['config']['frames']} frames · "
        f"{escape(hardware['cpu'])}, {_count(hardware['cores'], 'core')}</p>",
        _checks_section(results),
        _bd_section(results),
        _speed_section(results),
        *(_clip_section(clip, results, folder) for clip in results["clips"]),
        _method_section(results),
        _points_section(results),
    ]
    return _PAGE.format(
        title=escape(f"Evaluation of {models}"), style=_STYLE, body="\n".join(parts)
    )


def print_tables(results: dict, console: Console) -> None:
    """Print our points and the BD-rates to a terminal."""
    table = Table(
        title="Our points (rate from file bytes; fps: encode / decode, steady state)", box=SIMPLE
    )
    for name in ("clip, model", "at"):
        table.add_column(name)
    for name in ("bpp", "PSNR", "MS-SSIM", "fps"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("checks")
    clip = None
    for point in results["points"]:
        if point["kind"] != "nvc":
            continue
        if point["clip"] != clip:
            clip = point["clip"]
            table.add_section()
            table.add_row(clip)
        start = [f"  {point['codec']}", point["setting"]]
        if "error" in point:
            table.add_row(*start, *["n/a"] * 4, "[red]FAILED[/red]")
            continue
        passed = point["checks"]["passed"]
        table.add_row(
            *start,
            f"{point['bpp']:.4f}",
            f"{point['psnr']:.2f}",
            f"{point['ms_ssim']:.4f}",
            f"{_fps(point['encode_fps_steady'])} / {_fps(point['decode_fps_steady'])}",
            "passed" if passed else "[red]FAILED[/red]",
        )
    console.print(table)
    for point in results["points"]:
        if "error" in point:
            name = f"{point['clip']}, {point['codec']}, {point['setting']}"
            console.print(f"{name}: {point['error']}", markup=False)
    if not results["bd_rates"]:
        return
    # Clips below each other, because there may be many: so every comparison has a table's width.
    title = "BD-rate by PSNR 6:1:1 (negative: fewer bits than the anchor)"
    table = Table(title=title, box=SIMPLE)
    for name in ("model", "anchor", "clip"):
        table.add_column(name)
    table.add_column("BD-rate", justify="right")
    for row in results["bd_rates"]:
        if row["quality"] == "psnr":
            names = row["model"], f"{row['anchor']} ({_preset(results, row['anchor'])})"
            for clip in results["clips"]:
                percent = row["clips"].get(clip["name"], {}).get("percent")
                table.add_row(*names, clip["name"], _percent(percent))
                names = "", ""
            table.add_row("", "", "mean", _percent(row["mean_percent"]), end_section=True)
    console.print(table)
    for row in limited(results):
        verdict = "met" if row["met"] else "[red]NOT MET[/red]"
        console.print(f"{_limit(row)}: {verdict}")


def _limit(row: dict) -> str:
    return (
        f"{row['model']} against {row['anchor']}: {_percent(row['mean_percent'])}, at most "
        f"{row['limit_percent']:+} %"
    )


# ---------------------------------------------------------------------------------------- sections


def _checks_section(results: dict) -> str:
    ours = [point for point in results["points"] if point["kind"] == "nvc"]
    failed = [p for p in ours if "error" in p or not p["checks"]["passed"]]
    units = sum(p["checks"]["units"] for p in ours if "checks" in p)
    text = (
        f"{len(ours) - len(failed)} of {_count(len(ours), 'stream')} passed: decoded by a fresh "
        f"process from the file alone, every checksum of decoded symbols correct "
        f"({_count(units, 'unit')}), every decoded picture equal to the encoder's reconstruction."
    )
    items = ""
    for point in failed:
        name = f"{point['clip']}, {point['codec']}, {point['setting']}"
        if "error" in point:
            problem = point["error"]
        else:
            checks = point["checks"]
            problem = (
                f"{checks['checksums_ok']} of {checks['units']} checksums correct, "
                f"{checks['frames_compared']} pictures compared, {checks['differing_samples']} "
                f"samples differ (by up to {checks['largest_difference']})"
            )
        items += f"<li>{escape(name)}: {escape(problem)}</li>"
    for row in limited(results):
        items += f"<li>{escape(_limit(row))}: {'met' if row['met'] else 'NOT MET'}</li>"
    items = f"<ul>{items}</ul>" if items else ""
    kind = "good" if all_passed(results) else "bad"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in results["notes"])
    return f'<div class="checks {kind}"><p>{text}</p>{items}</div>{notes}'


def _bd_section(results: dict) -> str:
    if not results["bd_rates"]:
        return ""
    parts = ["<h2>BD-rate</h2>"]
    clips = [clip["name"] for clip in results["clips"]]
    for quality, label in (("psnr", "PSNR"), ("ms_ssim_db", "MS-SSIM")):
        rows = [row for row in results["bd_rates"] if row["quality"] == quality]
        heads = "".join(f"<th>{escape(clip)}</th>" for clip in clips)
        body = ""
        for row in rows:
            cells = ""
            for clip in clips:
                result = row["clips"].get(clip, {"percent": None, "reason": "not measured"})
                if result["percent"] is None:
                    cells += f"<td>n/a<small>{escape(result['reason'])}</small></td>"
                else:
                    cells += (
                        f"<td>{_percent(result['percent'])}"
                        f"<small>{result['overlap_percent']:.0f} % of range</small></td>"
                    )
            body += (
                f'<tr><th scope="row">{escape(row["model"])} against {escape(row["anchor"])}'
                f"<small>{escape(_preset(results, row['anchor']))}</small></th>{cells}"
                f"<td><b>{_percent(row['mean_percent'])}</b></td></tr>"
            )
        parts.append(
            f'<div class="scroll"><table class="rates"><caption>At equal {label}</caption>'
            f"<thead><tr><th></th>{heads}<th>mean</th></tr></thead>"
            f"<tbody>{body}</tbody></table></div>"
        )
    parts.append(
        "<p>Positive: more bits than the anchor needs for the same quality; negative: fewer. "
        f"First {results['config']['frames']} frames of each clip, rates from file bytes, "
        "bpp and quality averaged over the clip, Akima interpolation of the logarithm of the rate "
        "over the interval of quality that both curves cover; its share of our range stands below "
        "each figure. The mean is over the clips that have a figure. Presets and "
        'structures of the anchors are <a href="#method">below</a>.</p>'
    )
    return "".join(parts)


def _speed_section(results: dict) -> str:
    body = ""
    for codec in _codecs(results["points"]):
        points = [p for p in results["points"] if p["codec"] == codec and "error" not in p]
        if not points:
            continue
        cells = ""
        for key in ("encode_fps", "decode_fps", "encode_fps_steady", "decode_fps_steady"):
            rates = [p.get(key) for p in points]
            if all(rates):
                rate = sum(p["frames"] for p in points) / sum(p["frames"] / p[key] for p in points)
                cells += f"<td>{_fps(rate)}</td>"
            else:
                cells += "<td>n/a</td>"
        body += f'<tr><th scope="row">{escape(codec)}</th>{cells}</tr>'
    hardware = results["machine"]
    heads = "".join(
        f"<th>{verb}<small>{scope}</small></th>"
        for scope in ("whole process", "steady state")
        for verb in ("encode", "decode")
    )
    return (
        "<h2>Speed, frames per second</h2>"
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        "<p>All frames of all points divided by the wall time of all runs. Whole process: "
        "start, compilation, reading and writing uncompressed files and entropy coding included "
        "(our encoder writes its reconstruction besides). Steady state: as our codec reports it, "
        "without start, compilation and the first unit. Threads are each program's default "
        f"(VVenC: one) on {_count(hardware['cores'], 'core')} of {escape(hardware['cpu'])}; clips "
        "are short, so whole-process figures are mostly start-up.</p>"
    )


def _clip_section(clip: dict, results: dict, folder: Path) -> str:
    points = [p for p in results["points"] if p["clip"] == clip["name"] and "error" not in p]
    colours = _colours(results)
    head = (
        f"<h2>{escape(clip['name'])}</h2>"
        f'<p class="sub">{clip["width"]}&times;{clip["height"]}, '
        f"{_count(clip['frames'], 'frame')}, {float(Fraction(clip['fps'])):g} per second</p>"
    )
    ours = [p for p in points if p["kind"] == "nvc"]
    if not ours:
        return head + "<p>None of our streams could be measured.</p>"
    plots = "".join(
        f"<figure>{_rate_plot(points, key, colours)}<figcaption>{label} over bits per pixel "
        "(logarithmic), the part around our own range</figcaption></figure>"
        for key, label in _QUALITIES.items()
    )
    parts = [head, f'<div class="plots">{plots}</div>', _legend(_codecs(points), colours)]
    for model in _codecs(ours):
        of_model = sorted((p for p in ours if p["codec"] == model), key=lambda p: p["bpp"])
        reference = _reference(points, of_model[len(of_model) // 2])
        parts.append(f"<h3>{escape(model)}, frame by frame</h3>")
        parts.append(_frame_plots(clip, of_model, reference, colours))
        parts += [_recovery_text(clip, of_model)] if clip["cuts"] else []
        middle = (len(of_model) - 1) // 2
        parts.append("<h3>Pictures</h3>")
        parts += [
            _crop_row(clip, point, _reference(points, point), folder)
            for point in of_model[middle : middle + 2]
        ]
        parts += [_motion_row(point, folder) for point in of_model if point.get("motion")]
    frame, top, left, height, width = clip["crop"]
    parts.append(
        f"<p>Frame {frame}, the {width}&times;{height} samples at ({left}, {top}): the window with "
        "the most detail in the source. Rate and PSNR are those of the whole clip; the anchor "
        "shown is its point of the nearest rate.</p>"
    )
    return "".join(parts)


def _frame_plots(clip: dict, points: list[dict], reference: dict | None, colours: dict) -> str:
    series = [
        Line(p["setting"], colours[p["codec"]], list(enumerate(p["frame_psnr"])), emphasis=True)
        for p in points
    ]
    note = ""
    if reference:
        series.append(
            Line(
                reference["codec"],
                colours[reference["codec"]],
                list(enumerate(reference["frame_psnr"])),
                stroke="dashed",
            )
        )
        note = (
            f"; dashed: {reference['codec']} {reference['setting']} at {reference['bpp']:.4f} bpp, "
            f"nearest in rate to our {points[len(points) // 2]['setting']}"
        )
    cuts = [(cut - 0.5, "cut") for cut in clip["cuts"]]
    quality = plot(series, "frame", "PSNR, dB", marks=cuts, end_labels=True)
    bits = [
        Line(
            p["setting"],
            colours[p["codec"]],
            [
                (frame, unit["bytes"] * 8 / 1000)
                for unit in p["units"]
                for frame in (min(unit["frames"]) - 0.4, max(unit["frames"]) + 0.4)
            ],
            steps=True,
        )
        for p in points
    ]
    rate = plot(bits, "frame", "kbit per unit", log_y=True, marks=cuts, end_labels=True)
    return (
        f'<div class="plots"><figure>{quality}<figcaption>PSNR of each frame{escape(note)}'
        f"</figcaption></figure><figure>{rate}<figcaption>Bits of each unit (frames coded "
        "together), logarithmic</figcaption></figure></div>"
    )


def _recovery_text(clip: dict, points: list[dict]) -> str:
    items = ""
    for start, end in zip(clip["cuts"], [*clip["cuts"][1:], clip["frames"]], strict=True):
        for p in points:
            frames, mean = recovery_frames(p["frame_psnr"], start, end)
            units = _unit_index(p["units"], start + frames) - _unit_index(p["units"], start)
            delay = f"{_count(frames, 'frame')} ({_count(units, 'unit')}) after it"
            items += (
                f"<li>Cut at frame {start}, {escape(p['setting'])}: PSNR is within 1 dB of the "
                f"mean of the new scene ({mean:.2f} dB over {_count(end - start, 'frame')}) "
                f"{delay if frames else 'at once'}.</li>"
            )
    return f"<p>Hard cuts (found in the source by its luma histogram):</p><ul>{items}</ul>"


def _unit_index(units: list[dict], frame: int) -> int:
    ordered = sorted(units, key=lambda unit: min(unit["frames"]))
    return next(i for i, unit in enumerate(ordered) if frame in unit["frames"])


def _crop_row(clip: dict, point: dict, reference: dict | None, folder: Path) -> str:
    shown = [(f"crops/{clip['name']}.png", "source")]
    for p in (point, reference):
        if p:
            text = f"{p['codec']} {p['setting']}: {p['bpp']:.4f} bpp, {p['psnr']:.2f} dB"
            shown.append((p["crop"], text))
    return f'<div class="crops">{_figures(shown, folder)}</div>'


def _motion_row(point: dict, folder: Path) -> str:
    return (
        f"<h3>Motion, {escape(point['codec'])} {escape(point['setting'])}</h3>"
        f'<div class="crops">{_figures(point["motion"], folder)}</div>'
        "<p>A whole frame. Hues are directions: red comes from the right, green from below left, "
        "blue from above left; white stands still, grey is coded without motion.</p>"
    )


def _figures(shown: Sequence[tuple[str, str]], folder: Path) -> str:
    """Pictures with their captions: (file in the folder, text), as far as there are any."""
    figures = ""
    for name, text in shown:
        file = folder / name
        if file.is_file() and file.stat().st_size:
            data = base64.b64encode(file.read_bytes()).decode()
            figures += (
                f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{escape(text)}</figcaption></figure>"
            )
    return figures


def _method_section(results: dict) -> str:
    rows = ""
    for codec in _codecs([p for p in results["points"] if p["kind"] == "anchor"]):
        points = [p for p in results["points"] if p["codec"] == codec]
        good = next((p for p in points if "error" not in p), None)
        if good:
            settings = ", ".join(dict.fromkeys(p["setting"] for p in points))
            rows += (
                f"<tr><th scope='row'>{escape(codec)}</th><td>{escape(good['preset'])}</td>"
                f"<td>{escape(good['structure'])}</td><td>{escape(settings)}</td>"
                f"<td><code>{escape(good['command'])}</code></td></tr>"
            )
        errors = {p["error"]: f"{p['clip']}, {p['setting']}" for p in points if "error" in p}
        for error, where in errors.items():
            rows += (
                f"<tr><th scope='row'>{escape(codec)}</th>"
                f"<td colspan='4'>failed ({escape(where)}): {escape(error)}</td></tr>"
            )
    anchors = (
        (
            '<div class="scroll"><table class="text"><thead><tr><th>anchor</th><th>preset</th>'
            "<th>structure</th><th>points</th><th>command (of one point)</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
            f"<p>{escape(results.get('ffmpeg', ''))}.</p>"
            "<p>Anchors code the same frames from a raw 8-bit 4:2:0 file into a raw elementary "
            "stream (IVF for AV1), whose bytes are counted. They are tuned for PSNR where the "
            "encoder offers it. Bidirectional structures delay pictures, by up to tens of frames, "
            "which makes the task easier; low delay ones do not.</p>"
        )
        if rows
        else ""
    )
    versions = ", ".join(
        f"{name} {version}"
        for name, version in results["machine"].items()
        if name not in ("cpu", "cores", "system")
    )
    return (
        '<h2 id="method">How this was measured</h2>'
        "<p>Rate: bytes of the file, all headers included, times 8, divided by width &times; "
        "height &times; frames. Quality: on the decoded 8-bit 4:2:0 planes at the original size, "
        "for all codecs alike (publications on neural codecs usually score the unrounded output, "
        "which reads slightly higher). PSNR per plane and frame, combined as (6 Y + U + V) / 8, "
        "then averaged over the frames. MS-SSIM per plane (11&times;11 window, &sigma; 1.5, 5 "
        "scales, fewer for planes below 176 samples), combined and averaged in the same way, shown "
        "as &minus;10 log10(1 &minus; MS-SSIM).</p>"
        f"{anchors}"
        f"<p>{escape(results['machine']['system'])}, {escape(versions)}.</p>"
    )


def _points_section(results: dict) -> str:
    body = ""
    for p in results["points"]:
        head = f"<td>{escape(p['clip'])}</td><td>{escape(p['codec'])}</td>"
        head += f"<td>{escape(p['setting'])}</td>"
        if "error" in p:
            body += f'<tr>{head}<td colspan="9">{escape(p["error"])}</td></tr>'
            continue
        values = [f"{p['file_bytes']}", f"{p['bpp']:.4f}"]
        values += [f"{p[key]:.2f}" for key in ("psnr", "psnr_y", "psnr_u", "psnr_v")]
        values += [f"{p['ms_ssim']:.5f}", _fps(p["encode_fps"]), _fps(p["decode_fps"])]
        body += f"<tr>{head}{''.join(f'<td>{value}</td>' for value in values)}</tr>"
    heads = "clip codec setting bytes bpp PSNR Y U V MS-SSIM encode&nbsp;fps decode&nbsp;fps"
    return (
        "<details><summary>All points</summary>"
        '<div class="scroll"><table class="points"><thead><tr>'
        + "".join(f"<th>{name}</th>" for name in heads.split())
        + f"</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


# ------------------------------------------------------------------------------------------- plots


@dataclass(frozen=True)
class Line:
    """One curve: `points` are (x, y); `steps` joins only each pair of points, as a level."""

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    markers: bool = False
    emphasis: bool = False
    stroke: str = ""  # "dashed", "dotted"
    steps: bool = False


def plot(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    end_labels: bool = False,
) -> str:
    """An SVG of curves with axes, grid and the values as hover titles.

    Args:
      lines: at least one, with at least one point; logarithmic axes need positive values.
      y_range: shows this part only; the default is what the points need. The x axis fits the points
        that are seen.
      marks: (x, text) of vertical marks.
      end_labels: write the label of each line at its right end.
    """
    width, height, left, right, top, bottom = 560, 340, 56, 64 if end_labels else 16, 14, 46
    ys = y_range or _padded([y for line in lines for _, y in line.points], log_y)
    seen = [x for line in lines for x, y in line.points if ys[0] <= y <= ys[1]]
    xs = _padded(seen or [x for line in lines for x, _ in line.points], log_x)

    def place(value, limits, log, start, end):
        if log:
            value, limits = math.log(value), (math.log(limits[0]), math.log(limits[1]))
        return start + (value - limits[0]) / (limits[1] - limits[0]) * (end - start)

    def at(x, y):
        return (
            round(place(x, xs, log_x, left, width - right), 1),
            round(place(y, ys, log_y, height - bottom, top), 1),
        )

    svg = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)}">']
    for value in _ticks(*xs, log_x):
        x, _ = at(value, ys[0])
        svg.append(f'<path class="grid" d="M{x},{top}V{height - bottom}"/>')
        svg.append(f'<text x="{x}" y="{height - bottom + 17}" class="mid">{value:g}</text>')
    for value in _ticks(*ys, log_y):
        _, y = at(xs[0], value)
        svg.append(f'<path class="grid" d="M{left},{y}H{width - right}"/>')
        svg.append(f'<text x="{left - 8}" y="{y + 4}" class="end">{value:g}</text>')
    svg.append(f'<path class="axis" d="M{left},{top}V{height - bottom}H{width - right}"/>')
    middle = (left + width - right) / 2
    svg.append(f'<text x="{middle}" y="{height - 8}" class="mid">{escape(x_label)}</text>')
    middle = (top + height - bottom) / 2
    svg.append(
        f'<text x="14" y="{middle}" class="mid" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    for value, text in marks:
        x, _ = at(value, ys[0])
        svg.append(f'<path class="mark" d="M{x},{top}V{height - bottom}"/>')
        svg.append(f'<text x="{x + 4}" y="{top + 11}" class="marktext">{escape(text)}</text>')
    # Nested, so that curves that leave the shown range are cut at the frame.
    inner = left, top, width - left - right, height - top - bottom
    svg.append(
        '<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">'.format(*inner)
    )
    ends = []
    for line in lines:
        corners = [at(x, y) for x, y in line.points]
        if line.steps:
            pairs = zip(corners[::2], corners[1::2], strict=True)
            path = "".join(f"M{a[0]},{a[1]}H{b[0]}" for a, b in pairs)
        else:
            path = "M" + "L".join(f"{x},{y}" for x, y in corners)
        kind = f"line {line.stroke}" + " strong" * line.emphasis + " step" * line.steps
        svg.append(f'<path class="{kind}" style="stroke:var(--c{line.colour})" d="{path}"/>')
        for (x, y), (x_value, y_value) in zip(corners, line.points, strict=True):
            title = f"{line.label}: {x_label} {x_value:.4g}, {y_label} {y_value:.4g}"
            shape = _MARKERS[line.colour] if line.markers else "M-5,-5H5V5H-5z"
            look = f'style="fill:var(--c{line.colour})"' if line.markers else 'class="touch"'
            svg.append(
                f'<path transform="translate({x},{y})" d="{shape}" {look}>'
                f"<title>{escape(title)}</title></path>"
            )
        ends.append((corners[-1][1], line))
    svg.append("</svg>")
    if end_labels:
        ends.sort(key=lambda end: end[0])
        heights = _spread([y + 4 for y, _ in ends], top + 8, height - bottom + 4)
        for y, (_, line) in zip(heights, ends, strict=True):
            svg.append(
                f'<text x="{width - right + 5}" y="{y:.1f}" '
                f'style="fill:var(--c{line.colour})">{escape(line.label)}</text>'
            )
    svg.append("</svg>")
    return "".join(svg)


def _rate_plot(points: list[dict], quality: str, colours: dict) -> str:
    """Rate-distortion curves around our own range: anchors usually reach much further."""
    ours = [p[quality] for p in points if p["kind"] == "nvc"]
    margin = max(0.15 * (max(ours) - min(ours)), 1.0)
    lines = []
    for codec in reversed(_codecs(points)):  # ours are drawn last, on top
        curve = sorted((p["bpp"], p[quality]) for p in points if p["codec"] == codec)
        mine = any(p["codec"] == codec and p["kind"] == "nvc" for p in points)
        lines.append(Line(codec, colours[codec], curve, True, mine, _stroke(codec)))
    limits = (min(ours) - margin, max(ours) + margin)
    return plot(lines, "bits per pixel", _QUALITIES[quality], log_x=True, y_range=limits)


def _legend(codecs: list[str], colours: dict) -> str:
    items = ""
    for codec in codecs:
        colour = colours[codec]
        items += (
            '<span><svg viewBox="0 0 34 14" class="key">'
            f'<path class="line {_stroke(codec)}" style="stroke:var(--c{colour})" d="M0,7H34"/>'
            f'<path transform="translate(17,7)" style="fill:var(--c{colour})" '
            f'd="{_MARKERS[colour]}"/></svg>{escape(codec)}</span>'
        )
    return f'<p class="legend">{items}</p>'


def _spread(places: list[float], first: float, last: float, distance: float = 12) -> list[float]:
    """Move ascending positions so that texts at them do not overlap: up from `last`, then down."""
    places, limit = list(places), last
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - distance
    limit = first
    for i in range(len(places)):
        places[i] = max(places[i], limit)
        limit = places[i] + distance
    return places


def _padded(values: list[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** 0.05, 1.05)
        return low / factor, high * factor
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within [low, high]: about six, or 1, 2, 5 times powers of ten if `log`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


# ------------------------------------------------------------------------------------------- words


def _codecs(points: list[dict]) -> list[str]:
    """Names in the order of appearance."""
    return list(dict.fromkeys(point["codec"] for point in points))


def _colours(results: dict) -> dict[str, int]:
    """Index of the colour and marker of each codec."""
    ours, anchors = (
        _codecs([p for p in results["points"] if p["kind"] == kind]) for kind in ("nvc", "anchor")
    )
    return {name: _FAMILIES[_family(name)] for name in anchors} | {
        name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)
    }


def _family(anchor: str) -> str:
    return anchor.partition("@")[0].removesuffix("-lowdelay")


def _stroke(codec: str) -> str:
    """How the line of an anchor tells itself apart from those of its relatives."""
    return "dotted" if "@" in codec else "dashed" if codec.endswith("-lowdelay") else ""


def _reference(points: list[dict], point: dict) -> dict | None:
    """The anchor's point nearest in rate: x265 where there is one, else the first anchor."""
    anchors = [p for p in points if p["kind"] == "anchor"]
    chosen = next((p["codec"] for p in anchors if p["codec"].partition("@")[0] == "x265"), None)
    anchors = [p for p in anchors if p["codec"] == (chosen or anchors[0]["codec"])]
    return min(anchors, key=lambda p: abs(math.log(p["bpp"] / point["bpp"])), default=None)


def _preset(results: dict, anchor: str) -> str:
    """Preset and structure of an anchor in a few words."""
    points = (p for p in results["points"] if p["codec"] == anchor and "error" not in p)
    if (point := next(points, None)) is None:
        return "failed"
    if point["kind"] == "nvc":
        return "ours"
    return f"preset {point['preset']}, {point['structure'].split(':')[0].split(' (')[0]}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.1f} %"


def _fps(value: float | None) -> str:
    return "n/a" if not value else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body><main>
{body}
</main></body></html>
"""

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1c1f23; --soft: #5c6570; --rule: #dfe3e8;
  --panel: #f6f7f9; --good: #2b8a3e; --bad: #c92a2a;
  --c0: #c2255c; --c1: #0b7285; --c2: #1864ab; --c3: #2b8a3e; --c4: #d9680f; --c5: #6741d9;
  --c6: #1c1f23; --c7: #a05a2c; --c8: #7a8b00; --c9: #868e96; }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --ink: #e6e9ed; --soft: #9aa4b0;
  --rule: #323941; --panel: #1d2126; --good: #69db7c; --bad: #ff8787;
  --c0: #ff6f9f; --c1: #3bc9db; --c2: #5cb0ff; --c3: #62d676; --c4: #ffa556; --c5: #b79cff;
  --c6: #e6e9ed; --c7: #d9a06b; --c8: #c0d645; --c9: #adb5bd; } }
body { margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0; line-height: 1.2; }
h2 { font-size: 1.35rem; margin: 3rem 0 .4rem; padding-top: 1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p, ul { max-width: 46rem; } .sub { color: var(--soft); margin: .2rem 0 1.2rem; }
a { color: inherit; }
.checks { border-left: 4px solid var(--good); background: var(--panel); padding: .2rem 1rem; }
.checks.bad { border-color: var(--bad); } .note { color: var(--soft); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; }
tbody th, th:first-child { text-align: left; font-weight: 500; }
td:not(:first-child), th:not(:first-child) { padding-left: .9rem; }
small { display: block; color: var(--soft); font-size: .78rem; font-weight: 400; }
.rates small { white-space: normal; max-width: 11rem; margin-left: auto; }
.rates th small { white-space: nowrap; max-width: none; }
.text td, .text th { text-align: left; white-space: normal; }
.points { font-size: .85rem; } .points td:nth-child(-n+3) { text-align: left; }
code { font: .8rem/1.4 ui-monospace, Consolas, monospace; overflow-wrap: anywhere; }
.text td:last-child { min-width: 22rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
svg text { font-size: 12px; fill: var(--soft); } svg .mid { text-anchor: middle; }
svg .end { text-anchor: end; } figure > svg { width: 100%; display: block; }
.grid { stroke: var(--rule); fill: none; } .axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 1.6; } .strong { stroke-width: 2.6; }
.dashed { stroke-dasharray: 5 4; } .dotted { stroke-dasharray: 2 3; }
.step { stroke-width: 3; stroke-linecap: round; }
.mark { stroke: var(--ink); stroke-dasharray: 2 4; fill: none; }
svg .marktext { fill: var(--ink); } .touch { fill: transparent; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; margin: .6rem 0 0; max-width: none; }
.legend span { display: inline-flex; align-items: center; gap: .5rem; }
.key { width: 34px; height: 14px; }
.crops { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 1rem;
  margin: .6rem 0 1rem; }
.crops img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
details { margin-top: 2.5rem; } summary { cursor: pointer; font-weight: 600; }
"""
