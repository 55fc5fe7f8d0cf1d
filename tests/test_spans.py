"""`bench.py spans`: bits of B-frames against the distance of their references."""

import json

import numpy as np
import pytest
from conftest import write_clip

import bench
from nvc_jax.benchmarks import plots, spans
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.errors import NvcError

pytestmark = pytest.mark.usefixtures("quick_compilation")
CURVE = [(0.1, 30.0), (0.2, 33.0), (0.4, 36.0), (0.8, 39.0)]


def scaled(factor: float) -> dict[str, list[tuple[float, float]]]:
    return {"a": [(factor * bpp, psnr) for bpp, psnr in CURVE], "b": CURVE}


def test_models_are_compared_with_the_first():
    rows = spans.summarise({"base": {2: scaled(1), 8: scaled(1)}, "other": {2: scaled(1.21)}})
    assert [(row["model"], row["span"]) for row in rows] == [("base", 2), ("base", 8), ("other", 2)]
    assert rows[0]["bpp_at_equal_psnr"] == pytest.approx(0.2 * 2**0.5)  # in the middle, 34.5 dB
    assert rows[2]["bpp_at_equal_psnr"] == pytest.approx(0.2 * 2**0.5 * 1.1)
    assert rows[0]["bd_rate_percent"] == pytest.approx(0)
    assert rows[2]["bd_rate_percent"] == pytest.approx(21 / 2, abs=0.01)


def test_command(model_files, prepare_once, tmp_path, monkeypatch, capsys):
    clip, plot, output = tmp_path / "clip.y4m", tmp_path / "spans.png", tmp_path / "spans.json"
    write_clip(clip, moving_texture(37, 23, 8))
    command = ["bench.py", "spans", "--clips", str(clip), "--qp", "20", "40"]
    options = ["--plot", str(plot), "--json", str(output)]
    model = str(model_files["brhvc"])
    monkeypatch.setattr("sys.argv", [*command, *options, "--model", model])
    assert bench.main() == 0
    assert "bpp at equal PSNR" in capsys.readouterr().out and plot.stat().st_size > 1000
    rows = json.loads(output.read_text())["rows"]
    assert [row["span"] for row in rows] == [2, 4]
    assert all(np.shape(row["points"][str(clip)]) == (2, 2) for row in rows)

    monkeypatch.setattr("sys.argv", [*command, "--model", str(model_files["intra"])])
    assert bench.main() == 2
    assert "'tiny-intra' has no B-frames" in capsys.readouterr().err
    for name, words in (("a.txt", "kinds .*png"), ("no/a.png", "no such folder")):
        with pytest.raises(NvcError, match=words):
            plots.check_plot(str(tmp_path / name))
