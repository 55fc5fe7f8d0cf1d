"""The training loop: data in, checkpoints, numbers and pictures out."""

import runpy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from clu import parameter_overview
from orbax.checkpoint import checkpoint_managers

from nvc_jax.data import clips as clip_data
from nvc_jax.data.prefetch import prefetch
from nvc_jax.errors import NvcError
from nvc_jax.models import registry, released
from nvc_jax.training import losses
from nvc_jax.training import step as training
from nvc_jax.training.transform_start import transform_start
from nvc_jax.training.writers import MetricWriter

CHECKPOINTS = "checkpoints"
FIELDS = {
    "seed", "model", "data", "init_from", "transform_start", "stages", "warmup_steps", "clip_norm",
    "weight_decay", "rate_balance", "average_decay", "max_skipped_in_row", "log_every",
    "sample_every", "checkpoint_every_seconds",
}  # fmt: skip
STAGE_FIELDS = {"steps", "units", "walk", "batch", "crop", "lr", "end_lr"}
# See `nvc_jax.training.step.make_train_step`.
SPECIAL_FIELDS = {
    "trainable", "exact", "noise", "float_share", "detached", "rate_balance", "references",
    "penalty",
}  # fmt: skip
PENALTY_FIELDS = {"variant", "eta", "delta", "beta"}


class Stopped(NvcError):
    """A run was asked to stop, and its last step is saved.

    Attributes:
      signal: what asked, SIGTERM or SIGINT.
    """

    def __init__(self, step: int, number: signal.Signals):
        super().__init__(
            f"stopped by {number.name} after step {step}, which is saved; the same command goes on "
            "from there"
        )
        self.signal = number


def train(config: ml_collections.ConfigDict, workdir: str) -> training.TrainState:
    """Trains until the config's last step, going on from the newest checkpoint in `workdir`.

    Writes `metrics.jsonl`, TensorBoard events, `samples/` (originals above reconstructions) and
    Orbax checkpoints. The first SIGTERM or Ctrl-C lets the current step finish and saves it; a
    second one ends the process at once.

    Raises:
      Stopped: after such a signal, unless that step was the last.
      NvcError: bad config, no data, a `workdir` that cannot be written (any more), or too many
        steps in a row without finite gradients.
    """
    check_config(config)
    model = registry.build(config.model.name, config.model.size, config.model.dtype)
    clips = clip_data.load_clips(config.data.folder)
    logging.info("training data: %s", clip_data.stats(clips))
    writer = MetricWriter(workdir)
    with _stop_signals() as stops, closing(writer), _checkpoints(workdir) as manager:
        return _train(config, model, clips, manager, writer, stops)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises an NvcError that names what a training config lacks, or the stage that cannot be."""
    if missing := sorted(FIELDS - set(config)):
        raise NvcError(
            f"config.{missing[0]} is missing; see configs/ui2c_nano.py for a training config"
        )
    if not config.stages:
        raise NvcError("config.stages is empty: there is nothing to train")
    model = registry.build(config.model.name, config.model.size, config.model.dtype)
    for number, stage in enumerate(config.stages):
        where = f"config.stages[{number}]"
        if missing := sorted(STAGE_FIELDS - set(stage)):
            raise NvcError(f"{where}.{missing[0]} is missing")
        if unknown := sorted(set(stage) - STAGE_FIELDS - SPECIAL_FIELDS):
            raise NvcError(f"{where}.{unknown[0]} is nothing that a stage can have")
        for name in sorted(STAGE_FIELDS - {"end_lr"}):
            if not stage[name] > 0:
                raise NvcError(f"{where}.{name} is {stage[name]}; it must be above 0")
        if stage.crop % 16:
            raise NvcError(f"{where}.crop is {stage.crop}; it must be a multiple of 16")
        if stage.get("trainable"):
            names = sorted(jax.eval_shape(lambda: registry.init(model, jax.random.key(0))))
            if unknown := sorted(set(stage.trainable) - set(names)):
                raise NvcError(
                    f"{where}.trainable names {unknown[0]}; the model consists of "
                    f"{', '.join(names)}"
                )
        if stage.get("exact", False) and not registry.has_scale_head(model):
            raise NvcError(f"{where}.exact needs a model with a scale head")
        if stage.get("detached", False) and not (
            stage.get("exact", False) and stage.get("noise", True)
        ):
            raise NvcError(f"{where}.detached needs `exact`, and noise")
        _check_penalty(stage.get("penalty"), f"{where}.penalty")


def _check_penalty(penalty: ml_collections.ConfigDict | None, where: str) -> None:
    if not penalty:
        return
    if missing := sorted(PENALTY_FIELDS - set(penalty)):
        raise NvcError(f"{where}.{missing[0]} is missing")
    if penalty.variant not in ("gaussian", "hinge"):
        raise NvcError(f"{where}.variant is {penalty.variant!r}; give 'gaussian' or 'hinge'")


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Notes the first SIGTERM or SIGINT in a list; from then on they do what they did before."""
    received, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        received.append(signal.Signals(number))
        restore()

    if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def _train(config, model, clips, manager, writer, stops) -> training.TrainState:
    ends = np.cumsum([stage.steps for stage in config.stages])
    state = resume(manager, model, config)
    parameter_overview.log_parameter_overview(state.params)
    train_step = jax.jit(
        _merging(training.make_train_step(model, config)), donate_argnums=0, static_argnums=(3, 4)
    )
    sample = make_sampler(model)
    step, last_save, window = int(state.step), time.monotonic(), Window()
    while step < ends[-1]:
        number = int(np.searchsorted(ends, step, side="right"))
        stage, stage_start = config.stages[number], int(ends[number]) - config.stages[number].steps
        empty = training.empty_carry(model, stage)
        if jax.tree.map(jnp.shape, state.carry) != jax.tree.map(jnp.shape, empty):
            state = state.replace(carry=empty)
        make = partial(host_batch, config, number, model.frames_per_unit, clips)
        batches = closing(prefetch(make, step - stage_start))
        with batches as iterator:
            while step < ends[number]:
                with window.waiting():
                    clip, carried = next(iterator)
                state, window.metrics = train_step(state, window.metrics, clip, carried, number)
                step, window.steps = step + 1, window.steps + 1
                if step % config.log_every == 0 or step == ends[-1]:
                    values = {**window.close(), "stage": number}
                    writer.write_scalars(step, values)
                    print_line(step, int(ends[-1]), values)
                    if values["skipped_in_row"] >= config.max_skipped_in_row:
                        raise NvcError(
                            f"step {step}: no finite gradient for {values['skipped_in_row']:.0f} "
                            "steps in a row; lower the learning rate or look at the data, then "
                            "train again: it resumes from the newest checkpoint"
                        )
                if step % config.sample_every == 0:
                    writer.write_images(step, {"samples": sample(state, clip)})
                stop = stops[0] if stops else None
                since_save = time.monotonic() - last_save
                if stop or step == ends[-1] or since_save > config.checkpoint_every_seconds:
                    with _saving(manager):
                        manager.save(step, args=ocp.args.StandardSave(state))
                    last_save = time.monotonic()
                if stop and step < ends[-1]:
                    raise Stopped(step, stop)
    return state


def _merging(train_step: Callable) -> Callable:
    """A train step that adds its metrics to earlier ones, which costs less than keeping them."""

    def step(state, metrics, clip, carried, stage):
        state, new = train_step(state, clip, carried, stage)
        return state, metrics.merge(new)

    return step


def resume(
    manager: ocp.CheckpointManager, model: nn.Module, config: ml_collections.ConfigDict
) -> training.TrainState:
    """The newest checkpoint's state; else a fresh one, or one with released weights to start from.

    Raises:
      NvcError: the checkpoint belongs to another model.
    """
    init = jax.jit(lambda: training.init_state(model, config, config.stages[0]))
    newest = manager.latest_step()
    if newest is not None:
        state = jax.eval_shape(init)
        ends = np.cumsum([stage.steps for stage in config.stages])
        number = int(np.searchsorted(ends, newest - 1, side="right"))
        # Beyond the last stage if the config was shortened since.
        stage = config.stages[min(number, len(ends) - 1)]
        carry = jax.eval_shape(lambda: training.empty_carry(model, stage))
        try:
            state = manager.restore(
                newest, args=ocp.args.StandardRestore(state.replace(carry=carry))
            )
        except ValueError as e:
            raise NvcError(
                f"{manager.directory}: checkpoint {newest} does not fit this config's model; give "
                f"another --workdir ({str(e).splitlines()[0]})"
            ) from None
        logging.info("going on from step %d", newest)
        return state
    state = init()
    if config.transform_start:
        params = transform_start(config.model.name, model.cfg, state.params)
        state = with_params(state, params)
    if config.init_from:
        params = state.params | released.trainable_params(released.load(config.init_from))
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, state.params):
            raise NvcError(f"{config.init_from}: its weights do not fit this config's model")
        state = with_params(state, params)
        logging.info("starting from the weights of %s", config.init_from)
    return state


def with_params(state: training.TrainState, params) -> training.TrainState:
    """A fresh state with other weights."""
    return state.replace(
        params=jax.tree.map(jnp.asarray, params), average=jax.tree.map(jnp.array, params)
    )


def release(config_file: str, workdir: str, output: str, **tables: Any) -> Path:
    """Writes the averaged weights of a run's newest checkpoint as a released model.

    A scale head is left out if the run has not finished a stage with `exact`.

    Args:
      output: the .safetensors file to write.
      tables: of the scales, see `nvc_jax.models.released.freeze`.

    Raises:
      NvcError: no such config, no checkpoint in `workdir`, or `output` cannot be written.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise NvcError(f"{output}: give a name that ends in .safetensors")
    if not Path(config_file).is_file():
        raise NvcError(f"{config_file}: no such config file")
    if not (Path(workdir) / CHECKPOINTS).is_dir():
        raise NvcError(f"{workdir}: no checkpoint there to release")
    try:
        config = runpy.run_path(config_file)["get_config"]()
    except (KeyError, SyntaxError) as e:
        raise NvcError(f"{config_file}: is not a training config ({e!r})") from None
    check_config(config)
    model = registry.build(config.model.name, config.model.size, config.model.dtype)
    with _checkpoints(workdir) as manager:
        if manager.latest_step() is None:
            raise NvcError(f"{workdir}: no checkpoint there to release")
        state = resume(manager, model, config)
    params = state.average
    if registry.has_scale_head(model) and not _head_has_learnt(config, int(state.step)):
        # Integer scales from an untrained head would cost many times the bits.
        model, params = released.without_scale_head(model, params)
    tensors, metadata = released.freeze(output.stem, config.model.name, model, params, **tables)
    released.save(output, tensors, metadata)
    return output


def _head_has_learnt(config: ml_collections.ConfigDict, step: int) -> bool:
    """Whether a stage that trains the scale head has been gone through by this step."""
    ends = np.cumsum([stage.steps for stage in config.stages])
    return any(
        stage.get("exact", False) and end <= step
        for stage, end in zip(config.stages, ends, strict=True)
    )


@contextmanager
def _checkpoints(workdir: str) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(preservation_policy=checkpoint_managers.LatestN(2))
    manager = ocp.CheckpointManager(Path(workdir).absolute() / CHECKPOINTS, options=options)
    try:
        yield manager
    finally:
        with _saving(manager):
            manager.close()  # waits for a checkpoint that is still being written


@contextmanager
def _saving(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns errors of writing a checkpoint, this one or the one before, into ours."""
    try:
        yield
    except (OSError, ValueError) as e:  # ValueError: TensorStore's name for a full disk
        reason = str(e).splitlines()[0]
        raise NvcError(f"{manager.directory}: a checkpoint cannot be written ({reason})") from e


def host_batch(config, number: int, per_unit: int, clips: clip_data.ClipSet, step: int):
    """Batch `step` of stage `number`, a pure function of its arguments.

    A stage with `walk` n cuts clips n times as long as one step codes, and n steps in a row walk
    through one clip, each going on from the references that the previous one left.

    Returns:
      (Clip, carried): see `nvc_jax.training.step`.
    """
    stage = config.stages[number]
    clip_number, piece = divmod(step, stage.walk)
    seed = config.seed * 1000 + number
    reserved = 1 if per_unit > 1 else 0
    coded = stage.units * per_unit
    frames = clip_data.sample_batch(
        clips,
        seed=seed,
        step=clip_number,
        batch=stage.batch,
        frames=reserved + coded * stage.walk,
        crop=stage.crop,
        image_share=config.data.image_share,
    )["frames"].astype(np.float32)
    frames /= 255
    start = reserved + piece * coded
    rng = np.random.default_rng([seed, clip_number, 1])
    return training.Clip(
        reference=frames[:, start - reserved],
        frames=frames[:, start : start + coded],
        qp=rng.integers(0, losses.QP_COUNT, stage.batch, dtype=np.int32),
        phase=(2 * rng.integers(0, 4, stage.batch, dtype=np.int32) + piece * coded) % 8,
    ), piece > 0


class Window:
    """Metrics and times since the last log line.

    Attributes:
      metrics: StepMetrics of `steps` steps, merged.
    """

    def __init__(self):
        self.metrics, self.steps = training.StepMetrics.empty(), 0
        self.begin, self.waited = time.monotonic(), 0.0

    @contextmanager
    def waiting(self):
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin

    def close(self) -> dict[str, float]:
        metrics = jax.device_get(self.metrics)  # waits for the last step
        seconds = time.monotonic() - self.begin
        values = {name: float(value) for name, value in metrics.compute().items()}
        values["seconds_per_step"] = seconds / self.steps
        values["data_wait_share"] = self.waited / seconds
        self.__init__()
        return values


def print_line(step: int, steps: int, values: dict[str, float]) -> None:
    eta = timedelta(seconds=int((steps - step) * values["seconds_per_step"]))
    print(
        f"step {step}/{steps}  loss {values['loss']:.4f}  bpp y {values['bpp_y']:.4f} "
        f"z {values['bpp_z']:.4f}  PSNR Y {values['psnr_y']:.2f} U {values['psnr_u']:.2f} "
        f"V {values['psnr_v']:.2f}  |g| {values['grad_norm']:.3f}  skipped "
        f"{values['skipped']:.0f}  {1 / values['seconds_per_step']:.1f} steps/s  ETA {eta}",
        flush=True,
    )


def make_sampler(model: nn.Module) -> Callable[[training.TrainState, training.Clip], np.ndarray]:
    """A function (state, clip) -> uint8 RGB sheet: originals above reconstructions, first clips."""

    @jax.jit
    def reconstruct(state, clip):
        key = jax.random.key(0)
        refs = training.first_refs(model, state, clip, False, key)
        recon = training.unroll(model, state.average, clip, refs, key)[2]
        both = jnp.concatenate([clip.frames, recon], axis=2)  # one above the other
        return jnp.clip(losses.yuv_to_rgb(both), 0, 1)

    def sample(state, clip):
        rgb = np.asarray(reconstruct(state, clip))[:4]
        batch, frames, height, width, _ = rgb.shape
        sheet = rgb.transpose(0, 2, 1, 3, 4).reshape(batch * height, frames * width, 3)
        return (255 * sheet + 0.5).astype(np.uint8)

    return sample
