"""`bench.py motion`: what the search finds, beside full search and optical flow."""

import json
import sys

import numpy as np
import pytest
from conftest import write_clip

import bench
from nvc_jax.benchmarks import motion
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.errors import NvcError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def command(clip, *options) -> list[str]:
    start = ["bench.py", "motion", "--clips", str(clip), "--frames", "3", "--repeats", "1"]
    return [*start, "--speed-size", "48x32", *map(str, options)]


def test_command(model_files, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cv2", reason="opencv-python-headless is a development dependency")
    clip, output = tmp_path / "clip.y4m", tmp_path / "motion.json"
    write_clip(clip, moving_texture(50, 37, 3))
    options = ["--qps", 16, 56, "--model", model_files["light"], "--json", output]
    monkeypatch.setattr("sys.argv", command(clip, *options))
    assert bench.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "searched dB" in lines[0] and "DIS fast dB" in lines[0]
    assert all(line.startswith("clip.y4m") for line in lines[1:3])
    assert any(line.startswith("48x32") for line in lines) and "are search" in lines[-1]
    results = json.loads(output.read_text())
    for row in results["rows"]:
        assert row["searched_db"] > row["copied_db"] and row["full_db"] > row["copied_db"]
        assert row["bytes"] > 0 and 0 <= row["none_percent"] < 50
    (speed,) = results["speeds"]
    assert speed["search_over_dis_fast"] == pytest.approx(speed["search"] / speed["dis_fast"])
    for row in results["encode"]:
        assert 0 < row["search_ms"] < row["encode_ms"]


def test_without_opencv(tmp_path, monkeypatch, capsys):
    clip = tmp_path / "clip.y4m"
    write_clip(clip, moving_texture(48, 32, 3))
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr("sys.argv", command(clip, "--qp", 32))
    assert bench.main() == 0
    text = capsys.readouterr().out
    assert "OpenCV is not installed" in text and "full dB" in text and "DIS fast" not in text


def test_full_search_finds_shifts():
    scene = np.random.default_rng(0).random((112, 128), np.float32)
    for down, across in ((0, 0), (-24, 24), (7, -3)):
        picture = scene[24 + down :, 24 + across :][:64, :80]
        field = motion.full_search(picture, scene[24:][:64, 24 : 24 + 80])
        y, x = 8 * np.arange(8) + down, 8 * np.arange(10) + across
        inside = np.outer((y >= 0) & (y <= 56), (x >= 0) & (x <= 72))
        assert inside.any()
        assert (field[inside] == (4 * down, 4 * across, 1)).all()
        assert np.abs(field[..., :2]).max() <= 4 * motion.FAR + 3


def test_what_cannot_be_measured_is_explained(model_files, tmp_path):
    single, clip = tmp_path / "single.y4m", tmp_path / "clip.y4m"
    write_clip(single, moving_texture(48, 32, 1))
    write_clip(clip, moving_texture(48, 32, 2))

    def run(path, qps, model=None):
        motion.benchmark([str(path)], qps, 3, (48, 32), [], 1, model)

    with pytest.raises(NvcError, match="a single picture"):
        run(single, [32])
    with pytest.raises(NvcError, match="qp 99 is out of range"):
        run(clip, [32, 99])
    with pytest.raises(NvcError, match="'tiny-intra' does not search motion"):
        run(clip, [32], str(model_files["intra"]))
