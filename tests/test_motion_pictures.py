"""Pictures of motion, for pages about evaluations."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_clip

from nvc_jax import cli
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.errors import NvcError
from nvc_jax.evaluation import motion_pictures
from nvc_jax.models import released
from nvc_jax.video import open_video

WIDTH, HEIGHT = 38, 22


def raw(picture):
    return b"".join(plane.tobytes() for plane in picture)


@pytest.fixture(scope="module")
def streams(model_files, tmp_path_factory):
    """Model -> a stream of it, and the encoder's pictures."""
    folder = tmp_path_factory.mktemp("streams")
    source = folder / "in.y4m"
    write_clip(source, moving_texture(WIDTH, HEIGHT, 4))
    made = {}
    for name in ("light", "ui2c"):
        stream, recon = folder / f"{name}.nvc", folder / f"{name}.y4m"
        command = ["encode", source, stream, "--recon", recon, "--model", model_files[name]]
        assert cli.main([str(part) for part in command]) == 0
        made[name] = stream, [picture for picture in open_video(recon)[1]]
    return made


def test_prediction_and_what_was_added_make_the_result(streams, model_files):
    stream, recons = streams["light"]
    model = released.load(model_files["light"])
    shown = motion_pictures.motion_pictures(stream, model, 2, lambda planes: planes)
    colours, prediction, added, result = shown.values()
    assert raw(result) == raw(recons[2])
    assert colours.y.shape == prediction.y.shape == (HEIGHT, WIDTH)
    for a, b, difference in zip(result, prediction, added, strict=True):
        expected = np.clip(128 + motion_pictures.GAIN * (a.astype(int) - b), 0, 255)
        np.testing.assert_array_equal(difference, expected)


def test_there_is_nothing_to_see_without_motion(streams, model_files):
    show = motion_pictures.motion_pictures
    light, ui2c = (released.load(model_files[name]) for name in ("light", "ui2c"))
    assert show(streams["light"][0], light, 0, raw) == {}  # an intra frame
    assert show(streams["ui2c"][0], ui2c, 2, raw) == {}
    with pytest.raises(NvcError, match="weights"):
        show(streams["ui2c"][0], light, 2, raw)


def test_colours_tell_still_blocks_from_moving_and_intra_ones():
    field = np.zeros((2, 2, 3), np.int16)
    field[..., 2] = 1
    field[0, 1] = 0, 40, 1  # from the right
    field[1, 0] = 0
    colours = motion_pictures._colours(field, 15, 16)
    assert colours.y.shape == (15, 16) and colours.u.shape == (8, 8)
    still, moving, intra = ([p[place] for p in colours] for place in [(0, 0), (0, -1), (-1, 0)])
    assert still == [235, 128, 128]
    assert moving[2] > 200 > moving[0]  # red
    assert intra[1:] == [128, 128] and 100 < intra[0] < 150


def test_evaluations_show_motion(tmp_path, model_files):
    from nvc_jax.evaluation import report, runner

    source = tmp_path / "clip.y4m"
    write_clip(source, moving_texture(64, 48, 3))
    config = {
        "clips": [str(source)], "models": [str(model_files["light"])], "anchors": (),
        "presets": {}, "qps": (8, 20, 32, 44), "frames": 3, "workdir": str(tmp_path / "work"),
    }  # fmt: skip
    results = runner.evaluate(config, say=lambda line: None)
    shown = [point["motion"] for point in results["points"] if "motion" in point]
    assert [len(files) for files in shown] == [4]
    for file, _ in shown[0]:
        assert (tmp_path / "work" / file).read_bytes().startswith(b"\x89PNG")
    page = report.html_report(results, Path(tmp_path / "work"))
    assert "prediction by motion" in page
