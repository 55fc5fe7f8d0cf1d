"""`bench.py reliability`: what judging references is worth at scene cuts and other accidents."""

import json

import numpy as np
import pytest
from conftest import write_clip

import bench
from nvc_jax.benchmarks import reliability
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.video import Planes

pytestmark = pytest.mark.usefixtures("quick_compilation")
CLIP = moving_texture(37, 23, 14)


def same(a, b):
    return all(np.array_equal(*planes) for planes in zip(a, b, strict=True))


def test_accidents_are_made_up_where_a_clip_has_no_cut():
    flash, other, lost = reliability.scenes(CLIP)
    assert [scene.name for scene in (flash, other, lost)] == ["flash", "other picture", "lost"]
    for scene, changed in ((flash, {7}), (other, {7}), (lost, {3, 4, 5, 6})):
        found = {n for n in range(14) if not same(scene.pictures[n], CLIP[n])}
        assert found == changed and scene.strike == 7
    brighter = flash.pictures[7].y.astype(int) - CLIP[7].y
    assert (brighter >= 0).all() and brighter.max() == reliability.FLASH
    assert all(same(lost.pictures[n], CLIP[2]) for n in range(3, 7))


def test_a_clip_with_a_cut_is_taken_as_it_is():
    dark = [Planes(planes.y // 8, planes.u, planes.v) for planes in CLIP[9:]]
    (scene,) = reliability.scenes(CLIP[:9] + dark)
    assert (scene.name, scene.strike) == ("cut", 9)
    assert same(scene.pictures[8], CLIP[8]) and same(scene.pictures[9], dark[0])


def test_bits_at_equal_psnr():
    """Intra coding takes twice the bits for every 3 dB."""
    rows = [
        dict(strike=0, never=dict(bits=[bits], psnr=[psnr]), judged=dict(bits=[1500], psnr=[own]))
        for bits, psnr, own in ((1000, 30.0, 31.5), (2000, 33.0, 36.0), (4000, 36.0, 27.0))
    ]
    found = [reliability._at_equal_psnr(row, "judged", rows) for row in rows]
    expected = [1.5 / 2**0.5, 1.5 / 4, 1.5 / 0.5]
    np.testing.assert_allclose(found, 100 * (np.array(expected) - 1), rtol=1e-6)
    assert reliability._at_equal_psnr(rows[0], "judged", rows[:1]) is None


def test_random_access(model_files, prepare_once, tmp_path):
    """In a group that ends early, frames name references twice."""
    clip = tmp_path / "clip.y4m"
    write_clip(clip, CLIP)
    model = str(model_files["uni_lvc"])
    found = reliability.benchmark([str(clip)], model, "ra", [20], 12, (64, 64))
    for row in found["rows"]:
        for trust in ("judged", "always", "never"):
            named, levels = row[trust]["distances"], row[trust]["levels"]
            assert len(named) == 12 and list(map(len, named)) == list(map(len, levels))
            assert all(len(set(distances)) == len(distances) for distances in named)
            assert not named[0] and any(len(distances) == 2 for distances in named)


def test_command(model_files, prepare_once, tmp_path, monkeypatch, capsys):
    clip, plot, output = tmp_path / "clip.y4m", tmp_path / "a.png", tmp_path / "a.json"
    write_clip(clip, CLIP)
    model = str(model_files["uni_lvc"])
    command = ["bench.py", "reliability", "--clips", str(clip), "--model"]
    options = ["--plot", str(plot), "--json", str(output), "--frames", "12", "--qp", "20"]
    monkeypatch.setattr("sys.argv", [*command, model, *options])
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert "other picture" in printed and plot.stat().st_size > 1000
    rows = json.loads(output.read_text())["rows"]
    assert [row["scene"] for row in rows] == ["flash", "other picture", "lost"]
    for row in rows:
        for trust, levels in (("always", {1}), ("never", {0}), ("judged", {0, 1 / 3, 2 / 3, 1})):
            assert len(row[trust]["bits"]) == len(row[trust]["psnr"]) == 12
            assert set().union(*row[trust]["levels"]) <= levels
            assert row[trust]["levels"][0] == []
        never, always = (np.array(row[trust]["bits"]) for trust in ("never", "always"))
        assert never[0] == always[0] and (never[1:] != always[1:]).any()
        bits = row["judged"]["bits"][6] / never[6] - 1
        assert row["at_strike"]["judged_bits_percent"] == pytest.approx(100 * bits)
        assert row["at_strike"]["judged_percent_at_equal_psnr"] is None

    for name, frames, complaint in (
        (str(model_files["ui2c"]), "12", "does not judge its references"),
        (model, "5", "5 pictures; give at least 12"),
    ):
        monkeypatch.setattr("sys.argv", [*command, name, "--frames", frames])
        assert bench.main() == 2
        assert complaint in capsys.readouterr().err
