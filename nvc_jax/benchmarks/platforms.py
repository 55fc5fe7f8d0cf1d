"""Files written on one platform and decoded on another: what fails, and what protection costs.

A *platform* is a process with other settings of XLA, another JAX, or another device. Encoders and
decoders are separate processes. Every unit is one trial: where its symbols come out wrong, the
right ones are put in its place, so that the next unit is a trial of its own with the references
that decoding would have had. (In use, the first failure ends the clip; that share is given too.)

The table is the counterpart of Table 2 of Tian et al. (arXiv 2309.11276).

  python -m nvc_jax.benchmarks.platforms encode|decode JOB.json     (what the processes run)
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nvc_jax import bitstream
from nvc_jax import codec as coding
from nvc_jax import schedule as schedules
from nvc_jax.benchmarks.clips import compiled_once, encode_clip, progress, read_clip
from nvc_jax.entropy.calibration import CALIBRATED, EXACT, FLOAT
from nvc_jax.errors import NvcError, StreamError
from nvc_jax.metrics import psnr_611
from nvc_jax.models import released
from nvc_jax.unit_program import UnitCodec, decode_unit, read_references, replay_unit, symbols_crc
from nvc_jax.video import Planes, VideoInfo


@dataclasses.dataclass(frozen=True)
class Platform:
    """A way to run the codec.

    Attributes:
      name: for the table.
      env: environment variables on top of this process's.
      cores: at most so many.
      python: the interpreter, whose environment has the JAX to use.
    """

    name: str
    env: tuple[tuple[str, str], ...] = ()
    cores: int | None = None
    python: str = sys.executable


CPU = ("JAX_PLATFORMS", "cpu")
PLATFORMS = (
    Platform("default", (CPU,)),
    Platform("SSE4.2", (CPU, ("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2"))),
    Platform("unoptimised", (CPU, ("XLA_FLAGS", "--xla_backend_optimization_level=0"))),
    Platform("one core", (CPU,), cores=1),
)
GPU = Platform("GPU", (("JAX_PLATFORMS", "cuda"),))


def available(pythons: list[str]) -> list[Platform]:
    """The platforms of this machine: `PLATFORMS`, other interpreters, a GPU if there is one.

    Raises:
      NvcError: an interpreter has no JAX.
    """
    result = list(PLATFORMS)
    for python in pythons:
        probe = [python, "-c", "import jax; print(jax.__version__)"]
        try:
            found = subprocess.run(probe, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise NvcError(f"{python}: cannot be run as an interpreter ({e})") from None
        if found.returncode:
            raise NvcError(f"{python}: has no JAX that can be imported")
        name = f"JAX {found.stdout.strip()}"
        if name in {p.name for p in result}:
            name += f" ({python})"
        result.append(Platform(name, (CPU,), python=python))
    probe = [sys.executable, "-c", "import jax; jax.devices('cuda')"]
    if not subprocess.run(probe, capture_output=True).returncode:
        result.append(GPU)
    return result


def variants(exact: bool, exponents: list[int]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name -> (entropy mode, margin exponents) of every way to protect a file."""
    result = {"none": (FLOAT, ())}
    result |= {f"margin 2^-{e}": (CALIBRATED, (e,)) for e in exponents}
    return result | ({"exact": (EXACT, ())} if exact else {})


def _work(job: dict) -> Iterator[tuple[dict, UnitCodec, VideoInfo, list[Planes], Path]]:
    """(what it is called in results, codec, the clip, file) for everything in a job."""
    prepared = compiled_once(released.load(job["model"]))
    for number, clip in enumerate(job["clips"]):
        info, pictures = read_clip(clip, job["size"], job["frames"])
        for variant, (entropy_mode, exponents) in job["variants"].items():
            codec = prepared(info, entropy_mode, tuple(exponents))
            for qp in job["qps"]:
                path = Path(job["folder"]) / f"{number}-{variant.replace(' ', '')}-{qp}.nvc"
                yield {"clip": clip, "variant": variant, "qp": qp}, codec, info, pictures, path
                print("done", flush=True)


def run_encode(job: dict) -> None:
    """Encodes everything into job["folder"]; keeps symbols and reconstructions' PSNR beside."""
    for what, codec, info, pictures, path in _work(job):
        units, scores = encode_clip(codec, info, pictures, what["qp"], path)
        symbols = {str(n): np.concatenate(unit.coded.symbols) for n, unit in enumerate(units)}
        np.savez_compressed(path.with_suffix(".npz"), psnr=scores, **symbols)


def run_decode(job: dict) -> None:
    """Decodes what an encoder wrote; writes a list of results to job["results"]."""
    results = []
    for what, codec, _, pictures, path in _work(job):
        with np.load(path.with_suffix(".npz")) as arrays:
            symbols = dict(arrays)
        expected = symbols.pop("psnr")
        failed, scores, slots = [], [], {}
        with bitstream.open_stream(path) as stream:
            plan = schedules.plan(stream.header.schedule, stream.frame_count)
            for (number, packet), unit in zip(stream.packets(), plan, strict=True):
                refs = coding.references(unit, slots)
                try:
                    decoded = decode_unit(codec, packet.payload, refs, packet.qps, unit)
                    wrong = symbols_crc(decoded.symbols, decoded.motion) != packet.symbols_crc
                except StreamError:
                    wrong = True
                failed.append(wrong)
                if wrong:
                    unit, _ = read_references(codec, packet.payload, refs, unit)
                    decoded = replay_unit(codec, symbols[str(number)], refs, packet.qps, unit)
                slots[number] = decoded.refs
                for slot in unit.release:
                    del slots[slot]
                originals = [pictures[frame] for frame in unit.frames]
                scores += map(psnr_611, originals, decoded.pictures)
        difference = np.abs(np.array(scores) - expected)
        results.append(
            what
            | {
                "units": len(failed),
                "failed_units": sum(failed),
                "units_after_failure": len(failed)
                - (failed.index(True) if any(failed) else len(failed)),
                "largest_psnr_difference_db": float(difference.max()),
                "file_bytes": path.stat().st_size,
            }
        )
    Path(job["results"]).write_text(json.dumps(results))


def _run(platform: Platform, task: str, job: dict, folder: Path, on_done) -> None:
    """Runs one process of a platform to its end. Raises NvcError with its last words."""
    file = folder / f"{task}.json"
    file.write_text(json.dumps(job))
    command = [platform.python, "-m", "nvc_jax.benchmarks.platforms", task, str(file)]
    root = str(Path(__file__).parents[2])
    env = os.environ | dict(platform.env) | {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "0"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if platform.cores:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: platform.cores]))
        command = ["taskset", "-c", cores, *command]
    with open(folder / f"{task}.log", "w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        for _ in process.stdout:
            on_done()
        if process.wait():
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no message"])[-1]
            raise NvcError(f"{platform.name}: {task} ended with {process.returncode}: {last}")


def benchmark(
    clips: list[str],
    model: str,
    qps: list[int],
    frames: int,
    size: tuple[int, int],
    exponents: list[int],
    platforms: list[Platform],
) -> dict[str, Any]:
    """Runs the matrix, prints and returns it."""
    ways = variants(released.load(model).exact, exponents)
    if Path(model).exists():
        model = str(Path(model).resolve())
    job = {"clips": [str(Path(c).resolve()) for c in clips], "model": model, "qps": qps}
    job |= {"frames": frames, "size": size, "variants": ways}
    per_process = len(clips) * len(qps) * len(ways)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, progress() as bar:
        total = per_process * len(platforms) * (1 + len(platforms))
        task = bar.add_task("", total=total)
        for encoder in platforms:
            folder = Path(scratch) / str(platforms.index(encoder))
            folder.mkdir()
            bar.update(task, description=f"encoding: {encoder.name}")
            job["folder"] = str(folder)
            _run(encoder, "encode", job, folder, lambda: bar.advance(task))
            for decoder in platforms:
                bar.update(task, description=f"{encoder.name} -> {decoder.name}")
                job["results"] = str(folder / "results.json")
                _run(decoder, "decode", job, folder, lambda: bar.advance(task))
                for row in json.loads(Path(job["results"]).read_text()):
                    rows.append({"encoder": encoder.name, "decoder": decoder.name, **row})
    summary = summarise(rows, list(ways))
    print_table(summary, [p.name for p in platforms], list(ways))
    return {"model": model, "frames": frames, "size": list(size), "pairs": summary, "rows": rows}


def summarise(rows: list[dict], ways: list[str]) -> list[dict]:
    """One entry per pair of platforms and variant."""
    plain = {
        (r["encoder"], r["decoder"], r["clip"], r["qp"]): r["file_bytes"]
        for r in rows
        if r["variant"] == "none"
    }
    result = []
    pairs = dict.fromkeys((r["encoder"], r["decoder"]) for r in rows)
    for encoder, decoder in pairs:
        for way in ways:
            mine = [
                r
                for r in rows
                if (r["encoder"], r["decoder"], r["variant"]) == (encoder, decoder, way)
            ]
            units = sum(r["units"] for r in mine)
            base = sum(plain[encoder, decoder, r["clip"], r["qp"]] for r in mine)
            result.append(
                {
                    "encoder": encoder,
                    "decoder": decoder,
                    "protection": way,
                    "units": units,
                    "failed_units": sum(r["failed_units"] for r in mine),
                    "failed_percent": 100 * sum(r["failed_units"] for r in mine) / units,
                    "lost_percent": 100 * sum(r["units_after_failure"] for r in mine) / units,
                    "extra_bytes_percent": 100 * (sum(r["file_bytes"] for r in mine) / base - 1),
                    "largest_psnr_difference_db": max(
                        r["largest_psnr_difference_db"] for r in mine
                    ),
                }
            )
    return result


def print_table(summary: list[dict], names: list[str], ways: list[str]) -> None:
    """Failed units in percent, a matrix per way of protection."""
    width = max(map(len, names)) + 2
    for way in ways:
        mine = {(s["encoder"], s["decoder"]): s for s in summary if s["protection"] == way}
        one = next(iter(mine.values()))
        extra = np.mean([s["extra_bytes_percent"] for s in mine.values()])
        drift = max(s["largest_psnr_difference_db"] for s in mine.values())
        print(f"\nprotection: {way}; {extra:+.2f} % bytes; reconstructions differ by at most "
              f"{drift:.4f} dB; {one['units']} units a pair")  # fmt: skip
        across = [s for s in mine.values() if s["encoder"] != s["decoder"]]
        failed, total = (sum(s[key] for s in across) for key in ("failed_units", "units"))
        print(f"between different platforms {failed} of {total} units failed")
        if way == "none" and not failed and total:
            print("No unprotected unit failed, so this run says nothing about protection.")
        print("failed units in % (lost, if a clip ends at its first failure)")
        print(" " * width + "".join(f"{name:>18}" for name in names) + "   <- decoded on")
        for encoder in names:
            cells = [mine[encoder, decoder] for decoder in names]
            print(f"{encoder:{width}}" + "".join(
                f"{c['failed_percent']:9.2f} ({c['lost_percent']:5.1f})" for c in cells
            ))  # fmt: skip


if __name__ == "__main__":
    task, job_file = sys.argv[1:]
    {"encode": run_encode, "decode": run_decode}[task](json.loads(Path(job_file).read_text()))
