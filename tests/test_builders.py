"""Data sets built from folders: what is cut, what is left out, and that building resumes."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.data import build, builders
from nvc_jax.data.builders import ClipConfig, Source, records, tiles
from nvc_jax.data.pipeline import Stored
from nvc_jax.errors import NvcError
from nvc_jax.video import Planes, open_video

SMALL = ["--min-size", "16", "--min-frames", "2"]


def picture(height, width, seed, shift=0):
    """Blocks of random grey levels, moved by `shift` pixels to the left."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(30, 220, (-(-height // 8), -(-(width + 64) // 8)), np.uint8)
    y = blocks.repeat(8, 0).repeat(8, 1)[:height, shift : shift + width]
    chroma = rng.integers(0, 256, (2, (height + 1) // 2, (width + 1) // 2), np.uint8)
    return Planes(np.ascontiguousarray(y), *chroma)


def shot(count, height=32, width=48, seed=0):
    return [picture(height, width, seed, shift) for shift in range(count)]


def save(path: Path, pictures) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, pictures)
    return path


def cut(path: Path, **settings) -> list[tuple[int, int]]:
    """(number of the first picture, pictures) of every clip of a file."""
    settings = {"min_size": 16, "frames": 5, "stride": 5, "min_frames": 2} | settings
    config = ClipConfig(name="x", version="1.0.0", **settings)
    return [(r["first"], len(r["y"])) for r in records(Source(path.name, (path,)), config)]


def run(*args) -> int:
    return build.main([str(a) for a in args])


# --- cutting ---------------------------------------------------------------------------------


def test_clips_end_at_shot_boundaries(tmp_path):
    path = save(tmp_path / "a.y4m", shot(12) + shot(6, seed=1) + shot(3, seed=2))
    assert cut(path) == [(0, 5), (5, 5), (10, 2), (12, 5), (18, 3)]
    assert cut(path, min_frames=3) == [(0, 5), (5, 5), (12, 5), (18, 3)]
    assert cut(path, stride=3) == [(0, 5), (3, 5), (6, 5), (9, 3), (12, 5), (15, 3), (18, 3)]
    assert cut(path, stride=8) == [(0, 5), (8, 4), (12, 5), (18, 3)]
    assert cut(path, frames=1, stride=6) == [(0, 1), (6, 1), (12, 1), (18, 1)]


@settings(max_examples=60)
@given(
    length=st.integers(1, 40),
    frames=st.integers(1, 12),
    stride=st.integers(1, 12),
    least=st.integers(1, 12),
)
def test_clips_of_one_shot_start_a_stride_apart(length, frames, stride, least):
    film = [picture(16, 16, 0)] * length
    config = ClipConfig(
        name="x", version="1.0.0", min_size=0, frames=frames, stride=stride, min_frames=least
    )
    found = list(builders.cut_up(film, "film", config))
    covered = set()
    for record in found:
        assert record["first"] % stride == 0
        assert min(least, frames) <= len(record["y"]) <= frames
        last = record["first"] + len(record["y"])
        assert last <= length
        assert last == record["first"] + frames or last == length
        covered.update(range(record["first"], last))
    wanted = {n for n in range(length) if n % stride < frames}
    assert wanted - covered <= set(range(length - min(least, frames) + 1, length))


@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.sampled_from([0, *range(2, 50)])
)
def test_tiles_do_not_overlap_and_have_one_size(height, width, size):
    y = np.arange(4 * height * width).reshape(1, 2 * height, 2 * width)
    u = np.arange(height * width).reshape(1, height, width)
    found = list(tiles(Planes(y, u, -u), size))
    assert len({t.y.shape for t in found}) == 1
    _, high, wide = found[0].y.shape
    assert found[0].u.shape == found[0].v.shape == (1, high // 2, wide // 2)
    if size:
        assert (size - 1 <= high < 2 * size or high == 2 * height) and high % 2 == 0
    seen = np.concatenate([t.y.ravel() for t in found])
    assert len(np.unique(seen)) == len(seen)
    for t in found:
        top, left = divmod(int(t.y[0, 0, 0]), 2 * width)
        assert t.u[0, 0, 0] == -t.v[0, 0, 0] == top // 2 * width + left // 2


# --- building --------------------------------------------------------------------------------


def test_a_folder_of_videos_and_frames(tmp_path, capsys):
    films = tmp_path / "films"
    wide = shot(7, 33, 49)
    save(films / "b/wide.mkv", wide)
    save(films / "tiny.y4m", shot(3, 14, 48))
    (films / "broken.mp4").write_bytes(b"no video at all" * 100)
    for n, planes in enumerate(shot(11, seed=5)):
        save(films / f"frames/f{n}.png.mkv", [planes])
        (films / f"frames/f{n}.png.mkv").rename(films / f"frames/f{n}.png")
    save(films / "frames2/only.mkv", [picture(32, 48, 0)])
    (films / "frames2/only.mkv").rename(films / "frames2/only.png")
    save(films / ".hidden/a.mkv", shot(5))
    assert run("video_folder", films, "--name", "n", "--data-dir", tmp_path / "data", *SMALL) == 0
    out, err = capsys.readouterr()
    where = tmp_path / "data/video_folder/n/1.0.0"
    assert out == f"{where}: 2 clips in train; 2 sources left out\n"
    assert "left out" in err and "broken.mp4" in err and "48x14 is less than 16" in err
    clips = sorted(Stored(str(where), "train"), key=lambda clip: len(clip.y))
    assert [c.y.shape for c in clips] == [(7, 32, 48), (11, 32, 48)]
    np.testing.assert_array_equal(clips[0].y, [p.y[:32, :48] for p in wide])
    np.testing.assert_array_equal(clips[0].u, [p.u[:16, :24] for p in wide])
    np.testing.assert_array_equal(clips[1].v, [p.v for p in shot(11, seed=5)])  # 9 before 10
    assert list((tmp_path / "data/video_folder/n").iterdir()) == [where]


def test_a_folder_of_images(tmp_path, capsys):
    for n in range(9):
        save(tmp_path / f"in/{n}.mkv", [picture(16 + 2 * n, 20, n)])
        (tmp_path / f"in/{n}.mkv").rename(tmp_path / f"in/{n}.jpg")
    assert run("image_folder", tmp_path / "in", "--data-dir", tmp_path, *SMALL) == 0
    clips = Stored(str(tmp_path / "image_folder/default/1.0.0"), "train")
    assert [c.y.shape for c in clips] == [(1, 16 + 2 * n, 20) for n in range(9)]


def vimeo(folder: Path, clips: dict[str, list[str]]):
    for split, names in clips.items():
        folder.mkdir(exist_ok=True)
        (folder / f"sep_{split}list.txt").write_text("\n".join(names) + "\n\n")
        for name in names:
            for n, planes in enumerate(shot(7, 16, 24, seed=int(name[-4:]))):
                path = save(folder / "sequences" / name / f"im{n + 1}.mkv", [planes])
                path.rename(path.with_suffix(".png"))


def test_vimeo_septuplets(tmp_path, capsys):
    source = tmp_path / "vimeo_septuplet"
    vimeo(source, {"train": ["00001/0001", "00001/0003", "00002/0002"], "test": ["00001/0002"]})
    (source / "sequences/00001/0003/im4.png").unlink()
    assert run("vimeo90k_septuplet", source, "--data-dir", tmp_path, "--min-size", 16) == 0
    out, err = capsys.readouterr()
    assert "2 clips in train, 1 clips in test; 1 sources left out" in out
    assert "im4.png: no such file" in err
    test = Stored(str(tmp_path / "vimeo90k_septuplet/default/1.0.0"), "test")
    np.testing.assert_array_equal(test[0].y, [p.y for p in shot(7, 16, 24, seed=2)])


def test_what_cannot_be_built_is_explained(tmp_path, capsys):
    def complaint(*args):
        assert run(*args, "--data-dir", tmp_path / "data") == 2
        out, err = capsys.readouterr()
        assert out == "" and err.strip().count("\n") == 0 and "Traceback" not in err
        return err

    assert "no such folder" in complaint("video_folder", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "nothing to read" in complaint("image_folder", tmp_path / "empty")
    assert "vimeo_septuplet" in complaint("vimeo90k_septuplet", tmp_path / "empty")
    save(tmp_path / "tiny/a.mkv", shot(3, 16, 16))
    assert "none of 1 sources" in complaint("video_folder", tmp_path / "tiny")
    save(tmp_path / "in/a.mkv", shot(3))
    assert run("video_folder", tmp_path / "in", "--data-dir", tmp_path / "data", *SMALL) == 0
    capsys.readouterr()
    assert "exists already" in complaint("video_folder", tmp_path / "in", *SMALL)
    with pytest.raises(NvcError, match="no data set with a split 'test'"):
        Stored(str(tmp_path / "data/video_folder/default/1.0.0"), "test")
    with pytest.raises(NvcError, match="no data set"):
        Stored(str(tmp_path / "nothing"), "train")


# --- interruptions ---------------------------------------------------------------------------


def test_finished_shards_are_not_read_again(tmp_path, monkeypatch, capsys):
    for n in range(6):
        save(tmp_path / f"in/{n}.mkv", shot(4, seed=n))
    monkeypatch.setattr(builders, "SHARD_BYTES", 10_000)  # two sources
    opened, real = [], open_video

    def failing(path, limit):
        opened.append(path.name)
        if len(opened) == limit:
            raise KeyboardInterrupt
        return real(path)

    args = ("video_folder", tmp_path / "in", "--data-dir", tmp_path / "data", *SMALL)
    monkeypatch.setattr(builders, "open_video", lambda path: failing(path, 4))
    assert run(*args) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = [*opened]
    opened.clear()
    monkeypatch.setattr(builders, "open_video", lambda path: failing(path, 100))
    assert run(*args) == 0
    assert first == ["0.mkv", "1.mkv", "2.mkv", "3.mkv"]
    assert opened == ["2.mkv", "3.mkv", "4.mkv", "5.mkv"]
    where = tmp_path / "data/video_folder/default/1.0.0"
    assert len(list(where.glob("*array_record*"))) == 3
    clips = Stored(str(where), "train")
    for n in range(6):
        np.testing.assert_array_equal(clips[n].y, [p.y for p in shot(4, seed=n)])


def test_other_sources_or_settings_start_afresh(tmp_path, monkeypatch):
    for n in range(4):
        save(tmp_path / f"in/{n}.mkv", shot(4, seed=n))
    monkeypatch.setattr(builders, "SHARD_BYTES", 1)
    args = ("video_folder", tmp_path / "in", "--data-dir", tmp_path / "data", *SMALL)
    original = builders.open_video
    for change in (lambda: save(tmp_path / "in/0.mkv", shot(5, seed=9)), lambda: None):
        opened = []

        def stop(path, opened=opened):
            opened.append(path.name)
            if path.name == "2.mkv":
                raise KeyboardInterrupt
            return original(path)

        monkeypatch.setattr(builders, "open_video", stop)
        assert run(*args) == 130
        assert opened == ["0.mkv", "1.mkv", "2.mkv"]
        change()
    monkeypatch.setattr(builders, "open_video", original)
    assert run(*args, "--stride", "2", "--frames", "2") == 0
    clips = Stored(str(tmp_path / "data/video_folder/default/1.0.0"), "train")
    assert [len(clip.y) for clip in clips] == [2] * 8
    np.testing.assert_array_equal(clips[0].y, [p.y for p in shot(2, seed=9)])


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path):
    for n in range(40):
        save(tmp_path / f"in/{n}.mkv", shot(20, 128, 160, seed=n))
    command = [
        sys.executable, "-c",
        "import sys; from nvc_jax.data import build, builders; builders.SHARD_BYTES = 1 << 20;"
        "sys.exit(build.main(sys.argv[1:]))",
        "video_folder", str(tmp_path / "in"), "--data-dir", str(tmp_path / "data"), *SMALL,
    ]  # fmt: skip
    parts = tmp_path / "data/video_folder/default/.1.0.0.parts"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.json"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    clips = Stored(str(tmp_path / "data/video_folder/default/1.0.0"), "train")
    assert len(clips) == 40
    for n in range(40):
        np.testing.assert_array_equal(clips[n].y, [p.y for p in shot(20, 128, 160, seed=n)])
    assert not parts.exists()
    shutil.rmtree(tmp_path / "in")
