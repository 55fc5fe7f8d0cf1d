"""Benchmarks that print ratios against a peer in the same run.

python bench.py coder [--symbols N] [--repeats N] [--json FILE]
python bench.py codec [--model NAME...] [--mode MODE] [--size WxH...] [--frames N] [--json FILE]
python bench.py complexity [--model CODEC:SIZE] [--json FILE]
python bench.py train [--config FILE] [--folder DIR] [--stage N] [--steps N] [--json FILE]
python bench.py platforms --clips CLIP... [--model NAME] [--qp Q...] [--json FILE]
python bench.py calibration --clips CLIP... [--model NAME...] [--qp Q...] [--json FILE]
python bench.py spans --clips CLIP... --model NAME... [--qp Q...] [--plot FILE] [--json FILE]
python bench.py reliability --clips CLIP... --model NAME [--mode MODE] [--plot FILE] [--json FILE]
python bench.py motion --clips CLIP... [--qp Q...] [--model NAME] [--json FILE]
python bench.py family [--rates RESULTS...] [--speeds FILE...] [--write README.md] [--json FILE]
"""

from nvc_jax.launch import setup

if __name__ == "__main__":
    setup()

import argparse
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from nvc_jax.errors import NvcError
from nvc_jax.schedule import MODES


def coder(args: argparse.Namespace) -> dict:
    from nvc_jax.benchmarks.coder import benchmark

    return benchmark(args.symbols, args.repeats)


def codec(args: argparse.Namespace) -> dict | list[dict]:
    from nvc_jax.benchmarks.codec import benchmark, print_one, table

    if len(args.model) * len(args.size) > 1:
        return table(args.model, args.size, args.frames, args.qp, args.mode)
    result = benchmark(args.model[0], *args.size[0], args.frames, args.qp, args.mode)
    print_one(result)
    return result


def platforms(args: argparse.Namespace) -> dict:
    from nvc_jax.benchmarks.platforms import available, benchmark

    chosen = available(args.python)
    if args.platforms:
        chosen = [p for p in chosen if p.name in args.platforms]
        if missing := set(args.platforms) - {p.name for p in chosen}:
            raise NvcError(f"no platform {', '.join(missing)} here")
    return benchmark(args.clips, args.model, args.qp, args.frames, args.size, args.margins, chosen)


def calibration(args: argparse.Namespace) -> dict:
    from nvc_jax.benchmarks.calibration import benchmark

    return benchmark(
        args.clips, args.model, args.qp, args.frames, args.size, args.margins, args.skip_scales
    )


def spans(args: argparse.Namespace) -> dict:
    from nvc_jax.benchmarks import spans

    return _plotted(spans, args, args.clips, args.model, args.qp, args.frames, args.size)


def reliability(args: argparse.Namespace) -> dict:
    from nvc_jax.benchmarks import reliability as judged

    return _plotted(
        judged, args, args.clips, args.model, args.mode, args.qp, args.frames, args.size
    )


def motion(args: argparse.Namespace) -> dict:
    from nvc_jax.benchmarks.motion import benchmark

    return benchmark(
        args.clips, args.qp, args.frames, args.size, args.speed_size, args.repeats, args.model
    )


def _plotted(benchmark: ModuleType, args: argparse.Namespace, *arguments) -> dict:
    """Results of a benchmark that can draw what it found; whether it can is known before."""
    from nvc_jax.benchmarks.plots import check_plot

    if args.plot:
        check_plot(args.plot)
    results = benchmark.benchmark(*arguments)
    if args.plot:
        benchmark.plot(results["rows"], args.plot)
    return results


def train(args: argparse.Namespace) -> dict:
    from nvc_jax.benchmarks.training import benchmark

    return benchmark(
        args.config, args.folder, args.stage, args.steps, args.devices, not args.no_plain
    )


def complexity(args: argparse.Namespace) -> list[dict]:
    from nvc_jax.benchmarks import family
    from nvc_jax.models import registry
    from nvc_jax.models.complexity import subnetworks

    if args.model:
        codec, _, size = args.model.partition(":")
        rows = [row._asdict() for row in subnetworks(registry.build(codec, size))]
        print(f"{'sub-network':24} {'parameters':>12} {'kMAC/px':>9}  of all its uses in a unit")
        for row in rows:
            print(f"{row['name']:24} {row['parameters']:12,} {row['kmac_per_pixel']:9.2f}")
        return rows
    rows = family.table([], [])
    print(f"{'model':16} {'parameters':>12} {'encode':>8} {'decode':>8}  kMAC per pixel and frame")
    for row in rows:
        name = f"{row['codec']}:{row['size']}"
        encode, decode = (row[f"{side}_kmac_per_pixel"] for side in ("encode", "decode"))
        print(f"{name:16} {row['parameters']:12,} {encode:8.2f} {decode:8.2f}")
    return rows


def family(args: argparse.Namespace) -> list[dict]:
    from nvc_jax.benchmarks import family

    rows = family.table(args.rates, args.speeds)
    print(family.markdown(rows), end="")
    if args.write:
        family.write(rows, args.write)
    return rows


def _add_clips(parser, qps: list[int], frames=33, size=(352, 288), at_least=None) -> None:
    """Options of what is coded."""
    from nvc_jax.cli import picture_size, positive

    parser.add_argument("--clips", nargs="+", required=True)
    parser.add_argument("--qp", "--qps", type=int, nargs="+", default=qps, help=at_least)
    parser.add_argument("--frames", type=positive, default=frames)
    parser.add_argument("--size", type=picture_size, default=size, help="clips are cut to it")


def main() -> int:
    from nvc_jax.cli import DEFAULT_MODEL, picture_size, positive

    parser = argparse.ArgumentParser(prog="bench.py", description="Benchmarks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser("coder", help="the host coder beside constriction")
    p.add_argument("--symbols", type=positive, default=2_000_000)
    p.add_argument("--repeats", type=positive, default=5)
    p.set_defaults(run=coder)
    p = commands.add_parser("codec", help="speed, memory and MACs of codecs, in memory")
    p.add_argument("--model", nargs="+", default=[DEFAULT_MODEL],
                   help="names or files, or CODEC:SIZE for random weights")  # fmt: skip
    p.add_argument("--size", type=picture_size, nargs="+", default=[(352, 288)])
    p.add_argument("--frames", type=positive, default=64)
    p.add_argument("--qp", type=int, default=32)
    p.add_argument("--mode", choices=MODES, help="of models that know several")
    p.set_defaults(run=codec)
    p = commands.add_parser("complexity", help="parameters and MACs of every model and size")
    p.add_argument("--model", metavar="CODEC:SIZE", help="its sub-networks, in place of all models")
    p.set_defaults(run=complexity)
    p = commands.add_parser("train", help="training steps beside a resident batch and plain layers")
    p.add_argument("--config", default="configs/ui2c_nano.py")
    p.add_argument("--folder", help="training material in the place of the config's data")
    p.add_argument("--stage", type=int, default=0)
    p.add_argument("--steps", type=positive, default=20, help="in each of five rounds")
    p.add_argument("--devices", type=positive, nargs="*", default=[], help="numbers to emulate")
    p.add_argument("--no-plain", action="store_true", help="leave plain convolutions out")
    p.set_defaults(run=train)
    qps = [8, 24, 40, 56]
    p = commands.add_parser("platforms", help="write on one platform, decode on another")
    _add_clips(p, qps=[0, 16, 32, 48, 63], frames=97, size=(176, 144))
    p.add_argument("--model", default=DEFAULT_MODEL)
    p.add_argument("--margins", type=int, nargs="*", default=[14, 10, 6],
                   help="exponents e of calibration margins 2^-e")  # fmt: skip
    p.add_argument(
        "--python", nargs="*", default=[], help="interpreters with other versions of JAX"
    )
    p.add_argument("--platforms", nargs="*", help="names of those to use, in place of all")
    p.set_defaults(run=platforms)
    p = commands.add_parser("calibration", help="rates under margins, skipping and scale tables")
    _add_clips(p, qps, at_least="four or more")
    p.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], help="compared with the first")
    p.add_argument("--margins", type=int, nargs="*", default=[13, 11, 10, 7],
                   help="exponents e of calibration margins 2^-e")  # fmt: skip
    p.add_argument("--skip-scales", type=float, nargs="+",
                   default=[0, 0.13, 0.15, 0.2, 0.25, 0.3, 0.4],
                   help="scales below which nothing is coded")  # fmt: skip
    p.set_defaults(run=calibration)
    p = commands.add_parser("spans", help="bits of B-frames against their references' distance")
    _add_clips(p, qps, at_least="four or more")
    p.add_argument("--model", nargs="+", required=True, help="compared with the first")
    p.add_argument("--plot", help="draw it into this file: .png, .svg or .pdf")
    p.set_defaults(run=spans)
    p = commands.add_parser("reliability", help="what judging references is worth at scene cuts")
    _add_clips(p, qps=[24, 40])
    p.add_argument("--model", required=True)
    p.add_argument("--mode", choices=("ld", "ra"), default="ld")
    p.add_argument("--plot", help="draw it into this file: .png, .svg or .pdf")
    p.set_defaults(run=reliability)
    p = commands.add_parser("motion", help="motion search beside full search and optical flow")
    _add_clips(p, qps=[8, 32, 56], frames=9)
    p.add_argument("--speed-size", type=picture_size, nargs="*",
                   default=[(352, 288), (1280, 720), (1920, 1080)],
                   help="sizes of which the time is taken")  # fmt: skip
    p.add_argument("--repeats", type=positive, default=10, help="of which the fastest counts")
    p.add_argument("--model", help="how much of its time to encode is search")
    p.set_defaults(run=motion)
    p = commands.add_parser("family", help="one table of all codecs, for the README")
    p.add_argument("--rates", nargs="+", default=[], help="results.json of evaluations")
    p.add_argument("--speeds", nargs="+", default=[], help="files of bench.py codec --json")
    p.add_argument("--write", metavar="FILE", help="put the table into this text")
    p.set_defaults(run=family)
    for p in commands.choices.values():
        p.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()
    if args.run is not train:
        os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")  # as in the nvc command
    try:
        results = args.run(args)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    except (NvcError, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
