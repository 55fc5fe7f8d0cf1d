"""A stand-in for the command line, for tests of the evaluation: quantises samples and deflates.

The model's name chooses how it misbehaves: "refuses" does not encode, "crashes" does not decode,
"drifts" decodes other pictures than the encoder saw, "badsum" reports a wrong checksum.
"""

import argparse
import json
import sys
import zlib
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from nvc_jax.video import Planes, VideoInfo, open_video, write_video


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--mode")
    parser.add_argument("--qp", type=int)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--recon", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {"encode": encode, "decode": decode}[arguments.verb](arguments)
    arguments.json.write_text(json.dumps(report | {"seconds_coding": 0.5}))


def encode(arguments) -> dict:
    if arguments.model == "refuses":
        sys.exit("no such model")
    info, frames = open_video(arguments.source)
    frames = list(islice(frames, arguments.frames))
    step = 2 + (63 - arguments.qp) // 2
    levels = [np.concatenate([p.ravel() for p in planes]) // step for planes in frames]
    header = [info.width, info.height, str(info.fps), step, arguments.model, len(frames)]
    payload = zlib.compress(b"".join(level.tobytes() for level in levels), 9)
    arguments.target.write_bytes(json.dumps(header).encode() + b"\n" + payload)
    write(arguments.recon, info, levels, step)
    pairs = [list(range(len(frames)))[i : i + 2] for i in range(0, len(frames), 2)]
    size = 50 if arguments.mode == "ld" else 100
    return {"units": [{"frames": pair, "bytes": size + 10 * pair[0]} for pair in pairs]}


def decode(arguments) -> dict:
    header, payload = arguments.source.read_bytes().split(b"\n", 1)
    width, height, fps, step, model, count = json.loads(header)
    if model == "crashes":
        print("frame 3: symbols do not match", file=sys.stderr)
        sys.exit(2)
    if model.endswith(".safetensors") and arguments.model != model:
        sys.exit("not a shipped model: give its file with --model")
    levels = np.frombuffer(zlib.decompress(payload), np.uint8).reshape(count, -1).copy()
    if model == "drifts":
        levels[-1, :3] += 1
    write(arguments.target, VideoInfo(width, height, Fraction(fps)), levels, step)
    return {"units": [{"checksum_ok": model != "badsum"}] * ((count + 1) // 2)}


def write(path, info, levels, step) -> None:
    luma = info.width * info.height
    half = (info.height + 1) // 2, (info.width + 1) // 2
    with write_video(path, info) as video:
        for level in levels:
            flat = np.minimum(level.astype(np.int32) * step + step // 2, 255).astype(np.uint8)
            y, u, v = np.split(flat, [luma, luma + half[0] * half[1]])
            y = y.reshape(info.height, info.width)
            video.write(Planes(y, u.reshape(half), v.reshape(half)))


if __name__ == "__main__":
    main()
