"""`bench.py family`: the table of all codecs, also that of the README."""

import json
from pathlib import Path

import pytest

import bench
from nvc_jax.benchmarks import family
from nvc_jax.errors import NvcError
from nvc_jax.models import registry

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_readme_has_every_codec_as_it_is_now():
    """What is counted, that is: what is measured belongs to the machine that did."""
    rows = family.table([], [])
    _, _, text = README.read_text().partition(family.BEGIN)
    shown, counted = (
        [[cell.strip() for cell in line.split("|")[1:6]] for line in table.split("\n") if line][2:]
        for table in (text.partition(family.END)[0], family.markdown(rows))
    )
    assert shown == counted
    assert len(rows) == sum(len(codec.sizes) for codec in registry.CODECS.values())


def test_delay():
    shown = {name: family.delay(registry.build(name, next(iter(codec.sizes))))
             for name, codec in registry.CODECS.items()}  # fmt: skip
    assert shown["intra"] == "0" and shown["ui2c"] == "1" and shown["brhvc"] == "a group"
    assert shown["uni_lvc"] == "ai 0, ld 0, ra a group"


@pytest.fixture
def only_ui2c_nano(monkeypatch):
    codec = registry.CODECS["ui2c"]
    codec = codec._replace(sizes={"nano": codec.sizes["nano"]})
    monkeypatch.setattr(registry, "CODECS", {"ui2c": codec})


def test_command(only_ui2c_nano, tmp_path, monkeypatch, capsys):
    gains = [
        dict(model="ui2c-nano", anchor="x265", quality="psnr", mean_percent=131.2),
        dict(model="ui2c-nano", anchor="x265", quality="ms_ssim_db", mean_percent=7),
        dict(model="ui2c-nano", anchor="x264", quality="psnr", mean_percent=None),
        dict(model="ui2c-nano", anchor="brhvc-nano", quality="psnr", mean_percent=-4),
        dict(model="other", anchor="x265", quality="psnr", mean_percent=-8.5),
    ]
    points = [dict(codec=codec, kind="anchor") for codec in ("x264", "x265")]
    points += [dict(codec=codec, kind="nvc") for codec in ("ui2c-nano", "brhvc-nano")]
    speed = dict(model="ui2c-nano", mode=None, width=352, height=288, device="cpu")
    speed |= dict(encode_fps=45.3, decode_fps=5.21)
    (tmp_path / "r.json").write_text(json.dumps(dict(bd_rates=gains, points=points)))
    random = speed | dict(model="ui2c:nano", width=704, height=576, encode_fps=7.125)
    (tmp_path / "s.json").write_text(json.dumps([speed, random, speed | dict(model="other")]))
    (tmp_path / "t.md").write_text(f"before\n{family.BEGIN}\nold\n{family.END}\nafter\n")
    (tmp_path / "empty.md").write_text("nothing")
    command = ["bench.py", "family", "--rates", str(tmp_path / "r.json"), "--speeds"]
    wrong = [*command, str(tmp_path / "r.json")]
    command.append(str(tmp_path / "s.json"))
    monkeypatch.setattr("sys.argv", [*command, "--write", str(tmp_path / "t.md")])
    assert bench.main() == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text() == (
        f"before\n{family.BEGIN}\n\n{printed}\n{family.END}\nafter\n"
    )
    (line,) = [line for line in printed.split("\n") if "+131 %" in line]
    assert "**nano**" in line and line.endswith("| x265 +131 % | 45 / 5.2 | 7.1 / 5.2 |")
    assert not any(text in printed for text in ("x264", "-8", "-4"))

    monkeypatch.setattr("sys.argv", [*command, "--write", str(tmp_path / "empty.md")])
    assert bench.main() == 2
    assert "has no place for the table" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", wrong)
    assert bench.main() == 2
    assert "not a file of results of bench.py codec" in capsys.readouterr().err


def test_modes_are_told_apart(only_ui2c_nano):
    (row,) = family.table([], [])
    gains = [dict(mode=mode, anchor="x265", mean_percent=number)
             for mode, number in (("ld", 10), ("ra", -3))]  # fmt: skip
    assert "| ld x265 +10 %, ra x265 -3 % |" in family.markdown([row | dict(bd_rates=gains)])


def test_unreadable_results_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(NvcError, match="not a file of results of an evaluation"):
        family.table([str(tmp_path / "a.json")], [])
