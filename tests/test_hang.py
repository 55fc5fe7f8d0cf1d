"""Decoding ends with the encoder's pictures, on one core and on two, once or several at once.

A program that calls the host back can wait for itself when there are few threads (jax issues 24255
and 25861), and without precautions these tests did hang. A decoder that hangs is ended by the
watchdog, and the test fails.
"""

import os
import subprocess
import sys
import zlib
from contextlib import contextmanager

import pytest
from conftest import assert_same_pictures

from nvc_jax import bitstream, codec, video

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
WATCHDOG_SECONDS = 240
LIBRARY = """\
import sys, zlib
from concurrent.futures import ThreadPoolExecutor
from nvc_jax import bitstream, codec, unit_program
from nvc_jax.entropy.calibration import FLOAT
from nvc_jax.models import released

path, model, at_once = sys.argv[1:]
model = released.load(model)

def decode(unit_codec):
    with bitstream.open_stream(path) as stream:
        units = list(codec.decode(unit_codec, stream))
    return [zlib.crc32(plane) for _, pictures in units for p in pictures for plane in p]

with ThreadPoolExecutor(int(at_once)) as pool:
    for result in pool.map(decode, [unit_program.prepare(model, 1280, 720, FLOAT)] * int(at_once)):
        print(*result)
"""

pytestmark = pytest.mark.skipif(not CORES, reason="this system cannot pin a process to a core")


@pytest.fixture(scope="module")
def stream(large, tmp_path_factory):
    """(file, the encoder's pictures)."""
    path = tmp_path_factory.mktemp("hang") / "large.nvc"
    info = video.VideoInfo(large.codec.width, large.codec.height, video.DEFAULT_FPS)
    schedule = codec.schedule_for(large.codec.model)
    recons = []
    header = codec.make_header(large.codec, info, schedule)
    with bitstream.write_stream(path, header) as out:
        for unit in codec.encode(large.codec, large.pictures, 16, schedule, render=True):
            out.write(unit.packet)
            recons += unit.recons
    return path, recons


@contextmanager
def pinned(cores: int):
    """This thread, and processes that it starts, run on so many cores."""
    if cores > len(CORES):
        pytest.skip(f"needs {cores} cores")
    os.sched_setaffinity(0, CORES[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def run(*arguments, cores: int) -> str:
    unwanted = ("JAX_CPU_ENABLE_ASYNC_DISPATCH", "NPROC")
    environ = {name: value for name, value in os.environ.items() if name not in unwanted}
    with pinned(cores):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        output, errors = process.communicate(timeout=WATCHDOG_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return output


@pytest.mark.parametrize("cores", [1, 2])
def test_the_command(stream, large, tmp_path, cores):
    path, recons = stream
    out = tmp_path / "decoded.y4m"
    run("-m", "nvc_jax", "decode", path, out, "--model", large.model_file, cores=cores)
    assert_same_pictures(list(video.open_video(out)[1]), recons)


@pytest.mark.parametrize("cores, at_once", [(1, 1), (2, 3)])
def test_the_library(stream, large, cores, at_once):
    path, recons = stream
    output = run("-c", LIBRARY, path, large.model_file, at_once, cores=cores)
    expected = " ".join(str(zlib.crc32(plane)) for recon in recons for plane in recon)
    assert output.splitlines() == [expected] * at_once
