"""The benchmark of what calibration costs."""

import json

import jax
import numpy as np
import pytest
from conftest import noise, write_clip

import bench
from nvc_jax.benchmarks import calibration as cost
from nvc_jax.benchmarks.clips import compiled_once
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy.calibration import FLOAT
from nvc_jax.errors import NvcError
from nvc_jax.models import released

WIDTH, HEIGHT = 64, 48


def points(factor: float, flags: int = 0) -> list[cost.Point]:
    return [
        cost.Point(
            file_bytes=round(factor * size), psnr=psnr, units=2, elements=1000, skipped=250,
            flags=flags, fixed_bits=9 * flags, rice_bits=8 * flags, mean_gap_bits=7.5 * flags,
        )
        for size, psnr in [(1000, 30), (2000, 33), (4000, 36), (8000, 39)]
    ]  # fmt: skip


def test_rows_are_compared_with_the_first():
    rows = cost.summarise(
        {
            "plain": {"a": points(1), "b": points(2)},
            "listed": {"a": points(1.1, 10), "b": points(2.6, 30)},
        }
    )
    assert rows[0]["bd_rate_percent"] == pytest.approx(0)
    assert rows[1]["bd_rate_percent"] == pytest.approx((10 + 30) / 2, abs=0.1)  # mean over clips
    assert rows[1]["flags_per_unit"] == 4 * 40 / 16
    assert (rows[1]["fixed_bits_per_flag"], rows[1]["rice_bits_per_flag"]) == (9, 8)
    assert rows[1]["mean_gap_bits_per_flag"] == 7.5
    assert rows[0]["skipped_percent"] == 25
    assert rows[0]["flags_per_unit"] == rows[0]["rice_bits_per_flag"] == 0


def test_other_scale_tables_change_the_tables_and_nothing_else(model_files):
    model = released.load(model_files["ui2c"])
    other = cost.with_ladder(model, 32, 0.01, 64.0, True)
    step = np.log(64 / 0.01) / 31
    edges = np.log(other.spec.scale_boundaries)
    np.testing.assert_allclose(np.diff(edges), step, rtol=1e-4)
    assert len(edges) == 31 and not other.exact and other.fingerprint != model.fingerprint
    for name, ours in other.variables["params"].items():
        for a, b in zip(
            *map(jax.tree.leaves, (ours, model.variables["params"][name])), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    same = cost.with_ladder(model, *cost.LADDERS[0])
    np.testing.assert_array_equal(same.tables.cdf, model.tables.cdf)


@pytest.mark.parametrize(
    "tables", [(1, 0.1, 32), (257, 0.1, 32), (64, 0.0, 32), (64, 2.0, 1.0), (64, 0.1, 1e4)]
)
def test_impossible_scale_tables_are_refused(model_files, tables):
    with pytest.raises(NvcError, match="scale tables"):
        cost.with_ladder(released.load(model_files["ui2c"]), *tables, True)


@pytest.mark.slow
def test_the_benchmark(model_files, tmp_path, monkeypatch, capsys):
    path = tmp_path / "clip.y4m"
    write_clip(path, [*moving_texture(WIDTH, HEIGHT, 3), *noise(WIDTH, HEIGHT, 1)])
    monkeypatch.setattr(cost, "LADDERS", cost.LADDERS[:2])
    command = ["bench.py", "calibration", "--clips", str(path)]
    command += ["--model", str(model_files["ui2c"]), "--frames", "4"]
    command += ["--qp", "0", "20", "40", "60", "--margins", "8", "5"]
    command += ["--skip-scales", "0", "0.3", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", command)
    assert bench.main() == 0
    tables = json.loads((tmp_path / "out.json").read_text())
    plain, small, large, exact = tables["margins"]
    assert 0 == plain["flags_per_unit"] < small["flags_per_unit"] < large["flags_per_unit"] / 4
    assert exact["flags_per_unit"] == 0 and exact["name"].endswith("exact")
    assert plain["file_bytes"] < small["file_bytes"] < large["file_bytes"]
    # The fixed code pays for the largest gap; neither does with what the mean one would need.
    assert large["mean_gap_bits_per_flag"] < large["rice_bits_per_flag"]
    assert large["rice_bits_per_flag"] < large["fixed_bits_per_flag"]
    nothing, some = tables["skip"]
    assert nothing["skipped_percent"] == 0 < some["skipped_percent"] < 100
    middle, lower = tables["ladder"]
    assert middle["file_bytes"] != lower["file_bytes"]
    printed = capsys.readouterr().out
    assert "Table 6" in printed and "2^-8" in printed


def test_every_clip_is_measured_at_every_quality(model_files, tmp_path):
    paths = []
    for seed in range(2):
        paths.append(tmp_path / f"clip{seed}.y4m")
        write_clip(paths[-1], noise(WIDTH, HEIGHT, 2, seed))
    work = cost.Clips([str(p) for p in paths], [10, 50], 2, (WIDTH, HEIGHT))
    done = []
    measured = work.measure(
        compiled_once(released.load(model_files["intra"])), FLOAT, (), lambda: done.append(1)
    )
    assert list(measured) == [str(p) for p in paths] and len(done) == 4
    for low, high in measured.values():
        assert low.file_bytes < high.file_bytes and low.psnr < high.psnr and low.units == 2
    assert len({str(points) for points in measured.values()}) == 2
