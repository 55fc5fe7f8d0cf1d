"""What calibration costs: Tables 4 to 6 of Tian et al. (arXiv 2309.11276), and the scale tables.

Rates are bytes of files, distortions those of the encoder's reconstructions, BD-rates means over
clips. Everything runs on this machine: whether files decode elsewhere is what
`nvc_jax.benchmarks.platforms` measures.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nvc_jax import codec as coding
from nvc_jax import unit_program
from nvc_jax.benchmarks.clips import clip_pictures, encode_clip
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, FIXED, FLOAT, RICE, write_flags
from nvc_jax.entropy.coder import SKIP
from nvc_jax.entropy.likelihood import LEVELS, SCALE_MAX, SCALE_MIN
from nvc_jax.evaluation.bdrate import bd_rate, mean_percent
from nvc_jax.models import released
from nvc_jax.models.released import Released
from nvc_jax.video import open_video

# Levels, least and largest scale, middle of a level or its lower end. The last one is printed.
LADDERS = (
    (LEVELS, SCALE_MIN, SCALE_MAX, True),
    (LEVELS, SCALE_MIN, SCALE_MAX, False),
    (32, SCALE_MIN, SCALE_MAX, True),
    (32, SCALE_MIN, SCALE_MAX, False),
    (32, 0.01, 64.0, True),
    (32, 0.01, 64.0, False),
)


class Point(NamedTuple):
    """One clip at one quality.

    Attributes:
      file_bytes: on disk.
      psnr: 6:1:1, mean over pictures.
      units, elements, skipped, flags: counts; elements of the latent, not of the hyper-latent.
      fixed_bits, rice_bits: of the lists of flags, all in the one code or in the other.
      mean_gap_bits: what the lists would take at log2(elements / flags) bits a flag.
    """

    file_bytes: int
    psnr: float
    units: int
    elements: int
    skipped: int
    flags: int
    fixed_bits: int
    rice_bits: int
    mean_gap_bits: float


@dataclasses.dataclass(frozen=True)
class Clips:
    """What is coded for every variant.

    Attributes:
      paths, qps, frames, size: see `benchmark`.
      compiled: what earlier calls of `measure` have compiled, by model and picture size.
    """

    paths: list[str]
    qps: list[int]
    frames: int
    size: tuple[int, int]
    compiled: dict = dataclasses.field(default_factory=dict)

    def measure(
        self, model: Released, mode: int, exponents: tuple[int, ...], on_done: Callable
    ) -> dict[str, list[Point]]:
        """Codes everything: clip -> a point for every qp."""
        points = {}
        with tempfile.TemporaryDirectory() as folder:
            for clip in self.paths:
                pictures = clip_pictures(clip, self.size, self.frames)
                height, width = pictures[0].y.shape
                codec = unit_program.prepare(model, width, height, mode, exponents)
                key = id(codec.model), mode, width, height
                _, program = self.compiled.setdefault(key, (codec.model, codec.program))
                codec = codec._replace(program=program)
                points[clip] = []
                for qp in self.qps:
                    path = Path(folder) / "clip.nvc"
                    units, scores = encode_clip(codec, pictures, open_video(clip)[0].fps, qp, path)
                    point = _point(path.stat().st_size, float(np.mean(scores)), units)
                    points[clip].append(point)
                    on_done()
        return points


def _point(file_bytes: int, psnr: float, units: list[coding.EncodedUnit]) -> Point:
    latents = [unit.coded.indices[1:] for unit in units]  # the hyper-latent comes first
    elements = sum(len(step) for latent in latents for step in latent)
    flags = sum(int(step.sum()) for unit in units for step in unit.coded.flags)
    lists = [unit.coded.flags for unit in units if unit.coded.flags]
    fixed, rice = (sum(8 * len(write_flags(f, code)) for f in lists) for code in (FIXED, RICE))
    gap = elements / flags if flags else 1.0
    return Point(
        file_bytes=file_bytes,
        psnr=psnr,
        units=len(units),
        elements=elements,
        skipped=sum(int((step == SKIP).sum()) for latent in latents for step in latent),
        flags=flags,
        fixed_bits=fixed,
        rice_bits=rice,
        mean_gap_bits=flags * float(np.log2(gap)),
    )


def _variants(
    models: list[Released], exponents: list[int], skip_scales: list[float]
) -> Iterator[tuple[str, str, Released, int, tuple[int, ...]]]:
    """(table, name of the row, model, mode, margin exponents)."""
    for model in models:
        yield "margins", f"{model.name}, float", model, FLOAT, ()
        for e in exponents:
            yield "margins", f"{model.name}, 2^-{e}", model, CALIBRATED, (e,)
        if model.exact:
            yield "margins", f"{model.name}, exact", model, EXACT, ()
    base = models[0]
    for scale in skip_scales:
        below = int(np.searchsorted(base.spec.scale_boundaries, scale, side="right"))
        gaussian = base.spec.families["gaussian"]._replace(skip_below=below)
        spec = base.spec._replace(families=base.spec.families | {"gaussian": gaussian})
        yield "skip", f"scales below {scale:g}", base._replace(spec=spec), FLOAT, ()
    for ladder in LADDERS:
        levels, low, high, middle = ladder
        name = f"{levels} levels, {low:g}..{high:g}, {'middle' if middle else 'lower end'}"
        yield "ladder", name, with_ladder(base, *ladder), FLOAT, ()


def with_ladder(model: Released, levels: int, low: float, high: float, middle: bool) -> Released:
    """The same model, less its scale head, with other scale tables, and nothing skipped."""
    module, params = released.without_scale_head(model.module, dict(model.variables["params"]))
    tensors, metadata = released.freeze(
        model.name, model.codec, module, params,
        levels=levels, scale_range=(low, high), middle=middle, skip_scale=0.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{model.name}.safetensors"
        released.save(path, tensors, metadata)
        return released.load(path)


def benchmark(
    clips: list[str],
    models: list[str],
    qps: list[int],
    frames: int,
    size: tuple[int, int],
    exponents: list[int],
    skip_scales: list[float],
) -> dict[str, Any]:
    """Measures all tables, prints and returns them.

    Args:
      clips: paths; models: names or files, of which the first is the one compared with.
      qps: at least four, for BD-rates.
      frames, size: of a clip at most; its middle is coded.
      exponents: of the margins 2^-e.
      skip_scales: scales below which nothing is coded, the first for comparison.
    """
    work = Clips(clips, qps, frames, size)
    variants = list(_variants([released.load(m) for m in models], exponents, skip_scales))
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    tables: dict[str, dict[str, dict[str, list[Point]]]] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(variants) * len(clips) * len(qps))
        for table, name, model, mode, margins in variants:
            bar.update(task, description=name)
            points = work.measure(model, mode, margins, lambda: bar.advance(task))
            tables.setdefault(table, {})[name] = points
    results = {name: summarise(rows) for name, rows in tables.items()}
    for name, rows in results.items():
        _print(name, rows)
    return results | {"clips": clips, "qps": qps, "frames": frames}


def summarise(rows: dict[str, dict[str, list[Point]]]) -> list[dict[str, Any]]:
    """One entry per row, BD-rates against the first."""
    anchor, *_ = rows.values()
    result = []
    for name, clips in rows.items():
        rates = [bd_rate(_curve(anchor[clip]), _curve(points)) for clip, points in clips.items()]
        points = [p for ps in clips.values() for p in ps]
        total = {f: sum(getattr(p, f) for p in points) for f in Point._fields}
        flags = max(1, total["flags"])
        result.append(
            {
                "name": name,
                "bd_rate_percent": mean_percent(rates),
                "flags_per_unit": total["flags"] / total["units"],
                "fixed_bits_per_flag": total["fixed_bits"] / flags,
                "rice_bits_per_flag": total["rice_bits"] / flags,
                "mean_gap_bits_per_flag": total["mean_gap_bits"] / flags,
                "skipped_percent": 100 * total["skipped"] / total["elements"],
                "file_bytes": total["file_bytes"],
            }
        )
    return result


def _curve(points: list[Point]) -> list[tuple[float, float]]:
    return [(p.file_bytes, p.psnr) for p in points]


TITLES = {
    "margins": "Margins (Tables 4 and 5)",
    "skip": "Skipped elements (Table 6)",
    "ladder": "Scale tables, without protection",
}


def _print(table: str, rows: list[dict]) -> None:
    print(f"\n{TITLES[table]}; BD-rate against the first row")
    width = max(len(row["name"]) for row in rows)
    head = f"{'':{width}} {'BD-rate':>9} {'skipped':>9}"
    if table == "margins":
        head += f" {'flags/unit':>11} {'bits per flag: fixed':>21} {'Rice':>6} {'mean gap':>9}"
    print(head)
    for row in rows:
        rate = row["bd_rate_percent"]
        cells = f"{row['name']:{width}} " + (f"{rate:+7.2f} %" if rate is not None else f"{'-':>9}")
        cells += f" {row['skipped_percent']:7.1f} %"
        if table == "margins" and row["flags_per_unit"]:
            cells += (
                f" {row['flags_per_unit']:11.1f} {row['fixed_bits_per_flag']:21.1f} "
                f"{row['rice_bits_per_flag']:6.1f} {row['mean_gap_bits_per_flag']:9.1f}"
            )
        print(cells)
