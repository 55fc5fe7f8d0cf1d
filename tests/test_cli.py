"""The nvc command: what it writes, prints and returns, and what it says about bad input.

Runs inside the test's process, with codecs compiled once, except where the process matters.
"""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_pictures, noise

from nvc_jax import bitstream, cli, codec
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.metrics import psnr
from nvc_jax.models import released
from nvc_jax.video import Colour, VideoInfo, open_video, write_video

WIDTH, HEIGHT, FRAMES = 37, 23, 5
INFO = VideoInfo(WIDTH, HEIGHT, Fraction(30000, 1001), Colour(1, 13, 1, True))

pytestmark = pytest.mark.usefixtures("prepare_once")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, small_models_shipped):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "DEFAULT_MODEL", "tiny-ui2c")
    return tmp_path


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mkv"
    with write_video(path, INFO) as out:
        for picture in moving_texture(WIDTH, HEIGHT, FRAMES):
            out.write(picture)
    return path


@pytest.fixture
def stream(clip, nvc) -> Path:
    nvc("encode", clip, "stream.nvc", "--qp", 40, "--intra-period", 2)
    return Path("stream.nvc")


@pytest.fixture
def nvc(capsys):
    """nvc(arguments...) runs a command that succeeds and returns what it printed."""

    def run(*arguments) -> str:
        status = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert (status, captured.err) == (0, "")
        return captured.out

    return run


@pytest.fixture
def refused(capsys):
    """refused(arguments...) runs a command that fails and returns its one line of complaint."""

    def run(*arguments, status=2) -> str:
        try:
            returned = cli.main([str(a) for a in arguments])
        except SystemExit as leaving:  # argparse
            returned = leaving.code
        captured = capsys.readouterr()
        assert returned == status
        lines = captured.err.strip().splitlines()
        complaint = [line for line in lines if not line.startswith(("usage:", " "))]
        assert len(complaint) == 1 and complaint[0].startswith("nvc"), captured.err
        assert "Traceback" not in captured.err
        return complaint[0]

    return run


def pictures_of(path):
    return list(open_video(path)[1])


def files() -> set[str]:
    return {p.name for p in Path().iterdir()}


# What works


@pytest.mark.parametrize("model", ["tiny-ui2c", "tiny-intra"])
def test_decoded_video_is_the_encoders_reconstruction(clip, nvc, model):
    nvc("encode", clip, "a.nvc", "--model", model, "--recon", "recon.mkv", "--json", "e.json")
    nvc("decode", "a.nvc", "decoded.mkv", "--json", "d.json")
    assert_same_pictures(pictures_of("decoded.mkv"), pictures_of("recon.mkv"))
    info, _ = open_video("decoded.mkv")
    assert (info.width, info.height, info.colour) == (WIDTH, HEIGHT, INFO.colour)
    assert abs(info.fps - INFO.fps) < 0.001
    assert files() == {"a.nvc", "recon.mkv", "decoded.mkv", "e.json", "d.json"}


def test_what_is_written_as_json(clip, nvc):
    nvc("encode", clip, "a.nvc", "--qp", 40, "--json", "e.json")
    nvc("decode", "a.nvc", "d.y4m", "--json", "d.json")
    encoded, decoded = (json.loads(Path(f).read_text()) for f in ("e.json", "d.json"))
    size = Path("a.nvc").stat().st_size
    assert encoded["file_bytes"] == size
    assert encoded["bpp"] == pytest.approx(8 * size / (FRAMES * WIDTH * HEIGHT))
    assert (encoded["width"], encoded["height"], encoded["frames"]) == (WIDTH, HEIGHT, FRAMES)
    assert encoded["qp"] == 40 and encoded["model"] == "tiny-ui2c"
    assert encoded["fingerprint"] == released.load("tiny-ui2c").fingerprint.hex()
    assert [u["frames"] for u in encoded["units"]] == [[0, 1], [2, 3], [4]]
    assert [u["qp"] for u in encoded["units"]] == [[40, 48], [40, 44], [40]]
    overhead = size - sum(u["bytes"] for u in encoded["units"])
    assert 0 < overhead < cli.CLIP_BYTES
    for unit in encoded["units"]:
        assert 0 < unit["bytes"] - unit["payload_bytes"] <= cli.UNIT_BYTES
        assert unit["ideal_bits"] / 8 - 1 < unit["payload_bytes"] < unit["ideal_bits"] / 8 + 4
        assert unit["listed_elements"] == 0
    assert encoded["entropy_mode"] == "exact" and 0 < encoded["skipped_share"] < 1
    nvc("encode", clip, "b.nvc", "--qp", 40, "--calibration", "2^-5", "--json", "c.json")
    calibrated = json.loads(Path("c.json").read_text())
    assert calibrated["entropy_mode"] == "calibrated"
    assert sum(u["listed_elements"] for u in calibrated["units"]) > 0
    assert decoded["frames"] == FRAMES
    assert [u["frames"] for u in decoded["units"]] == [[0, 1], [2, 3], [4]]
    assert all(u["checksum_ok"] for u in decoded["units"])
    for result in (encoded, decoded):
        assert result["seconds"] > 0 and result["seconds_coding"] > 0
        assert result["fps"] == pytest.approx(FRAMES / result["seconds"])


@pytest.mark.parametrize("frames", [1, 2, 3, 100])
def test_encoding_only_the_first_frames(clip, nvc, frames):
    nvc("encode", clip, "a.nvc", "--frames", frames, "--recon", "recon.y4m")
    nvc("decode", "a.nvc", "d.y4m")
    assert len(pictures_of("d.y4m")) == min(frames, FRAMES)
    assert_same_pictures(pictures_of("d.y4m"), pictures_of("recon.y4m"))


def test_raw_video_and_frame_rate(nvc):
    raw = b"".join(p.tobytes() for picture in noise(WIDTH, HEIGHT, 3) for p in picture)
    Path("clip.yuv").write_bytes(raw)
    nvc("encode", "clip.yuv", "a.nvc", "--size", "37x23", "--fps", "24000/1001")
    nvc("decode", "a.nvc", "d.yuv")
    assert Path("d.yuv").stat().st_size == len(raw)
    assert bitstream.read_header("a.nvc").fps == Fraction(24000, 1001)


def test_info_describes_a_file(stream, nvc):
    text = nvc("info", stream)
    for fact in ("37x23", "5 frames", "30000/1001 fps", "tiny-ui2c", "3 units", "3 random-access"):
        assert fact in text
    facts = json.loads(nvc("info", stream, "--json"))
    assert facts["frames"] == FRAMES and facts["error"] is None
    assert facts["file_bytes"] == stream.stat().st_size


def test_models_lists_what_is_shipped(nvc, model_files):
    paths = {name: model_files[name] for name in sorted(model_files)}
    lines = nvc("models").splitlines()
    for line, (name, path) in zip(lines, paths.items(), strict=True):
        model = released.load(path)
        assert (
            line.startswith(f"{model.name}: codec {model.codec}")
            and model.fingerprint.hex() in line
        )
        assert ("(default)" in line) == (name == "ui2c")


def test_a_model_file_anywhere(clip, nvc, model_files, monkeypatch, refused):
    monkeypatch.setattr(released, "SHIPPED", Path("nothing"))
    nvc("encode", clip, "a.nvc", "--model", model_files["ui2c"])
    assert "not shipped; give its file with --model" in refused("decode", "a.nvc", "d.y4m")
    nvc("decode", "a.nvc", "d.y4m", "--model", model_files["ui2c"])
    assert len(pictures_of("d.y4m")) == FRAMES


@pytest.mark.parametrize("bpp", [1.5, 2.0, 3.0])
def test_target_bpp_is_not_exceeded(clip, nvc, bpp):
    nvc("encode", clip, "a.nvc", "--target-bpp", bpp, "--json", "e.json")
    result = json.loads(Path("e.json").read_text())
    assert 0 < result["bpp"] <= bpp
    if result["qp"] < codec.MAX_QP:
        nvc("encode", clip, "b.nvc", "--qp", result["qp"] + 1, "--json", "e.json")
        overhead = 8 * (cli.CLIP_BYTES + 3 * cli.UNIT_BYTES) / (WIDTH * HEIGHT * FRAMES)
        assert json.loads(Path("e.json").read_text())["bpp"] > bpp - overhead


def combined_psnr(path, other):
    pairs = zip(pictures_of(path), pictures_of(other), strict=True)
    planes = [[psnr(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]
    return np.mean(planes, axis=0) @ [6, 1, 1] / 8


def test_target_psnr_is_reached(clip, nvc, refused):
    nvc("encode", clip, "a.nvc", "--qp", 63, "--recon", "recon.mkv")
    best = combined_psnr("recon.mkv", clip)
    nvc("encode", clip, "a.nvc", "--target-psnr", best - 0.01, "--recon", "recon.mkv")
    assert combined_psnr("recon.mkv", clip) >= best - 0.01
    assert "63" in refused("encode", clip, "b.nvc", "--target-psnr", 99)
    assert "qp 0" in refused("encode", clip, "b.nvc", "--target-bpp", 0.001)
    assert "b.nvc" not in files()


def test_existing_outputs_are_replaced(clip, nvc, stream):
    Path("d.y4m").write_text("old")
    nvc("decode", stream, "d.y4m")
    assert len(pictures_of("d.y4m")) == FRAMES


# What is refused


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["missing.mp4", "a.nvc"], "missing.mp4: no such file"),
        ([".", "a.nvc"], "not a file"),
        (["CLIP", "missing/a.nvc"], "directory missing does not exist"),
        (["CLIP", "."], "not a file"),
        (["CLIP", "a.nvc", "--qp", "64"], "qp 64 is out of range"),
        (["CLIP", "a.nvc", "--qp", "-1"], "qp -1 is out of range"),
        (["CLIP", "a.nvc", "--qp", "best"], "invalid int"),
        (["CLIP", "a.nvc", "--qp", "3", "--target-bpp", "1"], "not allowed with"),
        (["CLIP", "a.nvc", "--frames", "0"], "at least 1"),
        (["CLIP", "a.nvc", "--intra-period", "3"], "multiple of 2"),
        (["CLIP", "a.nvc", "--intra-period", "-2"], "intra period -2"),
        (["CLIP", "a.nvc", "--fps", "1/0"], "frame rate 1/0"),
        (["CLIP", "a.nvc", "--fps", "fast"], "frame rate fast"),
        (["CLIP", "a.nvc", "--size", "37"], "WIDTHxHEIGHT"),
        (["CLIP", "a.nvc", "--size", "0x0"], "must be positive"),
        (["CLIP", "a.nvc", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["CLIP", "a.nvc", "--model", "text.safetensors"], "cannot be read as a model"),
        (["CLIP", "a.nvc", "--recon", "recon.gif"], "cannot write files of this kind"),
        (["CLIP", "a.nvc", "--recon", "missing/recon.mkv"], "does not exist"),
        (["text.safetensors", "a.nvc"], "text.safetensors"),
        (["CLIP", "CLIP"], "named twice"),
        (["CLIP", "a.mkv", "--recon", "a.mkv"], "named twice"),
        (["CLIP", "a.nvc", "--recon", "CLIP"], "named twice"),
        (["CLIP", "a.nvc", "--json", "./a.nvc"], "named twice"),
        (["CLIP"], "required: output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_encoding_refuses(clip, refused, arguments, complaint):
    Path("text.safetensors").write_text("neither weights nor video\n" * 20)
    before = clip.read_bytes()
    arguments = [clip if a == "CLIP" else a for a in arguments]
    assert complaint in refused("encode", *arguments)
    assert files() == {"text.safetensors"} and clip.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["missing.nvc", "d.y4m"], "missing.nvc: cannot be read"),
        ([".", "d.y4m"], "not a file"),
        (["garbage.nvc", "d.y4m"], "not a .nvc stream"),
        (["empty.nvc", "d.y4m"], "empty.nvc"),
        (["stream.nvc", "d.gif"], "cannot write files of this kind"),
        (["stream.nvc", "d.mp4"], "even sizes"),
        (["stream.nvc", "missing/d.y4m"], "does not exist"),
        (["stream.nvc", "d.y4m", "--model", "tiny-intra"], "Give the file of the right weights"),
        (["stream.nvc", "d.y4m", "--model", "garbage.nvc"], "no model"),
        (["stream.nvc", "d.y4m", "--json", "d.y4m"], "named twice"),
        (["stream.nvc", "stream.nvc"], "named twice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_decoding_refuses(stream, refused, arguments, complaint):
    Path("garbage.nvc").write_bytes(np.random.default_rng(0).bytes(1000))
    Path("empty.nvc").touch()
    before = stream.read_bytes()
    assert complaint in refused("decode", *arguments)
    assert files() == {"garbage.nvc", "empty.nvc", "stream.nvc"} and stream.read_bytes() == before


def test_other_commands_refuse(refused):
    assert "cannot be read" in refused("info", "missing.nvc")
    assert "required" in refused()
    assert "invalid choice" in refused("transcode")
    assert "safetensors" in refused("release", "a.bin", "--config", "c.py", "--workdir", "w")
    assert "no such config" in refused(
        "release", "a.safetensors", "--config", "c.py", "--workdir", "w"
    )
    assert not files()


def test_results_that_cannot_be_written_are_reported(clip, refused):
    assert "missing/e.json" in refused("encode", clip, "a.nvc", "--json", "missing/e.json")


@pytest.mark.parametrize("keep", [0.55, 0.8, 0.99])
def test_what_is_left_of_a_cut_off_file_is_decoded(stream, nvc, refused, keep):
    nvc("decode", stream, "whole.y4m")
    data = stream.read_bytes()
    stream.write_bytes(data[: int(keep * len(data))])
    complaint = refused("decode", stream, "d.y4m")
    decoded = pictures_of("d.y4m")
    assert "cut off" in complaint and f"holds the {len(decoded)} frames before" in complaint
    assert decoded
    assert_same_pictures(decoded, pictures_of("whole.y4m")[: len(decoded)])
    assert "cut off" in refused("info", stream)
    assert files() == {"stream.nvc", "d.y4m", "whole.y4m"}


def test_nothing_is_written_when_nothing_is_left(stream, refused):
    stream.write_bytes(stream.read_bytes()[:100])
    assert "cut off" in refused("decode", stream, "d.y4m")
    assert files() == {"stream.nvc"}


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_an_interrupted_command_leaves_nothing(clip, stream, refused, monkeypatch, command):
    work, calls = getattr(codec, f"{command}_unit"), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(codec, f"{command}_unit", interrupted)
    arguments = [clip, "a.nvc", "--recon", "r.mkv"] if command == "encode" else [stream, "d.mkv"]
    assert "interrupted" in refused(command, *arguments, status=130)
    assert files() == {"stream.nvc"}


# A process of its own


def test_the_installed_command(clip, nvc, model_files):
    """Another process writes the same file and decodes it to the same pictures."""

    def run(*arguments):
        command = [sys.executable, "-m", "nvc_jax", *map(str, arguments)]
        environ = {k: v for k, v in os.environ.items() if k != "JAX_CPU_ENABLE_ASYNC_DISPATCH"}
        return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)

    model = model_files["ui2c"]
    nvc("encode", clip, "here.nvc", "--model", model, "--recon", "recon.mkv")
    done = run("encode", clip, "there.nvc", "--model", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("there.nvc").read_bytes() == Path("here.nvc").read_bytes()
    done = run("decode", "here.nvc", "decoded.mkv", "--model", model)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_pictures(pictures_of("decoded.mkv"), pictures_of("recon.mkv"))
    done = run("decode", "missing.nvc", "decoded.mkv")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
