"""`bench.py codec`: real numbers for released models and for untrained sizes."""

import pytest

import bench
from nvc_jax.benchmarks import codec as benchmarks
from nvc_jax.errors import NvcError


@pytest.mark.parametrize(("model", "mode"), [("intra", None), ("uni_lvc", "ra")])
def test_one_model(model_files, prepare_once, capsys, model, mode):
    result = benchmarks.benchmark(str(model_files[model]), 37, 23, 2, 40)
    assert result["mode"] == mode
    assert result["encode_fps"] > 0 and result["decode_fps"] > 0 and result["bpp"] > 0
    assert result["peak_memory_mib"] > 10 and result["encode_kmac_per_pixel"] > 0
    benchmarks.print_one(result)
    assert "peak_memory_mib" in capsys.readouterr().out


def test_several_sizes_make_a_table(model_files, monkeypatch, capsys, tmp_path):
    output = tmp_path / "results.json"
    command = [
        "bench.py",
        "codec",
        "--model",
        str(model_files["intra"]),
        "--size",
        "37x23",
        "16x16",
    ]
    monkeypatch.setattr("sys.argv", [*command, "--frames", "1", "--json", str(output)])
    assert bench.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "peak MiB" in lines[0] and output.exists()


def test_what_cannot_be_measured_is_explained():
    with pytest.raises(NvcError, match="no size 'huge'"):
        benchmarks.model_of("ui2c:huge")
    with pytest.raises(NvcError, match=r"no-such at 8x8: .*no model 'no-such'"):
        benchmarks.table(["no-such"], [(8, 8), (16, 16)], 1, 32)
