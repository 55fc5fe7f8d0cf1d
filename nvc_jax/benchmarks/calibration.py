"""What calibration costs: Tables 4 to 6 of Tian et al. (arXiv 2309.11276), and the scale tables.

Rates are bytes of files, distortions those of the encoder's reconstructions, BD-rates means over
clips. Everything runs on this machine: whether files decode elsewhere is what
`nvc_jax.benchmarks.platforms` measures.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvc_jax import codec as coding
from nvc_jax.benchmarks.clips import compiled_once, encode_clip, progress, read_clip
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, FIXED, FLOAT, RICE, write_flags
from nvc_jax.entropy.coder import SKIP
from nvc_jax.entropy.likelihood import LEVELS, SCALE_MAX, SCALE_MIN
from nvc_jax.evaluation.bdrate import bd_rate, mean_percent
from nvc_jax.models import released
from nvc_jax.models.released import Released
from nvc_jax.unit_program import UnitCodec

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


class Clips(NamedTuple):
    """What is coded for every variant: see `benchmark`."""

    paths: list[str]
    qps: list[int]
    frames: int
    size: tuple[int, int]

    def measure(
        self, prepared: Callable, entropy_mode: int, exponents: tuple[int, ...], on_done: Callable
    ) -> dict[str, list[Point]]:
        """Codes everything with a `compiled_once` model: clip -> a point for every qp."""
        points = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.nvc"
            for clip in self.paths:
                info, pictures = read_clip(clip, self.size, self.frames)
                codec, points[clip] = prepared(info, entropy_mode, exponents), []
                for qp in self.qps:
                    units, scores = encode_clip(codec, info, pictures, qp, path)
                    size, psnr = path.stat().st_size, float(np.mean(scores))
                    points[clip].append(_point(codec, size, psnr, units))
                    on_done()
        return points


def _point(
    codec: UnitCodec, file_bytes: int, psnr: float, units: list[coding.EncodedUnit]
) -> Point:
    latents = [codec.latents(unit.coded, unit.plan.refs) for unit in units]
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
) -> Iterator[tuple[str, str, Callable, int, tuple[int, ...]]]:
    """(table, name of the row, `compiled_once` model, entropy mode, margin exponents)."""
    for model in models:
        prepared = compiled_once(model)
        yield "margins", f"{model.name}, float", prepared, FLOAT, ()
        for e in exponents:
            yield "margins", f"{model.name}, 2^-{e}", prepared, CALIBRATED, (e,)
        if model.exact:
            yield "margins", f"{model.name}, exact", prepared, EXACT, ()
    base = models[0]
    for scale in skip_scales:
        families = {
            family: table._replace(
                skip_below=released.skip_below(family, base.spec.scale_boundaries, scale)
            )
            for family, table in base.spec.families.items()
        }
        skipping = base._replace(spec=base.spec._replace(families=families))
        yield "skip", f"scales below {scale:g}", compiled_once(skipping), FLOAT, ()
    for ladder in LADDERS:
        levels, low, high, middle = ladder
        name = f"{levels} levels, {low:g}..{high:g}, {'middle' if middle else 'lower end'}"
        yield "ladder", name, compiled_once(with_ladder(base, *ladder)), FLOAT, ()


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
      frames, size: of a clip at most, which is cut to them.
      exponents: of the margins 2^-e.
      skip_scales: scales below which nothing is coded, the first for comparison.
    """
    work = Clips(clips, qps, frames, size)
    variants = list(_variants([released.load(m) for m in models], exponents, skip_scales))
    tables: dict[str, dict[str, dict[str, list[Point]]]] = {}
    with progress() as bar:
        task = bar.add_task("", total=len(variants) * len(clips) * len(qps))
        for table, name, prepared, entropy_mode, margins in variants:
            bar.update(task, description=name)
            points = work.measure(prepared, entropy_mode, margins, lambda: bar.advance(task))
            tables.setdefault(table, {})[name] = points
    results = {name: summarise(rows) for name, rows in tables.items()}
    for name, rows in results.items():
        _print(name, rows)
    asked = {"models": models, "clips": clips, "qps": qps, "frames": frames, "size": size}
    return results | asked


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
