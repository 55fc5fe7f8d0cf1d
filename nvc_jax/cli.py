"""The `nvc` command: encode, decode, calibrate, info, models, import, release."""

import argparse
import json
import math
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing, nullcontext
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvc_jax import bitstream, video
from nvc_jax.data.prefetch import read_ahead
from nvc_jax.entropy.calibration import (
    CALIBRATED,
    ENTROPY_MODES,
    FLOAT,
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
)
from nvc_jax.errors import NvcError, StreamError
from nvc_jax.schedule import AUTO, MODES, group_size, in_layers

DEFAULT_MODEL = "light-nano"
MAX_PIXELS = 8192 * 4320
PROBE_FRAMES = 16
# What the container takes at most around the clip and around each unit's payload.
CLIP_BYTES, UNIT_BYTES = 160, 17


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for bad input or usage."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except NvcError as e:
        print(f"nvc: {e}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        # JAX's own errors are RuntimeErrors.
        if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print("nvc: there is not enough memory for pictures of this size", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 2
    except KeyboardInterrupt:
        print("nvc: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvc", description="Neural video codec.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("encode", help="encode a video (or picture) into a .nvc file")
    p.add_argument("input", help="anything FFmpeg reads, or raw 4:2:0 with --size")
    p.add_argument("output", help="the .nvc file to write")
    p.add_argument("--model", default=DEFAULT_MODEL, help="name or file (default: %(default)s)")
    quality = p.add_mutually_exclusive_group()
    quality.add_argument("--qp", type=int, help="0 (smallest) to 63 (best); default 32")
    first = f"on the first {PROBE_FRAMES} frames (with B-frames: on the first group)"
    quality.add_argument("--target-bpp", type=float, help=f"bits per pixel not to exceed {first}")
    quality.add_argument("--target-psnr", type=float, help=f"6:1:1 PSNR in dB to reach {first}")
    p.add_argument("--frames", type=positive, help="encode only the first frames")
    p.add_argument("--intra-period", type=int,
                   help="frames between random-access points; 0: only one, the default but for "
                   "models with B-frames, where it is the group's size")  # fmt: skip
    p.add_argument("--mode", choices=(*MODES, AUTO),
                   help="random access, low delay or all intra, of models that know several, or "
                   "whichever of them is best for each group of frames (default: ra)")  # fmt: skip
    p.add_argument("--gop", type=int,
                   help="frames in a group, 2 to 64, of models with B-frames (default: 32, or the "
                   "largest number below that divides the intra period)")  # fmt: skip
    p.add_argument("--closed-gop", action="store_true",
                   help="groups of B-frames that do not reach into each other")  # fmt: skip
    p.add_argument("--layer-qp", type=whole_numbers, default=(), metavar="N,N,...",
                   help="added to the qp of B-frames by layer: of frames between neighbours, of "
                   "those between frames at a distance of 4, of 8, ..., the last for all above and "
                   "intra frames (with a first minus: --layer-qp=-4,0)")  # fmt: skip
    p.add_argument("--calibration", type=margin_exponents, metavar="EPS|off",
                   help="list scales closer than EPS levels to a boundary (a power of two such as "
                   "2^-10; several, for the levels of a hierarchy, with commas between), or do not "
                   "protect them at all; default: integer scales, or 2^-11 for models "
                   "without")  # fmt: skip
    p.add_argument("--size", type=picture_size, help="WIDTHxHEIGHT of raw input")
    p.add_argument("--fps", help="frame rate, for raw input or to override")
    p.add_argument("--recon", help="also write the encoder's reconstruction to this video")
    p.add_argument("--json", help="write machine-readable results to this file")
    p.set_defaults(run=encode)

    p = commands.add_parser("decode", help="decode a .nvc file")
    p.add_argument("input", help="the .nvc file")
    p.add_argument("output", help=f"the video to write: {', '.join(video.WRITABLE)}")
    p.add_argument("--model", help="file of the weights, if they are not shipped")
    p.add_argument("--start", type=int, default=0, metavar="FRAME",
                   help="first frame to write, counted from 0; decoding begins at the "
                   "random-access point before it")  # fmt: skip
    p.add_argument("--end", type=positive, metavar="FRAME",
                   help="first frame not to write (default: all to the end)")  # fmt: skip
    p.add_argument("--conceal", action="store_true",
                   help="go on after damage; lost frames repeat the last good one")  # fmt: skip
    p.add_argument("--max-pixels", type=positive, default=MAX_PIXELS,
                   help="refuse larger pictures (default: %(default)s)")  # fmt: skip
    p.add_argument("--max-frames", type=positive, help="refuse longer videos (default: any)")
    p.add_argument("--json", help="write machine-readable results to this file")
    p.set_defaults(run=decode)

    p = commands.add_parser(
        "calibrate", help="measure how far another machine's arithmetic is from this one's"
    )
    p.add_argument("input", help="a clip to make a record of, or a record to compare with")
    p.add_argument("record", nargs="?", help="the record to write (.npz); without, compare")
    p.add_argument("--model", default=DEFAULT_MODEL, help="name or file (default: %(default)s)")
    p.add_argument("--mode", choices=MODES, help="as of `nvc encode`")
    p.add_argument("--qp", type=int, default=32, help="default: %(default)s")
    p.add_argument("--frames", type=positive, default=32, help="default: %(default)s")
    p.add_argument("--json", help="write machine-readable results to this file")
    p.set_defaults(run=calibrate)

    p = commands.add_parser("info", help="describe a .nvc file")
    p.add_argument("input")
    p.add_argument("--json", action="store_true", help="everything, as JSON")
    p.set_defaults(run=info)

    p = commands.add_parser("models", help="list the models that come with the program")
    p.set_defaults(run=models)

    p = commands.add_parser("release", help="turn a training run into a model file")
    p.add_argument("output", help="the .safetensors file to write; its name names the model")
    p.add_argument("--config", required=True, help="the run's config file")
    p.add_argument("--workdir", required=True, help="the run's directory")
    p.add_argument("--stage", type=int, metavar="N",
                   help="as config.stages[N] left it (default: as it is now)")  # fmt: skip
    p.add_argument("--levels", type=int, help="number of scale tables (default: 64)")
    p.add_argument("--scales", type=float, nargs=2, metavar=("MIN", "MAX"),
                   help="of the scale tables (default: 0.11 32)")  # fmt: skip
    p.add_argument("--skip-scale", type=float,
                   help="smaller scales are not coded (default: 0.15)")  # fmt: skip
    p.add_argument("--lower-end", action="store_true",
                   help="tables for the lower end of a level and not its middle, which costs more "
                   "and is how the paper prints it")  # fmt: skip
    p.set_defaults(run=release)

    p = commands.add_parser("import", help="turn a published PyTorch checkpoint into a model file")
    p.add_argument("kind", choices=("dcvc-rt-intra", "dcvc-rt-inter", "brhvc-intra", "brhvc"))
    p.add_argument("checkpoint", type=Path, help="the .pth or .pth.tar file")
    p.add_argument("output", type=Path,
                   help="the .safetensors file to write; its name names the model")  # fmt: skip
    p.add_argument("--intra", type=Path,
                   help="checkpoint of the intra codec, for codecs that need one (default: the "
                   "official file in the same folder)")  # fmt: skip
    p.set_defaults(run=import_checkpoint)
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def picture_size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT") from None
    return width, height


def margin_exponents(text: str) -> tuple[int, ...]:
    """Exponents e of margins 2^-e levels; none for "off"."""
    if text == "off":
        return ()
    return tuple(_margin_exponent(part) for part in text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
    """From "-4,0,3"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers like 4,2,0"
        ) from None


def _margin_exponent(text: str) -> int:
    """From "2^-10", "1/1024" or "0.0009765625"; numbers in between take the next larger power."""
    try:
        value = 2.0 ** int(text[2:]) if text.startswith("2^") else float(Fraction(text))
        exponent = math.floor(-math.log2(value))
    except (ArithmeticError, ValueError):
        exponent = -1
    if not LEAST_EXPONENT <= exponent <= LARGEST_EXPONENT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'off' nor a margin from 2^-{LARGEST_EXPONENT} to "
            f"2^-{LEAST_EXPONENT}"
        )
    return exponent


def encode(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    _check_distinct(args.input, args.output, args.recon, args.json)
    info, pictures = video.open_video(args.input, args.size, args.fps)

    # JAX takes a second to import; errors in the arguments should not wait for it.
    from nvc_jax import codec, unit_program
    from nvc_jax.entropy.coder import SKIP
    from nvc_jax.models import released

    model = released.load(args.model)
    schedule = codec.schedule_for(model, args.intra_period, args.gop, args.closed_gop, args.mode)
    entropy_mode, margins = unit_program.default_mode(model), ()
    if args.calibration is not None:
        entropy_mode, margins = (CALIBRATED if args.calibration else FLOAT), args.calibration
    unit_codec = unit_program.prepare(model, info.width, info.height, entropy_mode, margins)
    if args.frames:
        pictures = islice(pictures, args.frames)
    qp = 32 if args.qp is None else args.qp
    if args.target_bpp is not None or args.target_psnr is not None:
        # Of a hierarchy a whole group, or it would be coded otherwise than in the file; where the
        # first frame is a group of its own, the next one.
        alone = group_size(schedule, 0) == 1
        whole = schedule.gop + alone if in_layers(schedule) else PROBE_FRAMES
        probe = list(islice(pictures, whole))
        trial = partial(codec.encode, unit_codec, probe, schedule=schedule, layer_qp=args.layer_qp)
        probed_pixels = len(probe) * info.width * info.height
        qp = _search(trial, probed_pixels, args.target_bpp, args.target_psnr)
        pictures = chain(probe, pictures)

    total = min(filter(None, (info.frame_count, args.frames)), default=None)
    header = codec.make_header(unit_codec, info, schedule)
    clock, units, pixels = _Clock(begin), [], info.width * info.height
    elements = skipped = 0
    with ExitStack() as stack:
        stream = stack.enter_context(bitstream.write_stream(args.output, header))
        recon = stack.enter_context(
            video.write_video(args.recon, info) if args.recon else nullcontext()
        )
        bar = stack.enter_context(_progress())
        task = bar.add_task("encoding", total=total, note="")
        ahead = stack.enter_context(closing(read_ahead(pictures, 4)))
        coded_bytes = shown = 0
        choices: list[dict] = []  # of modes, for groups of frames
        waiting: dict[int, video.Planes] = {}  # coded before a frame that is shown earlier
        for unit in codec.encode(unit_codec, ahead, qp, schedule, bool(args.recon), args.layer_qp):
            size = stream.write(unit.packet)
            if args.recon:
                waiting |= dict(zip(unit.packet.frames, unit.recons, strict=True))
                while shown in waiting:
                    recon.write(waiting.pop(shown))
                    shown += 1
            if unit.choice:
                choices.append(_choice_facts(unit.packet.mode, unit.choice))
                bar.console.print(_why(choices[-1]), soft_wrap=True, highlight=False)
            coded_bytes += size
            clock.tick(len(unit.packet.frames))
            units.append(
                {
                    "frames": list(unit.packet.frames),
                    "qp": list(unit.packet.qps),
                    "bytes": size,
                    "payload_bytes": len(unit.packet.payload),
                    "ideal_bits": unit.ideal_bits,
                    "listed_elements": sum(int(step.sum()) for step in unit.coded.flags),
                }
            )
            latent = unit_codec.latents(unit.coded, unit.plan.refs)
            elements += sum(step.size for step in latent)
            skipped += sum(int((step == SKIP).sum()) for step in latent)
            bpp = 8 * coded_bytes / (clock.frames * pixels)
            bar.update(task, completed=clock.frames,
                       note=f"{clock.fps():.1f} fps  {bpp:.4f} bpp")  # fmt: skip
    file_bytes = Path(args.output).stat().st_size
    result = {
        "model": model.name,
        "fingerprint": model.fingerprint.hex(),
        "entropy_mode": ENTROPY_MODES[entropy_mode],
        "skipped_share": skipped / elements,
        "qp": qp,
        "schedule": schedule.name,
        "width": info.width,
        "height": info.height,
        "file_bytes": file_bytes,
        "bpp": 8 * file_bytes / (clock.frames * pixels),
        **clock.results(),
        "units": units,
        "choices": choices,
    }
    _finish(
        args.json,
        result,
        f"{args.output}: {clock.frames} frames, {file_bytes} bytes, {result['bpp']:.4f} bpp, "
        f"qp {qp}, {clock.summary()}",
    )


def _choice_facts(mode: str, choice) -> dict:
    """The mode that was chosen for a group of frames, and what came out of all, best first."""
    trials = sorted(choice.trials.items(), key=lambda item: item[1].cost)
    trials = {name: trial._asdict() for name, trial in trials}
    return {"first": choice.first, "last": choice.last, "mode": mode, "trials": trials}


def _why(choice: dict) -> str:
    costs = ", ".join(
        f"{name} {trial['cost']:.4f} ({trial['bytes']} bytes, {trial['psnr']:.2f} dB)"
        for name, trial in choice["trials"].items()
    )
    return (
        f"frames {choice['first']} to {choice['last']}: {choice['mode']}, of lowest cost: {costs}"
    )


def decode(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    _check_distinct(args.input, args.output, args.json)
    part = args.start != 0 or args.end is not None
    if part and args.conceal:
        raise NvcError("--conceal fills gaps of whole files; give it without --start and --end")
    with bitstream.open_stream(args.input) as stream:
        header = stream.header
        _check_limit(args, "pixels", header.width * header.height)  # before memory is taken
        _check_limit(args, "frames", stream.frame_count or 0)

        from nvc_jax import codec, conceal, unit_program
        from nvc_jax.models import released

        known = released.shipped()
        if args.model is None and header.model not in known:
            raise NvcError(
                f"{args.input}: needs the model '{header.model}' (weights "
                f"{header.fingerprint.hex()}), which is not shipped; give its file with --model"
            )
        model = released.load(args.model or header.model)
        codec.check_model(header, model)
        unit_codec = unit_program.prepare(
            model, header.width, header.height, header.entropy_mode, header.margin_exponents
        )
        info = video.VideoInfo(
            header.width, header.height, header.fps, video.Colour(*header.colour)
        )
        total = stream.frame_count
        if part:
            start = stream.access_point(args.start) if args.start else None
            end = min(args.end or math.inf, total or math.inf)
            if args.start >= end:
                raise NvcError(f"there is nothing between frames {args.start} and {args.end}")
            total = end - args.start
            decoded = codec.decode_part(unit_codec, stream, start, range(args.start, end))
        else:
            decoded = conceal.decode_concealing(unit_codec, stream)
        clock, units, losses, written = _Clock(begin), [], [], 0
        with video.write_video(args.output, info) as out, _progress() as bar:
            task = bar.add_task("decoding", total=total, note="")
            for unit, pictures in decoded:
                if isinstance(unit, codec.Lost):
                    losses.append(unit)
                    if not args.conceal:
                        break  # what was decoded is kept
                for picture in pictures:
                    written += 1
                    _check_limit(args, "frames", written)
                    out.write(picture)
                if isinstance(unit, bitstream.Packet):
                    clock.tick(len(pictures))
                    units.append({"frames": list(unit.frames), "checksum_ok": True})
                    bar.update(task, completed=written, note=f"{clock.fps():.1f} fps")
            if losses and not units:
                raise StreamError(
                    _complaint(losses, "Nothing was written", stream.frame_count, args)
                )
    concealed = written - clock.frames
    result = {
        "model": model.name,
        **clock.results(),
        "frames_in_stream": stream.frame_count,
        "frames_concealed": concealed,
        "units": units,
        "losses": [lost._asdict() for lost in losses],
    }
    _finish(args.json, result, f"{args.output}: {written} frames, {clock.summary()}")
    if losses:
        left = f"{args.output} holds "
        if args.conceal:
            places = "1 place" if len(losses) == 1 else f"{len(losses)} places"
            left += f"{written} frames, {concealed} of them concealed (lost in {places})"
        else:
            left += f"the {written} frames before"
        raise StreamError(_complaint(losses, left, stream.frame_count, args))


def _complaint(losses: list, left: str, frame_count: int | None, args) -> str:
    """What was lost, what is left, and whether there is more to get."""
    first, hint = losses[0], ""
    whole = not args.start and args.end is None
    if whole and not args.conceal and frame_count and first.frame + first.frames < frame_count:
        hint = f"; with --conceal, decoding is tried again at frame {first.frame + first.frames}"
    return f"{first.reason} {left}{hint}."


def _check_limit(args: argparse.Namespace, what: str, count: int) -> None:
    """Raises StreamError if a stream has more pixels or frames than the user allows."""
    limit = getattr(args, f"max_{what}")
    if limit is not None and count > limit:
        raise StreamError(
            f"{args.input}: {count} {what} are more than the limit of {limit}; if you trust the "
            f"file, allow more with --max-{what}"
        )


def info(args: argparse.Namespace) -> None:
    facts = bitstream.stream_info(args.input)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        units = facts["units"]
        points = sum(unit["random_access"] for unit in units)
        print(f"{facts['file']}: .nvc version {facts['version']}")
        print(f"  pictures   {facts['width']}x{facts['height']}, {facts['frames']} frames, "
              f"{facts['fps']} fps, {facts['seconds']:.2f} s")  # fmt: skip
        print(f"  model      {facts['model']}, weights {facts['fingerprint']}")
        margins = ", ".join(f"2^-{e}" for e in facts["margin_exponents"])
        print(f"  scales     {facts['entropy_mode']}{margins and f', margin {margins}'}")
        modes = Counter(unit["mode"] for unit in units if unit["mode"] and unit["unit"])
        groups = "".join(f", {count} groups {mode}" for mode, count in modes.items())
        print(f"  schedule   {facts['schedule']['name']}, {len(units)} units, "
              f"{points} random-access points{groups}")  # fmt: skip
        if units:
            qps = [qp for unit in units for qp in unit["qp"]]
            print(f"  size       {facts['file_bytes']} bytes ({facts['container_bytes']} of them "
                  f"container), {facts['bpp']:.4f} bpp, "
                  f"{facts['bits_per_second'] / 1000:.1f} kbit/s")  # fmt: skip
            print(f"  qp         {min(qps)} to {max(qps)}")
    if facts["error"]:
        raise StreamError(facts["error"])


def calibrate(args: argparse.Namespace) -> None:
    """Writes a record of a clip, or compares this machine with one."""
    _check_distinct(args.input, args.record, args.json)
    begin = time.monotonic()
    if args.record:
        info, pictures = video.open_video(args.input)

    from nvc_jax import codec, platforms, unit_program
    from nvc_jax.models import released

    model = released.load(args.model)
    if args.record:
        unit_codec = unit_program.prepare(model, info.width, info.height, CALIBRATED)
        schedule = codec.schedule_for(model, mode=args.mode)
        record = platforms.make_record(unit_codec, islice(pictures, args.frames), args.qp, schedule)
        platforms.save(args.record, record)
        result = {"machine": record.machine, "units": len(record.units), "frames": record.frames}
        line = (f"{args.record}: {record.frames} frames in {len(record.units)} units on "
                f"{record.machine}, {time.monotonic() - begin:.1f} s. Copy it to another machine "
                f"and run: nvc calibrate {Path(args.record).name}")  # fmt: skip
    else:
        record = platforms.load(args.input)
        unit_codec = unit_program.prepare(model, record.width, record.height, CALIBRATED)
        levels = platforms.compare(unit_codec, record)
        result = {"recorded_on": record.machine, "compared_on": platforms.machine()}
        result["levels"] = {str(k): v._asdict() for k, v in levels.items()}
        lines = [f"recorded on {record.machine}; here {platforms.machine()}"]
        for level, d in levels.items():
            advice = "no margin is large enough: use the exact mode"
            if d.exponent is not None:
                advice = f"recommended --calibration 2^-{d.exponent}"
            lines.append(
                f"hierarchy level {level}: {d.units} units, largest difference {d.largest:.3g} "
                f"scale levels, {d.changed_units} units would have failed unprotected; {advice}"
            )
        line = "\n".join(lines)
    _finish(args.json, result, line)


def models(args: argparse.Namespace) -> None:
    from nvc_jax.models import released

    for name, path in released.shipped().items():
        model = released.load(path)
        default = "  (default)" if name == DEFAULT_MODEL else ""
        print(f"{name}: codec {model.codec}, {path.stat().st_size / 1e6:.1f} MB, "
              f"weights {model.fingerprint.hex()}{default}")  # fmt: skip


def import_checkpoint(args: argparse.Namespace) -> None:
    _check_distinct(args.checkpoint, args.intra, args.output)
    if args.output.suffix != ".safetensors":
        raise NvcError(f"{args.output}: a model's file has to end in .safetensors")

    from nvc_jax.importing import checkpoints

    checkpoints.to_released(args.kind, args.checkpoint, args.output, args.intra)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


def release(args: argparse.Namespace) -> None:
    from nvc_jax.training import checkpoints

    tables = {"levels": args.levels, "scale_range": args.scales, "skip_scale": args.skip_scale}
    tables = {name: value for name, value in tables.items() if value is not None}
    path = checkpoints.release(
        args.config, args.workdir, args.output, args.stage, middle=not args.lower_end, **tables
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _search(trial, pixels, target_bpp, target_psnr) -> int:
    """The best qp on a probe: largest within `target_bpp`, or smallest reaching `target_psnr`.

    trial: (qp=, render=) -> the probe's units; pixels: of all its frames.

    Both bits and quality grow with qp, so bisection finds it in six trials. Raises NvcError when no
    qp will do.
    """
    from nvc_jax import codec
    from nvc_jax.metrics import psnr_611

    def enough(qp: int) -> bool:
        """Is qp at the target or beyond?"""
        coded_bytes, scores = CLIP_BYTES, []
        for unit in trial(qp=qp, render=target_psnr is not None):
            coded_bytes += len(unit.packet.payload) + UNIT_BYTES
            scores += map(psnr_611, unit.pictures, unit.recons or ())
        if target_bpp is not None:
            return 8 * coded_bytes / pixels > target_bpp
        return sum(scores) / len(scores) >= target_psnr

    low, high = 0, codec.MAX_QP + 1  # the first qp that is enough lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    if target_bpp is not None:
        if low == 0:
            raise NvcError(
                f"even qp 0 needs more than {target_bpp} bpp here; allow more, or scale down"
            )
        return low - 1
    if low > codec.MAX_QP:
        raise NvcError(f"even qp {codec.MAX_QP} stays below {target_psnr} dB; ask for less")
    return low


def _check_distinct(*names: str | Path | None) -> None:
    """Raises NvcError if two of the command's files are one: outputs replace what is there."""
    seen = set()
    for name in filter(None, names):
        path = Path(name).resolve()
        if path in seen:
            raise NvcError(f"{name}: is named twice; every input and output needs its own name")
        seen.add(path)


class _Clock:
    """Frames and seconds; the first unit, which compiles, is kept apart."""

    def __init__(self, begin: float):
        self.begin, self.frames, self.first = begin, 0, None

    def tick(self, frames: int) -> None:
        self.frames += frames
        self.last = time.monotonic()
        if self.first is None:
            self.first = (self.last, self.frames)

    def fps(self) -> float:
        """Of all units after the first; of the first if it is the only one."""
        when, frames = self.first
        if self.frames == frames:
            return self.frames / (self.last - self.begin)
        return (self.frames - frames) / (self.last - when)

    def results(self) -> dict:
        seconds = time.monotonic() - self.begin
        return {
            "frames": self.frames,
            "seconds": seconds,
            "fps": self.frames / seconds,
            "seconds_coding": self.frames / self.fps(),
            "fps_coding": self.fps(),
        }

    def summary(self) -> str:
        start = self.first[0] - self.begin
        return f"{self.fps():.1f} fps after {start:.1f} s of start-up and compilation"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _finish(json_file: str | None, result: dict, line: str) -> None:
    if json_file:
        try:
            Path(json_file).write_text(json.dumps(result, indent=1))
        except OSError as e:
            raise NvcError(f"{json_file}: cannot be written ({e.strerror})") from None
    print(line)
