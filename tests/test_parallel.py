"""Several devices, several processes, killed runs: always the same training."""

import dataclasses
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIZES
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from test_training import ROOT, TRAIN, config_of, folder, logged, stage, write_config  # noqa: F401

from nvc_jax import parallel, unit_program
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy.calibration import CALIBRATED, EXACT
from nvc_jax.errors import NvcError
from nvc_jax.models import registry, released
from nvc_jax.training import stages
from nvc_jax.training import step as train_step
from nvc_jax.training.loop import TIMES

CODE = TRAIN.format(paths=[str(ROOT), str(ROOT / "tests")])


class Training(NamedTuple):
    """train.py in a process of its own."""

    process: subprocess.Popen
    log: Path  # what it says; a pipe that nobody reads would stop it

    def finish(self, status: int = 0) -> str:
        """Waits for it to end with this exit status, and returns what it said."""
        found, text = self.process.wait(timeout=300), self.log.read_text()
        assert found == status, text
        return text


@contextmanager
def started(config, workdir: Path, *flags: str, devices: int = 1) -> Iterator[Training]:
    """A training with so many emulated devices, which is killed at the end."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    file = write_config(workdir.parent / f"{workdir.name}.py", config)
    command = [sys.executable, "-c", CODE, f"--config={file}", f"--workdir={workdir}", *flags]
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    log = workdir.parent / "-".join([workdir.name, *flags[-1:], "log"])
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
    try:
        yield Training(process, log)
    finally:
        process.kill()
        process.wait()


def train(config, workdir: Path, **options) -> str:
    """Trains to the end, and returns what the process said."""
    with started(config, workdir, **options) as training:
        return training.finish()


def assert_close(workdir: Path, other: Path) -> None:
    """The first step within rounding; later ones may have rounded a latent the other way."""
    ours, others = logged(workdir), logged(other)
    assert [v["step"] for v in ours] == [v["step"] for v in others]
    for a, b in zip(ours, others, strict=True):
        for name in ("loss", "bpp_y", "bpp_z", "distortion", "grad_norm"):
            near = pytest.approx(b[name], rel=1e-4 if a["step"] == 1 else 0.02)
            assert a[name] == near, (a["step"], name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):  # noqa: F811
    """(config, workdir) of a run on one device, whose second stage walks."""
    config = config_of(
        folder, stage(3, batch=4), stage(4, batch=4, walk=2), stage(2, batch=4),
        checkpoint_every_seconds=1e9, checkpoint_every_steps=3,
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("reference") / "run"
    train(config, workdir)
    return config, workdir


@pytest.mark.slow
def test_four_devices_train_like_one(reference, tmp_path):
    config, one = reference
    assert "devices: 4 x cpu, " in train(config, tmp_path / "four", devices=4)
    assert_close(tmp_path / "four", one)


def test_pictures_can_be_cut_into_bands(reference, tmp_path):
    config, one = reference
    config = ConfigDict(config.to_dict() | {"mesh": {"space": 2}, "stages": config.stages})
    train(config, tmp_path / "bands", devices=4)
    assert_close(tmp_path / "bands", one)


@pytest.mark.slow
def test_two_processes_train_like_one(reference, tmp_path):
    config, one = reference
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    begun = ConfigDict(config.to_dict() | {"stages": config.stages[:2]})
    with (
        started(begun, tmp_path / "two", *flags, "--process=0") as first,
        started(begun, tmp_path / "two", *flags, "--process=1") as second,
    ):
        first.finish()
        second.finish()
    before = kept(tmp_path / "two")
    assert len(before) == 7
    # One process with two devices goes on where two processes stopped.
    train(config, tmp_path / "two", devices=2)
    assert kept(tmp_path / "two")[:7] == before
    assert_close(tmp_path / "two", one)


def newest_checkpoint(workdir: Path) -> int:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def kept(workdir: Path) -> list[str]:
    """Log lines up to the newest checkpoint. They say how long steps took, so none is like another.

    A run that goes on leaves them alone.
    """
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return lines[: newest_checkpoint(workdir)]


def lines_of(workdir: Path) -> int:
    """Steps that are in the log, the last of them perhaps not entirely."""
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.slow
def test_killed_runs_go_on_bit_by_bit(folder, tmp_path):  # noqa: F811
    """SIGKILL at random moments, while steps run, checkpoints are written, or programs compile."""
    config = config_of(
        folder, stage(60, units=2), stage(60, walk=3), checkpoint_every_seconds=1e9,
        checkpoint_every_steps=5,
    )  # fmt: skip
    train(config, tmp_path / "whole")
    rng, workdir = random.Random(0), tmp_path / "parts"
    for target in (0, *sorted(rng.sample(range(5, 100), 2))):
        with started(config, workdir) as training:
            deadline = time.monotonic() + 300
            while lines_of(workdir) < target or not (workdir / "metrics.jsonl").exists():
                assert training.process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
            assert training.process.poll() is None
        # What is lost is at most what was done since the save before the one in progress.
        assert newest_checkpoint(workdir) >= lines_of(workdir) - 11
    before = kept(workdir)
    train(config, workdir)
    assert kept(workdir)[: len(before)] == before, "goes on, and does not begin again"
    ours, others = logged(workdir), logged(tmp_path / "whole")
    assert [v["step"] for v in ours] == list(range(1, 121))
    for a, b in zip(ours, others, strict=True):
        assert {n: a[n] for n in set(a) - TIMES} == {n: b[n] for n in set(b) - TIMES}


def test_a_preempted_process_stops_all(folder, tmp_path):  # noqa: F811
    config = config_of(folder, stage(10**6, batch=4), checkpoint_every_seconds=1e9, log_every=5)
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    with (
        started(config, tmp_path / "run", *flags, "--process=0") as first,
        started(config, tmp_path / "run", *flags, "--process=1") as second,
    ):
        workdir, deadline = tmp_path / "run", time.monotonic() + 120
        while not lines_of(workdir):
            assert first.process.poll() is None and second.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second.process.terminate()
        for training in (first, second):
            training.finish(128 + signal.SIGTERM)
    # Saved at the step at which they stopped, with fewer steps behind the last line than one has.
    (saved,) = (int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert 0 <= saved - logged(workdir)[-1]["step"] < 5


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--processes=2"], "several processes need --coordinator"),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], "there are 2, counted"),
    ],
)
def test_processes_that_cannot_meet_are_told(folder, tmp_path, flags, complaint):  # noqa: F811
    with started(config_of(folder, stage(2)), tmp_path / "run", *flags) as training:
        assert complaint in training.finish(2).strip().splitlines()[-1]


def test_batches_that_devices_cannot_share_are_refused():
    mesh = AbstractMesh((4, 3), ("data", "space"))
    parallel.check_batch(mesh, 8, 2, 48, "here")
    for batch, parts in ((6, 1), (8, 4)):
        with pytest.raises(NvcError, match="multiple of the 4 devices"):
            parallel.check_batch(mesh, batch, parts, 48, "here")
    with pytest.raises(NvcError, match="cannot be cut into 3 bands"):
        parallel.check_batch(mesh, 8, 2, 64, "here")
    with pytest.raises(NvcError, match="which is 1"):
        parallel.make_mesh(2)


# What a pod user would find out first


PLATFORMS = ("tpu", "cuda")


@pytest.mark.parametrize("name, number", [("ui2c", -1), ("intra", 0)])
def test_training_steps_lower_for_accelerators(name, number):
    """A last stage, whose scales are integer ones, and a first."""
    config = runpy.run_path(str(ROOT / f"configs/{name}_nano.py"))["get_config"]()
    config.model = ConfigDict(dict(name=name, size=SIZES[name], dtype="bfloat16"))
    entry, model = registry.entry(name), registry.build(name, SIZES[name], "bfloat16")
    savings = dict(remat=True, accumulate=2)
    if model.references:
        savings["references"] = {"coded": 0.5, "blank": 0.5}
    only = dataclasses.replace(stages.read(stages.complete(config))[number], **savings)
    step = train_step.make_train_step(entry, model, only, 0, seed=0, warmup_steps=1)
    shapes = train_step.state_shapes(entry, model, only)
    coded = only.units * model.frames_per_unit
    pictures = (only.batch, coded, only.crop, only.crop, 3)
    clip = train_step.Clip(
        jax.ShapeDtypeStruct((pictures[0], 1, *pictures[2:]), np.uint8),
        jax.ShapeDtypeStruct(pictures, np.uint8),
        *[jax.ShapeDtypeStruct((only.batch,), np.int32)] * 2,
    )
    traced = jax.jit(step, static_argnums=2).trace(shapes, clip, only.walk > 1)
    text = traced.lower(lowering_platforms=PLATFORMS).as_text()
    assert "dot_general" in text and "xbf16>" in text


class Captured(Exception):
    """Carries the arguments of a call that was not made."""


@pytest.mark.parametrize("mode", [EXACT, CALIBRATED])
@pytest.mark.parametrize("name", ["ui2c", "intra", "single"])
def test_encoders_and_decoders_lower_for_accelerators(model_files, monkeypatch, mode, name):
    """They are one program. JAX lowers calls of the host only where the platform is at hand."""

    def no_host(function, result, *args):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)

    def capture(*args):
        raise Captured(*args)

    monkeypatch.setattr(jax, "pure_callback", no_host)
    unit_codec = unit_program.prepare(released.load(model_files[name]), 37, 23, mode)
    n, refs = unit_codec.model.module.frames_per_unit, ()
    with pytest.raises(Captured) as call:
        capturing = unit_codec._replace(program=capture)
        unit_program.encode_unit(capturing, moving_texture(37, 23, n), refs, (30, 38)[:n], True)
    traced = unit_codec.program.trace(*call.value.args)
    assert "dot_general" in traced.lower(lowering_platforms=PLATFORMS).as_text()
