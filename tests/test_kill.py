"""`nvc encode` killed at any moment leaves the old file, if there was one, or the whole new one.

Nothing else, but for one hidden file.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import cycle, islice

import numpy as np

from nvc_jax import bitstream, codec
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.video import VideoInfo, write_video

WIDTH, HEIGHT, FRAMES = 37, 23, 1000
OLD = b"what was here before"


def test_killed_encodes(prepared, model_files, tmp_path):
    info = VideoInfo(WIDTH, HEIGHT, Fraction(25))
    clip, whole = tmp_path / "clip.y4m", tmp_path / "whole.nvc"
    pictures = list(islice(cycle(moving_texture(WIDTH, HEIGHT, 16)), FRAMES))
    with write_video(clip, info) as out:
        for picture in pictures:
            out.write(picture)
    unit_codec = prepared("ui2c", WIDTH, HEIGHT)
    schedule = codec.schedule_for(unit_codec.model)
    header = codec.make_header(unit_codec, info, schedule)
    with bitstream.write_stream(whole, header) as out:
        for unit in codec.encode(unit_codec, pictures, 32, schedule):
            out.write(unit.packet)
    complete = whole.read_bytes()

    def trial(number: int) -> tuple[bool, bool]:
        """Kills one encode. Returns (was it writing, is the new file there)."""
        rng = np.random.default_rng(number)
        folder = tmp_path / f"{number}"
        folder.mkdir()
        output = folder / "out.nvc"
        if number % 2:
            output.write_bytes(OLD)
        command = [sys.executable, "-m", "nvc_jax", "encode", clip, output]
        process = subprocess.Popen(
            [*command, "--model", model_files["ui2c"]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Most while they start and compile, which is soon; the others when so much is written.
        seconds, size = rng.uniform(0, 3), rng.uniform(0, 1) * len(complete)
        begin = time.monotonic()
        while process.poll() is None:
            if number < 7 and time.monotonic() - begin > seconds:
                break
            sizes = [p.stat().st_size for p in folder.glob(".nvc-*")]
            done = output.exists() and output.stat().st_size == len(complete)
            if number >= 7 and (done or max(sizes, default=0) > size):
                break
            time.sleep(0.003)
        process.kill()
        process.wait()
        hidden = list(folder.glob(".nvc-*"))
        assert len(hidden) <= 1 and {*folder.iterdir()} <= {output, *hidden}
        found = output.read_bytes() if output.exists() else None
        assert found in (complete, OLD if number % 2 else None)
        return bool(hidden), found == complete

    with ThreadPoolExecutor(2) as pool:
        writing, there = zip(*pool.map(trial, range(10)), strict=True)
    assert any(writing) and not all(there)
