"""Training: it learns, stops and goes on without a trace, survives bad gradients, and releases.

Compiling takes nearly all of the time. So the loop is tested with a codec of a few matrices, runs
share their shapes and learning rates where they can, and compilers are told to make little effort.
"""

import dataclasses
import functools
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIZES, assert_same_pictures, random_parameters, write_clip
from flax import traverse_util
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict
from PIL import Image

from nvc_jax import cli, parallel, quality, unit_program
from nvc_jax.data import build, pipeline
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.errors import NvcError
from nvc_jax.models import light, registry, released
from nvc_jax.models.ui2c import Ref
from nvc_jax.nn.blocks import Pointwise, depth_to_space, space_to_depth
from nvc_jax.nn.hyperprior import FactorizedPrior
from nvc_jax.nn.integer import ScaleHead
from nvc_jax.training import checkpoints, loop, losses, references, stages
from nvc_jax.training import step as training
from nvc_jax.training.soap import SoapState
from nvc_jax.training.transform_start import transform_start

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclass(frozen=True)
class ToyConfig:
    width: int = 8
    y: int = 24
    z: int = 4
    scale_head: int = 0


class Toy(nn.Module):
    """A codec of pairs with everything that training, releasing and coding ask for."""

    cfg: ToyConfig
    dtype: Any = jnp.float32

    frames_per_unit = 2
    schedule = "two_frame"
    references = 1
    refers_to_pictures = False
    rgb = False
    qp_rows = 72

    def setup(self):
        self.adaptor, self.decoder = Pointwise(self.cfg.width), Pointwise(self.cfg.width)
        self.encoder, self.hyper = Pointwise(self.cfg.y), Pointwise(self.cfg.z)
        self.prior, self.pixels = Pointwise(self.cfg.y), Pointwise(384)
        self.z_prior = FactorizedPrior(self.qp_rows, self.cfg.z)
        if self.cfg.scale_head:
            self.scale_head = ScaleHead(self.cfg.y, self.cfg.scale_head, steps=1, references=1)

    @staticmethod
    def start(frame):
        return Ref(frame=frame)

    def complete(self, refs, unit, height, width, exact=False):
        feature = jnp.zeros((1, height // 8, width // 8, self.cfg.width))
        ref = refs[0] if refs else Ref(feature=feature)
        return (ref._replace(bare=jnp.bool_(not refs)),)

    def __call__(self, frames, refs, qp, bottleneck):
        batch, _, height, width, _ = frames.shape
        shape = (batch, height // 8, width // 8)
        ref = refs[0] if refs else Ref()
        context = self.adaptor(
            jnp.zeros((*shape, 192)) if ref.frame is None else space_to_depth(ref.frame - 0.5, 8)
        )
        if ref.feature is not None:
            context = ref.feature if ref.bare is None else ref.feature * ~ref.bare

        def analysis(m):
            pair = jnp.concatenate([frames[:, 0], frames[:, 1]], -1) - 0.5
            y = m.encoder(jnp.concatenate([space_to_depth(pair, 8), context], -1)) * 4
            return y, m.hyper(y)

        y, z = bottleneck.encoder_only(
            self,
            analysis,
            jax.ShapeDtypeStruct((*shape, self.cfg.y), jnp.float32),
            jax.ShapeDtypeStruct((*shape, self.cfg.z), jnp.float32),
        )
        z_hat = bottleneck.factorized(z, self.z_prior, qp[:, 1])
        scale = 0.2 + jax.nn.softplus(self.prior(z_hat))
        memory = None
        if bottleneck.exact:
            hidden = self.scale_head.begin(z_hat, qp, [ref.memory], shape[1:])
            level = self.scale_head.level(hidden, 0, None)
            symbols = bottleneck.leveled(y, level, scale)
            memory = self.scale_head.remember(hidden, symbols, level)
        else:
            symbols = bottleneck.gaussian(y, scale)
        y_hat = symbols / 4
        feature = self.decoder(jnp.concatenate([y_hat, context], -1))

        def render(m):
            pair = depth_to_space(m.pixels(jnp.concatenate([y_hat, feature], -1)), 8) + 0.5
            return (jnp.stack(jnp.split(pair, 2, -1), 1),)

        (recon,) = bottleneck.decoder_only(
            self, render, jax.ShapeDtypeStruct(frames.shape, jnp.float32)
        )
        return recon, (Ref(feature=feature, memory=memory),)


UI2C = registry.entry("ui2c")
TOY = UI2C._replace(sizes={"small": ToyConfig()})


@pytest.fixture(autouse=True)
def toy_codec(monkeypatch):
    monkeypatch.setitem(registry.CODECS, "toy", TOY)
    monkeypatch.setitem(registry.MODULES, ToyConfig, Toy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Training material: a clip of a drifting texture and a photograph."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "clip.mkv", moving_texture(48, 32, 12))
    ramp = np.broadcast_to(np.linspace(0, 255, 40), (24, 40)).astype(np.uint8)
    Image.fromarray(np.stack([ramp, ramp[:, ::-1], ramp], -1)).save(folder / "photo.png")
    return folder


def stage(steps, units=1, walk=1, batch=2, crop=16, lr=1e-3, end_lr=1e-4, **special):
    common = dict(steps=steps, units=units, walk=walk, batch=batch, crop=crop, lr=lr, end_lr=end_lr)
    return ConfigDict(common | special)


SIX_STEPS = stage(6)


def config_of(folder, *stages, **changes) -> ConfigDict:
    return ConfigDict(
        dict(
            seed=3,
            model=dict(name="toy", size="small", dtype="float32"),
            data=dict(folder=str(folder), image_share=0.3),
            init_from="",
            transform_start=False,
            stages=stages,
            warmup_steps=2,
            clip_norm=1.0,
            weight_decay=1e-4,
            rate_balance=0.5,
            average_decay=0.9,
            max_skipped_in_row=50,
            log_every=1,
            sample_every=10**9,
            checkpoint_every_seconds=0.0,
        )
        | changes
    )


CONFIG_FILE = """\
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict({config!r})
    config.stages = tuple(ConfigDict(stage) for stage in {stages!r})
    return config
"""


def write_config(file: Path, config: ConfigDict) -> Path:
    plain, stages = config.to_dict(), [stage.to_dict() for stage in config.stages]
    file.write_text(CONFIG_FILE.format(config=plain | {"stages": ()}, stages=stages))
    return file


def logged(workdir) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(state, other):
    ours, others = jax.tree.leaves_with_path(state), jax.tree.leaves(other)
    assert len(ours) == len(others)
    for (path, a), b in zip(ours, others, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# The loop


def test_the_loss_falls(folder, tmp_path):
    config = config_of(
        folder, stage(60, batch=8, lr=1e-2, end_lr=1e-3), log_every=10, sample_every=30
    )
    state = loop.train(config, tmp_path)
    assert int(state.step) == 60
    values = logged(tmp_path)
    assert [v["step"] for v in values] == [10, 20, 30, 40, 50, 60]
    assert values[-1]["loss"] < 0.7 * values[0]["loss"]
    for name in ("bpp_y", "bpp_z", "distortion", "psnr_y", "psnr_u", "psnr_v", "grad_norm"):
        assert all(np.isfinite(v[name]) for v in values)
    assert all(v["skipped"] == 0 for v in values)
    sheets = sorted(tmp_path.glob("samples/*.png"))
    assert [s.name for s in sheets] == ["00000030.png", "00000060.png"]
    # Four clips one below the other, originals above reconstructions; two frames side by side.
    assert Image.open(sheets[0]).size == (2 * 16, 4 * 2 * 16)
    assert list(tmp_path.glob("events*"))


class Stop(Exception):
    pass


def stop_at(monkeypatch, *steps):
    """Interrupts trainings after each of these steps once, before its checkpoint."""
    write_scalars, stops = loop.MetricWriter.write_scalars, list(steps)

    def stopping(self, step, scalars):
        if stops and step == stops[0]:
            raise Stop(stops.pop(0))
        write_scalars(self, step, scalars)

    monkeypatch.setattr(loop.MetricWriter, "write_scalars", stopping)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder, tmp_path, monkeypatch):
    """Between two stages unlike each other, and in the middle of a walk through a clip."""
    first = stage(3, optimizer="muon")
    other = dict(units=2, walk=2, batch=1, optimizer="soap")
    config = config_of(folder, first, stage(5, **other))
    uninterrupted = loop.train(config, tmp_path / "whole")

    stop_at(monkeypatch, 4, 7)
    for _ in range(2):
        with pytest.raises(Stop):
            loop.train(config, tmp_path / "parts")
    resumed = loop.train(config, tmp_path / "parts")

    assert_same_state(resumed, uninterrupted)
    steps = [v["step"] for v in logged(tmp_path / "parts")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    for ours, others in zip(logged(tmp_path / "parts"), logged(tmp_path / "whole"), strict=True):
        assert ours["loss"] == others["loss"] and ours["stage"] == others["stage"]
    shortened = config_of(folder, first, stage(2, **other))
    for complete in (config, shortened):  # nothing left to do
        assert_same_state(loop.train(complete, tmp_path / "parts"), uninterrupted)


def test_data_sets_are_trained_on_and_runs_on_them_go_on(folder, tmp_path, monkeypatch):
    """A mixture, then a set of a stage's own, cut by a worker process."""
    built = ["--data-dir", str(tmp_path / "sets"), "--min-size", "16", "--min-frames", "2"]
    for kind in ("video_folder", "image_folder"):
        assert build.main([kind, str(folder), *built]) == 0
    videos, images = (f"{kind}_folder/default/1.0.0" for kind in ("video", "image"))
    mixture = dict(sets=(dict(path=videos, weight=3.0), dict(path=images)))
    config = config_of(
        folder, stage(3), stage(3, data=dict(sets=(dict(path=videos),))),
        data=mixture, data_root=str(tmp_path / "sets"), workers=1,
    )  # fmt: skip
    uninterrupted = loop.train(config, tmp_path / "whole")
    stop_at(monkeypatch, 2, 5)
    for _ in range(2):
        with pytest.raises(Stop):
            loop.train(config, tmp_path / "parts")
    assert_same_state(loop.train(config, tmp_path / "parts"), uninterrupted)


def test_only_the_newest_checkpoints_are_kept(folder, tmp_path):
    loop.train(config_of(folder, SIX_STEPS), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["5", "6"]


# As train.py, but knowing the codec above.
TRAIN = """\
import runpy, sys
sys.path[:0] = {paths!r}
from test_training import TOY, Toy, ToyConfig
from nvc_jax.models import registry
registry.CODECS["toy"] = TOY
registry.MODULES[ToyConfig] = Toy
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_the_run_ends(folder, tmp_path, number):
    config = config_of(folder, stage(10**6), checkpoint_every_seconds=1e9)
    file, workdir = write_config(tmp_path / "config.py", config), tmp_path / "run"
    code = TRAIN.format(paths=[str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", code, f"--config={file}", f"--workdir={workdir}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        while "step 3/" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    (saved,) = (path.name for path in (workdir / "checkpoints").iterdir())
    assert int(saved) >= 3 and int(saved) == logged(workdir)[-1]["step"]
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"train.py: stopped by {number.name} after step {saved}, which is saved")
    assert "Traceback" not in errors


def test_a_signal_in_the_last_step_changes_nothing(folder, tmp_path, monkeypatch):
    write_scalars, handler = loop.MetricWriter.write_scalars, signal.getsignal(signal.SIGINT)

    def interrupting(self, step, scalars):
        write_scalars(self, step, scalars)
        if step == 6:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.MetricWriter, "write_scalars", interrupting)
    assert int(loop.train(config_of(folder, SIX_STEPS), tmp_path).step) == 6
    assert signal.getsignal(signal.SIGINT) is handler


def spoil(monkeypatch, bad):
    """Makes the batches of some steps of a stage not numbers."""
    host_clips = loop.host_clips

    def spoiled(sources, codec, model, stage, step, **options):
        for number, (clip, carried) in enumerate(
            host_clips(sources, codec, model, stage, step, **options), step
        ):
            if bad(number):
                clip = clip._replace(frames=np.full(clip.frames.shape, np.nan, np.float32))
            yield clip, carried

    monkeypatch.setattr(loop, "host_clips", spoiled)


def test_steps_without_finite_gradients_are_skipped_and_counted(folder, tmp_path, monkeypatch):
    config = config_of(folder, SIX_STEPS)
    spoil(monkeypatch, lambda step: step in (1, 3, 4))
    state = loop.train(config, tmp_path)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (6, 3, 0)
    values = logged(tmp_path)
    assert [v["skipped"] for v in values] == [0, 1, 1, 2, 3, 3]
    assert [v["skipped_in_row"] for v in values] == [0, 1, 0, 1, 2, 0]
    assert [v["loss"] is None for v in values] == [False, True, False, True, True, False]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_line_of_the_log_is_the_mean_of_its_steps(folder, tmp_path):
    loop.train(config_of(folder, SIX_STEPS), tmp_path / "single")
    loop.train(config_of(folder, SIX_STEPS, log_every=4), tmp_path / "four")
    single, four = logged(tmp_path / "single"), logged(tmp_path / "four")
    assert [v["step"] for v in four] == [4, 6] and list(four[0]) == list(single[0])
    for values, steps in zip(four, (single[:4], single[4:]), strict=True):
        for name in ("loss", "bpp_y", "bpp_z", "distortion", "psnr_y", "psnr_u", "grad_norm"):
            np.testing.assert_allclose(values[name], np.mean([s[name] for s in steps]), rtol=1e-5)
        assert values["skipped"] == steps[-1]["skipped"]


def test_training_does_without_tensorflow():
    code = "import sys, nvc_jax.training.loop; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_too_many_steps_without_finite_gradients_end_the_run(folder, tmp_path, monkeypatch):
    config = config_of(folder, SIX_STEPS, max_skipped_in_row=3)
    with monkeypatch.context() as context:
        spoil(context, lambda step: step >= 2)
        with pytest.raises(NvcError, match=r"step 5: no finite gradient for 3 steps in a row"):
            loop.train(config, tmp_path)
    state = loop.train(config, tmp_path)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (6, 2, 0)


def first_clip(config) -> training.Clip:
    """What the first step of a config trains with."""
    (only,) = stages.read(stages.complete(config))
    sources = pipeline.open_sets(only.data)
    codec = registry.entry(config.model.name)
    model = registry.build(config.model.name, config.model.size)
    return next(loop.host_clips(sources, codec, model, only, 0, seed=0))[0]


def test_a_skipped_step_changes_nothing_but_the_counters(folder):
    config = config_of(folder, SIX_STEPS)
    model = registry.build("toy", "small")
    (only,) = stages.read(stages.complete(config))
    before = training.init_state(TOY, model, only, registry.random_params(model, seed=3))
    step = training.make_train_step(TOY, model, only, 0, seed=3, warmup_steps=2)
    step = jax.jit(step, static_argnums=2)
    clip = first_clip(config)
    good, _ = step(before, clip, False)
    bad = clip._replace(frames=np.full(clip.frames.shape, np.inf, np.float32))
    after, _ = step(good, bad, False)
    for name in ("params", "opt_state", "average"):
        assert_same_state(getattr(after, name), getattr(good, name))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (2, 1, 1)
    for leaf, start in zip(
        jax.tree.leaves(good.average), jax.tree.leaves(before.params), strict=True
    ):
        assert np.isfinite(leaf).all() and leaf.shape == start.shape
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(good.params), jax.tree.leaves(before.params), strict=True)
    )


def test_stages_may_draw_otherwise_from_the_same_clips(folder):
    config = config_of(folder, stage(1, data=dict(image_share=0.9)), stage(1))
    run = stages.read(stages.complete(config))
    assert [s.data.folder for s in run] == [str(folder)] * 2
    assert [s.data.image_share for s in run] == [0.9, 0.3]
    opened = loop.open_all(run)
    records = [opened[repr(s.data)][0].records for s in run]
    assert records[0][0] is records[1][0]  # in memory once


def test_learning_rate_warms_up_and_falls_in_every_stage():
    first, second = stages.read(
        stages.complete(config_of("", stage(10, lr=1.0, end_lr=0.5), stage(10, lr=0.5, end_lr=0.0)))
    )
    cosine = 0.5 + 0.25 * (1 + np.cos(np.pi * np.arange(11) / 10))
    steps = np.arange(20)
    rates = training.learning_rate(first, 0, 4)(steps[:10])
    warm = np.minimum(1, (steps[:10] + 1) / 4)
    np.testing.assert_allclose(rates, cosine[:10] * warm, rtol=1e-3)
    rates = training.learning_rate(second, 10, 4)(steps[10:])
    np.testing.assert_allclose(rates, (cosine[:10] - 0.5) * warm, rtol=1e-3, atol=1e-6)
    linear = dataclasses.replace(first, schedule="linear")
    np.testing.assert_allclose(training.learning_rate(linear, 0, 1)(5), 0.75)
    constant = dataclasses.replace(first, schedule="constant")
    np.testing.assert_allclose(training.learning_rate(constant, 0, 1)(9), 1.0)


def test_muon_steps_along_all_directions_alike():
    """Matrices by orthogonal steps, and everything else by those of Adam, whose first has no sizes.

    An intra codec beside another one does not learn: no time for it.
    """
    (only,) = stages.read(stages.complete(config_of("", stage(1), optimizer="muon", clip_norm=1e3)))
    rng = np.random.default_rng(0)
    shapes = {
        ("dense", "kernel"): (24, 16),
        ("convolution", "kernel"): (3, 3, 4, 8),
        ("convolution", "bias"): (8,),
        ("depthwise", "kernel"): (3, 3, 1, 8),
        ("intra", "dense", "kernel"): (16, 16),
        ("gains", "table"): (4, 8),
        ("unused", "kernel"): (16, 8),
    }
    slopes = {path: jnp.float32(rng.normal(size=shape)) for path, shape in shapes.items()}
    params = traverse_util.unflatten_dict(jax.tree.map(jnp.zeros_like, slopes))
    optimizer = training.make_optimizer(only)
    slopes = traverse_util.unflatten_dict(slopes)
    steps, state = optimizer.update(slopes, optimizer.init(params), params)
    slopes["unused"]["kernel"] *= 0
    later, _ = optimizer.update(slopes, state, params)
    assert not later["unused"]["kernel"].any() and later["dense"]["kernel"].any()
    for path, step in traverse_util.flatten_dict(steps).items():
        if path[0] in ("dense", "convolution", "unused") and path[1] == "kernel":
            matrix = step.reshape(-1, step.shape[-1])
            gains = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            assert gains.min() > 0.6 and gains.max() < 1.3
        else:
            np.testing.assert_allclose(np.abs(step), np.abs(step).max(), rtol=1e-3)


def test_soap_moves_the_matrices_that_muon_does_and_only_what_is_used():
    (only,) = stages.read(stages.complete(config_of("", stage(1), optimizer="soap")))
    rng = np.random.default_rng(0)
    shapes = {
        ("dense", "kernel"): (24, 16),
        ("convolution", "kernel"): (3, 3, 4, 8),
        ("convolution", "bias"): (8,),
        ("depthwise", "kernel"): (3, 3, 1, 8),
        ("intra", "dense", "kernel"): (16, 16),
        ("unused", "kernel"): (16, 8),
        ("unused", "bias"): (8,),
    }
    params = traverse_util.unflatten_dict(
        {path: jnp.float32(rng.normal(size=shape)) for path, shape in shapes.items()}
    )
    grads = params | {"unused": jax.tree.map(jnp.zeros_like, params["unused"])}
    optimizer = training.make_optimizer(only)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    soap = next(
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SoapState))
        if isinstance(x, SoapState)
    )
    assert set(soap.groups) == {"24x16", "36x8", "16x8"}
    for _ in range(2):
        steps, state = update(grads, state, params)
    for path, step in traverse_util.flatten_dict(steps).items():
        assert step.any() == (path[0] != "unused")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"data": ConfigDict(dict(folder="/missing", image_share=0.5))}, "no such folder"),
        ({"model": ConfigDict(dict(name="av2", size="small", dtype="float32"))}, "unknown codec"),
        ({"model": ConfigDict(dict(name="toy", size="huge", dtype="float32"))}, "no size 'huge'"),
        (
            {"model": ConfigDict(dict(name="toy", size=dict(depth=3), dtype="float32"))},
            "bad size for 'toy'",
        ),
        ({"stages": (stage(2), stage(2, crop=24))}, r"stages\[1\].crop is 24"),
        ({"stages": (stage(2, batch=0),)}, r"stages\[0\].batch is 0"),
        ({"stages": (ConfigDict(dict(steps=2)),)}, r"stages\[0\].batch is missing"),
        ({"stages": (stage(2, batch=4, accumulate=3),)}, "it must divide the batch"),
        ({"stages": (stage(2, schedule="step"),)}, "give 'cosine', 'linear'"),
        ({"optimizer": "sgd"}, "give 'adamw', 'muon', 'soap'"),
        ({"stages": (stage(2, references={"black": 1.0}),)}, "'black' is none of 'blank'"),
        ({"stages": (stage(2, references={"blank": 0.0}),)}, "one must be above"),
        ({"stages": (stage(2, lr_scale=(("hyperr", 0.1),)),)}, "lr_scale names hyperr"),
        ({"stages": (stage(2, teacher={"weights": "previous"}),)}, "teacher needs"),
        ({"stages": (stage(2, teacher={"weights": 0, "refs": 1.0}),)}, "not an earlier stage"),
        ({"stages": (stage(2, teacher={"weight": "a", "recon": 1}),)}, "teacher.weight is nothing"),
        ({"stages": (stage(2, penalty=dict(variant="hinge")),)}, "penalty.beta is missing"),
        (
            {"stages": (stage(2, penalty=dict(variant="hinge", eta=0.3, delta=1, beta=1, bta=1)),)},
            "penalty.bta is nothing",
        ),
        ({"stages": (stage(2, spans=(4,)),)}, "spans means nothing to the codec 'toy'"),
        ({"stages": (stage(2, orders=dict(ld=1.0)),)}, "orders means nothing"),
        ({"stages": (stage(2, judged=True),)}, "judged means nothing"),
        ({"mesh": ConfigDict(dict(space=3))}, "which is 1"),
        ({"colour": 1}, "config.colour is nothing"),
        ({"data": ConfigDict(dict(sets=()))}, "sets is empty"),
        ({"data": ConfigDict(dict(sets=(dict(path="/missing"),)))}, "/missing: no data set"),
        ({"data": ConfigDict(dict(image_share=0.5))}, "must have either `folder` or `sets`"),
        ({"data": ConfigDict(dict(sets=(dict(split="train"),)))}, r"sets\[0\].path is missing"),
        ({"data": ConfigDict(dict(sets=(dict(path="/x", weight=0),)))}, "weight is 0"),
        ({"data": ConfigDict(dict(sets=(dict(path="/x", wieght=1),)))}, "wieght is nothing"),
        ({"workers": 1}, "workers are for data sets"),
        ({"log_every": 0}, "config.log_every is 0"),
        ({"seed": -1}, "config.seed is -1"),
        ({"model": ConfigDict(dict(name="toy", size="small", dtype="bf16"))}, "dtype is 'bf16'"),
        (
            {
                "model": ConfigDict(dict(name="intra", size="nano", dtype="float32")),
                "stages": (stage(2, walk=2),),
            },
            "cannot walk",
        ),
        ({"stages": (stage(2, batch=4.5),)}, r"batch is 4\.5; it must be a whole"),
        ({"data": ConfigDict(dict(folder="", imageshare=0.5))}, "imageshare is nothing"),
        ({"data": ConfigDict(dict(folder="", image_share=2.0))}, "image_share is 2.0"),
        ({"stages": (stage(2, references="blank"),)}, "wrong kind"),
        ({"stages": (stage(2, remat="no"),)}, "'no' is neither True nor False"),
        ({"stages": (stage(2, trainable="hyper"),)}, "must be a tuple"),
        ({"stages": (stage("two"),)}, "it must be a whole number"),
        ({"stages": ()}, "stages is empty"),
        ({"init_from": "missing.safetensors"}, "no model"),
        ({"transform_start": True}, "transform_start"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_configs_are_refused(folder, tmp_path, change, complaint):
    with pytest.raises(NvcError, match=complaint):
        loop.train(config_of(folder, stage(2), **change), tmp_path)


def test_a_workdir_that_cannot_be_one_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NvcError, match="cannot be written"):
            loop.train(config_of(folder, stage(2)), workdir)


def test_a_full_disk_is_explained(folder, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(NvcError, match="checkpoints: a checkpoint cannot be written"):
            loop.train(config_of(folder, SIX_STEPS), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_workdir_of_another_model_is_refused(folder, tmp_path):
    loop.train(config_of(folder, SIX_STEPS), tmp_path)
    wider = ConfigDict(dict(name="toy", size=dict(width=16, y=24, z=4), dtype="float32"))
    with pytest.raises(NvcError, match="does not fit this config's model"):
        loop.train(config_of(folder, SIX_STEPS, model=wider), tmp_path)


# Data


def clips_of(folder, stage_config, start=0):
    (only,) = stages.read(stages.complete(config_of(folder, stage_config)))
    model = registry.build("toy", "small")
    return loop.host_clips(pipeline.open_sets(only.data), TOY, model, only, start, seed=7)


def test_steps_walk_through_their_clips(folder):
    walking = stage(9, units=2, walk=3, batch=4)
    steps = list(islice(clips_of(folder, walking), 7))
    for start in (1, 3, 5):  # as after resuming
        for (clip, carried), (again, too) in zip(
            steps[start:], clips_of(folder, walking, start), strict=False
        ):
            assert carried == too
            for a, b in zip(clip, again, strict=True):
                np.testing.assert_array_equal(a, b)
    for step, (clip, carried) in enumerate(steps):
        assert carried == (step % 3 > 0)
        assert clip.frames.shape == (4, 4, 16, 16, 3) and clip.reference.shape == (4, 1, 16, 16, 3)
        assert set(clip.phase % 2) == {0}
    for (before, _), (clip, carried) in pairwise(steps):
        if carried:
            np.testing.assert_array_equal(clip.reference[:, 0], before.frames[:, -1])
            np.testing.assert_array_equal(clip.qp, before.qp)
            np.testing.assert_array_equal(clip.phase, before.phase + 4)
    assert (steps[0][0].frames != steps[3][0].frames).any()


@pytest.mark.parametrize("coded", [0.0, 0.25])
def test_first_references_are_drawn_by_their_shares(folder, coded):
    shares = {"blank": 0.25, "true": 0.5 - coded, "degraded": 0.25, "coded": coded}
    (only,) = stages.read(stages.complete(config_of(folder, stage(1, references=shares))))
    model, count = registry.build("toy", "small"), 1200
    params = registry.init(model, jax.random.key(0))
    frames = jax.random.uniform(jax.random.key(1), (count, 16, 16, 3))
    clip = training.Clip(frames[:, None], frames[:, None], *np.zeros((2, count), np.int32))
    drawn = jax.jit(lambda key: training.first_refs(TOY, model, params, only, clip, key)[0].frame)(
        jax.random.key(0)
    )
    drawn = np.asarray(drawn)
    assert drawn.shape == frames.shape and np.isfinite(drawn).all()
    blank = (drawn == references.BLANK).all((1, 2, 3))
    true = (drawn == frames).all((1, 2, 3))
    error = np.sqrt(((drawn - frames) ** 2).mean((1, 2, 3)))
    own = training._coded(TOY, model, params, frames, clip, None)
    by_codec = (np.abs(drawn - own) < 1e-5).all((1, 2, 3))
    rest = ~blank & ~true & ~by_codec
    for share, wanted in zip(
        (blank.mean(), true.mean(), rest.mean(), by_codec.mean()), shares.values(), strict=True
    ):
        assert abs(share - wanted) < 0.05
    assert error[rest].min() > 0 and error[rest].max() < 0.5, "all stay recognisable"


def test_degradations_keep_what_they_should():
    frame = np.random.default_rng(0).uniform(0, 1, (2, 16, 24, 3)).astype(np.float32)
    fine = references.coarse_transform(frame, jnp.full(2, 1e-5))
    np.testing.assert_allclose(fine, frame, atol=1e-4)
    coarse = references.coarse_transform(frame, jnp.array([0.1, 100.0]))
    assert np.abs(coarse[0] - frame[0]).max() > 0.02
    np.testing.assert_array_equal(coarse[1], 0)
    blurred = references.box_blur(frame)
    np.testing.assert_allclose(blurred[:, 4:8, 8:12].mean((1, 2)), frame[:, 4:8, 8:12].mean((1, 2)),
                               rtol=1e-5)  # fmt: skip
    assert np.ptp(blurred[0, 4:8, 8:12, 0]) == 0


# Losses


@pytest.mark.parametrize(
    "kind, expected",
    [("video", [1, 9.158, 83.86, 768]), ("image", [10, 58.95, 347.4, 2048])],
)
def test_lambda_at_its_check_points(kind, expected):
    values = quality.lambda_of_qp(jnp.array([0, 21, 42, 63]), kind)
    np.testing.assert_allclose(values, expected, rtol=5e-4)


def test_distortion_against_its_definition():
    rng = np.random.default_rng(0)
    target, recon = rng.uniform(0, 1, (2, 3, 8, 10, 3))
    recon[2] = target[2]

    def rgb(yuv):
        y, u, v = np.moveaxis(yuv, -1, 0)
        r, b = y + 1.5748 * (v - 0.5), y + 1.8556 * (u - 0.5)
        return np.stack([r, (y - 0.2126 * r - 0.0722 * b) / 0.7152, b], -1)

    errors = np.maximum(((recon - target) ** 2).mean((1, 2)), 1e-6)
    d_yuv = 3 * (errors[:, 0] ** 10 * errors[:, 1] * errors[:, 2]) ** (1 / 12)
    d_rgb = ((rgb(recon) - rgb(target)) ** 2).mean((1, 2)).sum(-1)
    result = losses.distortion(recon, target)
    np.testing.assert_allclose(result, 0.8 * d_yuv + 0.2 * d_rgb, rtol=1e-4)
    np.testing.assert_allclose(result[2], 0.8 * 3e-6, rtol=1e-3)
    gradient = jax.grad(lambda r: losses.distortion(r, target).sum())(jnp.asarray(recon))
    assert jnp.isfinite(gradient).all()


def test_grey_is_grey_and_white_is_white():
    rgb = losses.yuv_to_rgb(jnp.array([[0.0, 0.5, 0.5], [0.3, 0.5, 0.5], [1.0, 0.5, 0.5]]))
    np.testing.assert_allclose(rgb, np.repeat([[0.0], [0.3], [1.0]], 3, 1), atol=1e-6)


def test_psnr_clips_like_a_picture():
    target = jnp.full((4, 4, 3), 1.0)
    np.testing.assert_allclose(losses.psnr(target - 0.1, target), 20, rtol=1e-4)
    np.testing.assert_allclose(losses.psnr(target + 5, target), 100, rtol=1e-4)


class Recorder:
    """Stands in for a model: notes the qps, adds an error of 0.1 to the first frame of a unit."""

    rgb = False

    def __init__(self, frames_per_unit):
        self.frames_per_unit = frames_per_unit
        self.qps, self.refs = [], []

    def apply(self, variables, frames, refs, qp, bottleneck, mutable):
        self.qps.append(np.asarray(qp))
        self.refs.append(refs)
        bits = {"z": 2.0, "y": 30.0, "y_float": 30.0, "side": 0.0, "motion": 0.0}
        bottleneck.bits = {part: jnp.full(len(frames), count) for part, count in bits.items()}
        return (frames.at[:, 0].add(0.1), len(self.qps)), {}


def test_pairs_follow_the_pattern_of_qualities_and_weights():
    model, frames = Recorder(2), jnp.full((3, 8, 4, 4, 3), 0.5)
    clip = training.Clip(frames[:, :1], frames, jnp.array([0, 10, 63]), jnp.array([0, 2, 6]))
    coded = training.unroll(UI2C, model, {}, clip, "first", jax.random.key(0))
    offsets = np.array([0, 8, 0, 4, 0, 4, 0, 4])
    expected = np.stack(
        [q + np.roll(offsets, -p) for q, p in zip([0, 10, 63], [0, 2, 6], strict=True)]
    )
    np.testing.assert_array_equal(np.concatenate(model.qps, axis=1), expected)
    assert model.refs == ["first", 1, 2, 3] and coded.refs == 4
    np.testing.assert_allclose(coded.bpp["y"], 4 * 30 / 16)
    np.testing.assert_allclose(coded.bpp["z"], 4 * 2 / 16)
    np.testing.assert_allclose(coded.recon[:, ::2], 0.6, rtol=1e-6)
    # Frames 0, 2, 4, 6 of the pattern weigh 0.52; only they have errors.
    single = losses.distortion(coded.recon[0, 0], frames[0, 0])
    exact = losses.distortion(frames[0, 0], frames[0, 0])
    total = 4 * 0.52 * single + (1.33 + 3 * 0.83) * exact
    np.testing.assert_allclose(coded.distortion, total, rtol=1e-4)


def test_pictures_alone_are_weighted_alike():
    model, frames = Recorder(1), jnp.full((2, 3, 4, 4, 3), 0.5)
    clip = training.Clip(frames[:, :1], frames, jnp.array([5, 60]), jnp.array([0, 3]))
    intra = registry.entry("intra")
    coded = training.unroll(intra, model, {}, clip, (), jax.random.key(0))
    np.testing.assert_array_equal(np.concatenate(model.qps, 1), [[5] * 3, [60] * 3])
    single = losses.distortion(coded.recon[0, 0], frames[0, 0])
    np.testing.assert_allclose(coded.distortion, 3 * single, rtol=1e-5)


# Releasing


@pytest.fixture
def run(folder, tmp_path):
    """(config, its file, workdir, last state) of a short run."""
    config = config_of(folder, SIX_STEPS)
    file = write_config(tmp_path / "config.py", config)
    return config, file, tmp_path / "run", loop.train(config, tmp_path / "run")


def test_a_run_becomes_a_model_that_codes(run, tmp_path, capsys):
    _, file, workdir, state = run
    path = tmp_path / "toy-model.safetensors"
    arguments = ["release", path, "--config", file, "--workdir", workdir]
    assert cli.main([str(a) for a in arguments]) == 0
    model = released.load(path)
    assert (model.name, model.codec) == ("toy-model", "toy")
    for ours, average in zip(
        jax.tree.leaves(model.variables["params"]), jax.tree.leaves(state.average), strict=True
    ):
        np.testing.assert_array_equal(ours, np.float32(np.float16(average)))

    unit_codec, pictures = unit_program.prepare(model, 21, 19), moving_texture(21, 19, 4)
    refs = ()
    for start in (0, 2):
        pair = pictures[start : start + 2]
        payload, encoded = unit_program.encode_unit(unit_codec, pair, refs, (40, 44), True)
        decoded = unit_program.decode_unit(unit_codec, payload, refs, (40, 44))
        assert_same_pictures(decoded.pictures, encoded.pictures)
        refs = encoded.refs

    # Another run can start from it, if it is of the same size.
    def start(size):
        model = ConfigDict(dict(name="toy", size=size, dtype="float32"))
        config = config_of("", SIX_STEPS, model=model, init_from=str(path))
        module = registry.build("toy", size)
        config = stages.complete(config)
        with checkpoints.manager_of(tmp_path / "another") as manager:
            run = stages.read(config)
            return checkpoints.resume(manager, module, config, run, parallel.make_mesh())

    assert_same_state(start("small").params, model.variables["params"])
    assert_same_state(start("small").average, model.variables["params"])
    with pytest.raises(NvcError, match="do not fit this config's model"):
        start(dict(width=16, y=24, z=4))


def test_what_a_stage_left_becomes_a_model(folder, tmp_path):
    first, workdir = stage(2), tmp_path / "run"
    left = loop.train(config_of(folder, first), workdir).average
    config = config_of(folder, first, stage(2))
    file, output = write_config(tmp_path / "config.py", config), str(tmp_path / "a.safetensors")
    with pytest.raises(NvcError, match="no weights there"):
        checkpoints.release(str(file), str(workdir), output, 0)
    with pytest.raises(NvcError, match="stage 1 has not ended, at step 2"):
        checkpoints.release(str(file), str(workdir), output, 1)
    after = loop.train(config, workdir).average
    for number, average in ((0, left), (1, after), (None, after)):
        checkpoints.release(str(file), str(workdir), output, number)
        halves = jax.tree.map(lambda x: np.float32(np.float16(x)), average)
        assert_same_state(released.load(output).variables["params"], halves)
    with pytest.raises(NvcError, match="no stage 2; they count from 0 to 1"):
        checkpoints.release(str(file), str(workdir), output, 2)


def test_releasing_refuses(run, tmp_path):
    _, file, workdir, _ = run
    for arguments, complaint in (
        ((file, tmp_path / "missing", tmp_path / "a.safetensors"), "no checkpoint there"),
        ((file, workdir, tmp_path / "a.pt"), r"ends in \.safetensors"),
        ((file, workdir, tmp_path / "missing" / "a.safetensors"), "does not exist"),
        ((tmp_path / "missing.py", workdir, tmp_path / "a.safetensors"), "no such config"),
        ((ROOT / "README.md", workdir, tmp_path / "a.safetensors"), "not a training config"),
        (
            (ROOT / "nvc_jax/errors.py", workdir, tmp_path / "a.safetensors"),
            "not a training config",
        ),
    ):
        with pytest.raises(NvcError, match=complaint):
            checkpoints.release(str(arguments[0]), str(arguments[1]), str(arguments[2]))
    assert {p.name for p in tmp_path.iterdir()} == {"config.py", "run"}


# Entry point and configs


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--config=missing.py"], "the config cannot be used"),
        (["--config=nvc_jax/errors.py"], "the config cannot be used"),
        (["--config=configs/intra_nano.py", "--config.data.foldr=x"], "the config cannot be used"),
        (["--config=configs/intra_nano.py", "--config.data.folder=/missing"], "no such folder"),
        (["--config=configs/demo.py"], "is missing; see configs/ui2c_nano.py"),
        (["--config=configs/smoke.py", "--config.stages[1].batch=3", "--profile=9"], "FIRST,COUNT"),
        (["--config=configs/ui2c.py:huge"], "the config cannot be used"),
        (["--config=configs/ui2c.py:dev,0"], "0 times as large"),
        (["--config=configs/ui2c_nano.py:dev"], "the config cannot be used: TypeError"),
        (["--config=configs/smoke.py", "--walkdir=x"], "Did you mean: workdir"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_train_py_explains_what_is_wrong(tmp_path, arguments, complaint):
    command = [sys.executable, "train.py", f"--workdir={tmp_path / 'run'}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and complaint in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def arguments_of_configs():
    """All configs in the repository, with all arguments that they take."""
    for file in sorted((ROOT / "configs").glob("*.py")):
        yield file.name
    for size in ("plain", "dev", "base,8"):
        yield f"ui2c.py:{size}"
    for size in ("dev", "light", "full,4"):
        yield f"intra.py:{size}"
    for size in ("small", "full,8"):
        yield f"brhvc.py:{size}"
    for size in ("full_searched", "full,8"):
        yield f"light.py:{size}"
    for size in ("large", "dev", "fast,8"):
        yield f"uni_lvc.py:{size}"
    for file in sorted((ROOT / "configs").glob("*_ablations.py")):
        for change in runpy.run_path(str(file))["CHANGES"]:
            yield f"{file.name}:{change}"


@pytest.mark.parametrize("name", list(arguments_of_configs()))
def test_every_config_can_be_meant(name):
    file, _, argument = name.partition(":")
    assert file in (ROOT / "configs" / file).read_text(), "says how it is run"
    if "stages" not in runpy.run_path(str(ROOT / "configs" / file))["get_config"]():
        return  # of an evaluation
    config = stages.load(str(ROOT / "configs" / name))
    model = registry.build(**config.model)
    for s in stages.read(config):
        assert s.steps % s.walk == 0 and (model.references or s.walk == 1)
        if argument.endswith(",8"):
            parallel.check_batch(AbstractMesh((64, 1), ("data", "space")), s.batch, 1, s.crop, "")


def test_config_files_that_are_none_are_explained():
    for name, complaint in (
        ("configs/none.py", "no such config file"),
        ("configs/ui2c.py:tiny", "is not a training config"),
        ("configs/ui2c.py:dev,many", "many times as large"),
        ("configs/ui2c.py:dev,0", "0 times as large"),
    ):
        with pytest.raises(NvcError, match=complaint):
            stages.load(str(ROOT / name))


@pytest.mark.slow
def test_smoke(tmp_path):
    """The system from end to end, as a newcomer runs it; again, there is nothing left to do."""
    command = [sys.executable, "train.py", "--config=configs/smoke.py", f"--workdir={tmp_path}"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # for quicker compilation
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert [v["step"] for v in logged(tmp_path)] == list(range(1, 41))
    assert all(np.isfinite(v["loss"]) for v in logged(tmp_path))
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"30", "40"}
    assert len(list((tmp_path / "samples").iterdir())) == 2
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=600, env=env)
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ui2c", "intra"])
def test_full_size_trainings_start(tmp_path, name):
    """On the smallest pictures that there can be, and a few clips that are made up."""
    config = stages.load(str(ROOT / f"configs/{name}.py"))
    small = dict(steps=2, batch=1, crop=16, data=dict(folder="", image_share=0.5))
    config.stages = (ConfigDict(config.stages[0].to_dict() | small),)
    config.workers = 0
    state = loop.train(config, tmp_path)
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 45e6


def test_steps_can_be_profiled(folder, tmp_path):
    loop.train(config_of(folder, SIX_STEPS), tmp_path, profile=(3, 2))
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


# The real codecs


@pytest.mark.parametrize("name", SIZES)
def test_initial_weights_have_strong_types(name):
    """With weak ones, the first step would be compiled for itself alone."""
    model = registry.build(name, SIZES[name])
    shapes = jax.eval_shape(lambda: registry.init(model, jax.random.key(0)))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", SIZES)
def test_gradients_reach_every_weight_and_lead_downhill(folder, name, monkeypatch):
    """Of two units in a row, under integer scales and float ones together."""
    codec_entry, model = registry.entry(name), registry.build(name, SIZES[name])
    config = config_of(folder, stage(1, units=2), model=dict(name=name, size=SIZES[name]))
    config.model.dtype = "float32"
    clip = training.as_floats(first_clip(config))
    refs = training.as_refs(model, clip.reference)
    if name == "light":  # some of its networks only serve what is predicted, others what is not

        def search(self, frame, ref, qp):
            b, h, w, _ = frame.shape
            used = jnp.arange(w // 8) < w // 16
            field = jnp.zeros((b, h // 8, w // 8, 3), jnp.int16)
            return field.at[..., 2].set(used.astype(jnp.int16))

        monkeypatch.setattr(light.Light, "search", search)

    @jax.value_and_grad
    def loss(params):
        coded = training.unroll(codec_entry, model, params, clip, refs, None, exact=True)
        rate = coded.bpp["y"] + coded.bpp["y_float"] + coded.bpp["z"]
        return (rate + 100 * coded.distortion).mean()

    loss, params = jax.jit(loss), random_parameters(model)
    before, slopes = loss(params)
    for path, leaf in jax.tree.leaves_with_path(slopes):
        assert np.isfinite(leaf).all() and np.any(leaf), (
            f"no gradient: {jax.tree_util.keystr(path)}"
        )
    size = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(slopes)))
    after, _ = loss(jax.tree.map(lambda p, s: p - 1e-3 / size * s, params, slopes))
    assert after < before


class Open:
    """A bottleneck that lets everything through."""

    def encoder_only(self, module, fn, *shapes):
        return fn(module)

    decoder_only = encoder_only

    def factorized(self, z, chain, qp):
        return z

    exact = False

    def gaussian(self, residual, scale):
        return residual


@pytest.mark.parametrize("changes", [{"width": 192}, {"width": 200}, {"subpixel": 3}])
def test_transform_start_refuses_sizes_it_does_not_know(changes):
    name = "ui2c" if "subpixel" in changes else "intra"
    module = registry.build(name, SIZES[name] | changes)
    with pytest.raises(NvcError, match="cannot serve this size"):
        transform_start(name, module.cfg, random_parameters(module))


@pytest.mark.parametrize(
    "name, special",
    [
        ("ui2c", {}),
        ("intra", {"form": "uf2"}),
        ("intra", {"form": "uf"}),
        ("ui2c", {"form": "rt"}),
        ("ui2c", {"frames": 1}),
    ],
)
def test_transform_start_passes_pictures_through(name, special):
    """Without quantisation, a codec that was never trained returns nearly the picture."""
    size = SIZES[name] | {"width": 64, "y": 96} | special
    module = registry.build(name, size | ({"recon": 48} if name == "ui2c" else {}))
    params = random_parameters(module)
    for path, value in traverse_util.flatten_dict(params).items():
        if path[-1] == "bias":
            value[:] = 0
        elif path[-1] == "table":
            value[:] = 1
    neutral = params["prior_fusion"]["params"]["dense"]  # step sizes of 1
    neutral["kernel"][:] = 0
    neutral["bias"][:2] = -np.log(2)
    if name == "ui2c":
        neutral["bias"][: module.cfg.y] = 1
    start = transform_start(name, module.cfg, params)
    planes = tuple(np.stack(p) for p in zip(*moving_texture(64, 64, 2), strict=True))
    frames = unit_program.planes_to_frames(planes, 64, 64)[:, : module.frames_per_unit]
    qp = np.zeros((1, module.frames_per_unit), np.int32)
    code = jax.jit(lambda params: module.apply({"params": params}, frames, (), qp, Open())[0])
    assert losses.psnr(code(start), frames).mean() > 25 > losses.psnr(code(params), frames).mean()


def test_scale_heads_are_released_once_they_have_begun_to_learn():
    model = dict(name="ui2c", size=SIZES["ui2c"], dtype="float32")
    config = config_of("", stage(5), stage(5, exact=True), model=model)
    run = stages.read(stages.complete(config))
    assert [checkpoints._head_has_learnt(run, step) for step in (4, 5, 6)] == [False, False, True]


def test_a_model_without_its_scale_head_is_calibrated(tmp_path):
    module = registry.build("ui2c", SIZES["ui2c"])
    bare = released.without_scale_head(module, random_parameters(module))
    path = tmp_path / "bare.safetensors"
    released.save(path, *released.freeze("bare", "ui2c", *bare))
    assert not released.load(path).exact


@pytest.fixture(scope="module")
def one_step():
    """one_step(at, **special) -> (state before, state after, metrics), of a stage like this."""
    size = dict(width=8, y=24, z=4, scale_head=8)
    config = config_of("", model=dict(name="toy", size=size, dtype="float32"))
    rng = np.random.default_rng(0)
    frames = rng.uniform(0, 1, (2, 4, 16, 16, 3)).astype(np.float32)
    clip = training.Clip(frames[:, :1], frames, np.array([20, 50], np.int32), np.zeros(2, np.int32))

    @functools.cache
    def prepare(**special):
        for name in {"penalty", "references"} & set(special):
            special[name] = dict(special[name])
        config.stages = (stage(5, end_lr=1e-3, **special),)
        (only,) = stages.read(stages.complete(config))
        model = registry.build("toy", size)
        state = training.init_state(TOY, model, only, registry.random_params(model, seed=0))
        step = training.make_train_step(TOY, model, only, 0, seed=0, warmup_steps=1)
        return state, jax.jit(step, static_argnums=2), 2 * only.units

    def run(at=0, **special):
        state, step, coded = prepare(**special)
        state = state.replace(step=jnp.int32(at))
        after, metrics = step(state, clip._replace(frames=clip.frames[:, :coded]), False)
        return state, after, {name: float(v) for name, v in metrics.compute().items()}

    return run


def learnt(before, after) -> set[str]:
    """Names of the sub-networks that a step has changed."""
    differ = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    return {name for name, leaves in differ.items() if any(jax.tree.leaves(leaves))}


def test_only_what_a_stage_trains_changes(one_step):
    before, after, metrics = one_step(exact=True, trainable=("scale_head",), walk=2)
    assert learnt(before, after) == {"scale_head"}
    assert after.carry[0].memory.shape == before.carry[0].memory.shape
    assert (after.carry[0].memory != 0).any()
    assert np.isfinite(metrics["bpp_y"])
    before, after, _ = one_step()
    assert learnt(before, after) == set(before.params) - {"scale_head"}
    before, after, _ = one_step(exact=True, float_share=0.25)
    assert learnt(before, after) == set(before.params)


def test_shares_of_the_rate_under_both_kinds_of_scales(one_step):
    *_, exact = one_step(exact=True)
    *_, mixed = one_step(exact=True, float_share=0.25)
    *_, floats = one_step()
    for name in ("bpp_y", "bpp_y_float"):
        assert mixed[name] == pytest.approx(exact[name], rel=1e-5)
    assert exact["bpp_y"] != pytest.approx(exact["bpp_y_float"], rel=1e-3)
    assert floats["bpp_y"] == floats["bpp_y_float"]
    assert exact["bpp_side"] == 0 <= floats["bpp_side"]
    assert floats["bpp_y"] == pytest.approx(exact["bpp_y_float"], rel=1e-4)
    expected = 0.75 * exact["loss"] + 0.25 * floats["loss"]
    assert mixed["loss"] == pytest.approx(expected, rel=1e-4)


def test_rates_without_noise_are_those_of_the_symbols(one_step):
    def rate(at, noise):
        *_, metrics = one_step(at, noise=noise, references=(("true", 1.0),))
        return metrics["bpp_y"]

    assert rate(0, noise=False) == rate(1, noise=False)
    assert rate(0, noise=True) != rate(1, noise=True)


def test_detached_rates(one_step):
    *_, noisy = one_step(exact=True)
    *_, rounded = one_step(exact=True, noise=False)
    before, after, detached = one_step(exact=True, detached=True)
    assert detached["bpp_y"] == pytest.approx(rounded["bpp_y"], rel=1e-5)
    assert detached["bpp_y_float"] == pytest.approx(noisy["bpp_y_float"], rel=1e-5)
    assert detached["bpp_z"] == pytest.approx(noisy["bpp_z"], rel=1e-5)
    assert detached["loss"] > noisy["loss"]
    assert learnt(before, after) == set(before.params)


def assert_nearly_same(some, others, rtol=1e-3):
    for (path, a), b in zip(jax.tree.leaves_with_path(some), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "changes", [{"accumulate": 2}, {"remat": True}], ids=["accumulate", "remat"]
)
def test_parts_and_repeated_activations_change_nothing_but_memory(one_step, changes):
    """In float arithmetic; without noise and with references that nothing is drawn for."""
    common = dict(units=2, noise=False, references=(("true", 1.0),), walk=2)
    _, plain, metrics = one_step(**common)
    _, after, others = one_step(**common, **changes)
    for name in ("loss", "bpp_y", "psnr_y", "grad_norm"):
        assert others[name] == pytest.approx(metrics[name], rel=1e-3), name
    assert_nearly_same(after.opt_state[1][0].mu, plain.opt_state[1][0].mu, rtol=0.05)
    assert_nearly_same(after.carry, plain.carry)


def test_sub_networks_can_learn_more_slowly(one_step):
    before, plain, _ = one_step()
    _, slowed, _ = one_step(lr_scale=(("decoder", 0.125),))
    _, without, _ = one_step(lr_scale=(("encoder", 0.0),))

    def moved(state, name):
        pairs = zip(
            jax.tree.leaves(state.params[name]), jax.tree.leaves(before.params[name]), strict=True
        )
        return np.concatenate([np.ravel(a - b) for a, b in pairs])

    np.testing.assert_allclose(
        moved(slowed, "decoder"), moved(plain, "decoder") / 8, rtol=0.02, atol=1e-6
    )
    np.testing.assert_array_equal(moved(slowed, "hyper"), moved(plain, "hyper"))
    assert learnt(before, plain) - learnt(before, without) == {"encoder"}


def test_pupils_stay_close_to_their_teacher(folder, tmp_path):
    """With nothing but the teacher's weight in the loss, a codec that has one changes less."""
    first, common = stage(3, lr=1e-2), dict(steps=6, lr=1e-2, end_lr=1e-2)
    teacher = {"weights": "previous", "recon": 300.0, "refs": 30.0}
    distances = []
    for name, special in (("free", {}), ("taught", {"teacher": teacher})):
        config = config_of(folder, first, stage(**common, **special), average_decay=0.0)
        begun = loop.train(config_of(folder, first, average_decay=0.0), tmp_path / name)
        after = loop.train(config, tmp_path / name)
        pairs = zip(jax.tree.leaves(after.params), jax.tree.leaves(begun.params), strict=True)
        distances.append(sum(float(np.square(a - b).sum()) for a, b in pairs))
    free, taught = distances
    assert taught < free
    # In the middle of a stage, the teacher comes from the disk.
    assert_same_state(loop.train(config, tmp_path / "taught"), after)
    renamed = tmp_path / "taught" / "stages"
    longer = stage(**common | {"steps": 8}, teacher=teacher)
    renamed.rename(tmp_path / "elsewhere")
    with pytest.raises(NvcError, match=r"is missing, from which config.stages\[1\] learns"):
        loop.train(config_of(folder, first, longer, average_decay=0.0), tmp_path / "taught")
    (tmp_path / "elsewhere").rename(renamed)
    loop.train(config_of(folder, first, longer, average_decay=0.0), tmp_path / "taught")


def test_teachers_that_do_not_fit_are_refused_before_the_first_step(folder, run, tmp_path):
    _, file, workdir, _ = run
    model = tmp_path / "a.safetensors"
    checkpoints.release(str(file), str(workdir), str(model))
    taught = stage(2, teacher={"weights": str(model), "recon": 1.0})
    toy = dict(name="toy", size=dict(width=16, y=24, z=4), dtype="float32")
    config = config_of(folder, stage(2), taught, model=ConfigDict(toy))
    with pytest.raises(NvcError, match="do not fit this config's model"):
        loop.train(config, tmp_path / "another")
    assert not (tmp_path / "another" / "metrics.jsonl").read_text()


# The constraint on scales


PENALTY = {"variant": "gaussian", "eta": 0.3, "delta": 0.1, "beta": 1.0}


def scale_at(level):
    step = np.log(32 / 0.11) / 63
    return jnp.float32(0.11 * np.exp(step * level))


@pytest.mark.parametrize("delta, at_eta, at_boundary", [(1.0, 0.0015, 0.0022), (0.1, 0.29, 15.9)])
def test_the_gaussian_constraint_has_the_published_values(delta, at_eta, at_boundary):
    penalty = losses.scale_penalty(ConfigDict(PENALTY | {"delta": delta}))
    found = [float(penalty(scale_at(20.5 + d))) for d in (0.3001, 0.4999, -0.3001, -0.4999)]
    assert found == pytest.approx([at_eta, at_boundary] * 2, rel=0.03)


@pytest.mark.parametrize("variant", ["gaussian", "hinge"])
def test_the_constraint_pushes_away_from_boundaries_that_count(variant):
    penalty = losses.scale_penalty(ConfigDict(PENALTY | {"variant": variant}))
    slope = jax.grad(lambda level: penalty(0.11 * jnp.exp(np.log(32 / 0.11) / 63 * level)))
    assert slope(20.95) > 0 > slope(21.05)  # a step against the slope leads to the middle
    for level in (20.5, 20.75, 21.25, -3.05, 0.95, 1.05, 63.05, 64.0):
        assert penalty(scale_at(level)) == slope(level) == 0, level
    assert penalty(scale_at(2.95)) > 0 and penalty(scale_at(62.95)) > 0  # 3 is the first coded
    few = losses.scale_penalty(
        ConfigDict(PENALTY | dict(variant=variant, levels=32, scale_min=0.01, scale_max=64.0))
    )
    step = np.log(64 / 0.01) / 31
    assert few(jnp.float32(0.01 * np.exp(20.5 * step))) == 0
    assert few(jnp.float32(0.01 * np.exp(20.99 * step))) > 0


def test_the_constraint_is_part_of_the_loss(one_step):
    *_, plain = one_step()
    before, after, constrained = one_step(penalty=tuple(PENALTY.items()), trainable=("prior",))
    assert constrained["loss"] > plain["loss"]
    assert constrained["bpp_y"] == pytest.approx(plain["bpp_y"], rel=1e-5)
    assert learnt(before, after) == {"prior"}


@pytest.mark.parametrize(
    "special, complaint",
    [
        (dict(trainable=("scale_haed",)), "scale_haed"),
        (dict(penalty=(("variant", "hinge"),)), "beta"),
        (dict(penalty=tuple((PENALTY | {"variant": "square"}).items())), "square"),
        (dict(exakt=True), "exakt"),
        (dict(detached=True), "detached"),
        (dict(exact=True, detached=True, noise=False), "detached"),
    ],
)
def test_stages_that_cannot_be_meant_are_refused(one_step, special, complaint):
    with pytest.raises(NvcError, match=rf"config\.stages\[0\].*{complaint}"):
        one_step(**special)
