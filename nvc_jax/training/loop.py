"""The training loop: data in, checkpoints, numbers and pictures out. It knows of no codec."""

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nvc_jax import colour, parallel, quality
from nvc_jax.data import pipeline
from nvc_jax.data.prefetch import read_ahead
from nvc_jax.errors import NvcError
from nvc_jax.models import complexity, registry
from nvc_jax.training import checkpoints, stages
from nvc_jax.training import step as training
from nvc_jax.training.hierarchy import ANCHORS, draw_path
from nvc_jax.training.orders import draw_run
from nvc_jax.training.writers import MetricWriter, SilentWriter

FIRST_UNITS = 64  # clips begin at one of these; a multiple of every pattern of qualities
SAMPLE_FRAMES = 8  # of a clip, a multiple of what a unit can be
# The processes of a run agree on whether to save or stop after so many steps, or fewer that take
# so many seconds: who is told to stop may have half a minute.
ASK_STEPS, ASK_SECONDS = 10, 2.0


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


def train(
    config: ml_collections.ConfigDict, workdir: str, profile: tuple[int, int] | None = None
) -> training.TrainState:
    """Trains until the config's last step, going on from the newest checkpoint in `workdir`.

    Every process of a run calls this. Writes `metrics.jsonl`, TensorBoard events, `samples/`
    (originals above reconstructions) and Orbax checkpoints. The first SIGTERM or Ctrl-C lets the
    current step finish and saves it; a second one ends the process at once.

    Args:
      profile: (first step, number of steps) that JAX's profiler records, below `workdir/plugins`
        for TensorBoard.

    Raises:
      Stopped: after such a signal, unless that step was the last.
      NvcError: bad config, no data, a `workdir` that cannot be written (any more), or too many
        steps in a row without finite gradients.
    """
    if "://" in str(workdir):
        raise NvcError(f"{workdir}: give a folder; mount a bucket as one, with gcsfuse for example")
    config = stages.complete(config)
    run = stages.read(config)
    mesh = parallel.make_mesh(config.mesh.space)
    parallel.together(lambda: checkpoints.check_weights(config, run))
    sources = parallel.together(lambda: open_all(run, config.data_root))
    parallel.check_same(
        [[len(s.records) for s in sources[repr(stage.data)]] for stage in run], "the data sets"
    )
    for number, stage in enumerate(run):
        where = f"config.stages[{number}]"
        parallel.check_batch(mesh, stage.batch, stage.accumulate, stage.crop, where)
    writer = parallel.together(
        lambda: MetricWriter(workdir) if parallel.is_main() else SilentWriter()
    )
    parallel.together(lambda: _check_shared(workdir))
    with ExitStack() as stack:
        stops = stack.enter_context(_stop_signals())
        stack.enter_context(closing(writer))
        manager = stack.enter_context(checkpoints.manager_of(workdir))
        profiler = stack.enter_context(closing(Profiler(workdir, *(profile or (0, 0)))))
        return _train(config, run, sources, workdir, mesh, manager, writer, stops, profiler)


def _check_shared(workdir: str) -> None:
    if not (Path(workdir) / "metrics.jsonl").exists():
        raise NvcError(
            f"{workdir}: does not hold what process 0 has written there; give a folder that all "
            "processes share"
        )


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


def _train(
    config, run, sources, workdir, mesh, manager, writer, stops, profiler
) -> training.TrainState:
    model = registry.build(config.model.name, config.model.size, config.model.dtype)
    ends = np.cumsum([stage.steps for stage in run])
    state = checkpoints.resume(manager, model, config, run, mesh)
    parallel.together(lambda: checkpoints.check_teachers(run, state.average))
    parameter_overview.log_parameter_overview(state.params)
    if parallel.is_main():
        kind = mesh.devices.ravel()[0].device_kind
        print(f"devices: {mesh.size} x {kind}, processes: {jax.process_count()}", flush=True)
    step, pace = int(state.step), Pace(config)
    writer.keep_until(step)
    sample = make_sampler(registry.entry(config.model.name), model, mesh)
    profiler.after(step, None)
    ahead = deque(maxlen=2)
    while step < ends[-1]:
        number = int(np.searchsorted(ends, step, side="right"))
        stage, start = run[number], int(ends[number]) - run[number].steps
        work = Work(config, model, stage, number, start, mesh)
        state = work.prepared(state)
        if step == start and (number or stage.taught_by(number) == number):
            checkpoints.keep_weights(workdir, number, state)
        parallel.together(lambda: checkpoints.check_teacher(workdir, number, stage))  # noqa: B023
        teacher = checkpoints.load_teacher(workdir, number, stage, state, mesh)
        window = Window(work)
        with closing(work.clips(sources[repr(stage.data)], step)) as clips:
            while step < ends[number]:
                # Two steps may wait for the devices: more would only hold their clips in memory,
                # and time spent waiting for the devices would look like waiting for data.
                if len(ahead) == ahead.maxlen:
                    jax.block_until_ready(ahead[0])
                with window.waiting():
                    clip, carried = next(clips)
                state, window.metrics = work.train_step(
                    state, window.metrics, clip, carried, teacher
                )
                step, window.steps = step + 1, window.steps + 1
                ahead.append(window.metrics)
                profiler.after(step, window.metrics)
                if step % config.log_every == 0 or step == ends[-1]:
                    values = {**window.close(), "stage": number}
                    pace.attempt(lambda: writer.write_scalars(step, values))  # noqa: B023
                    if parallel.is_main():
                        print_line(step, int(ends[-1]), values)
                    if values["skipped_in_row"] >= config.max_skipped_in_row:
                        raise NvcError(
                            f"step {step}: no finite gradient for {values['skipped_in_row']:.0f} "
                            "steps in a row; lower the learning rate or look at the data, then "
                            "train again: it resumes from the newest checkpoint"
                        )
                if step % config.sample_every == 0 and not stage.motion_only:
                    sheet = sample(state, clip)
                    pace.attempt(lambda: writer.write_images(step, {"samples": sheet}))  # noqa: B023
                stop, due = pace.agree(step, step == ends[-1], stops)
                if stop or due or step == ends[-1]:
                    checkpoints.save(manager, step, state)
                    pace.saved()
                if stop and step < ends[-1]:
                    raise Stopped(step, stop)
    return state


def open_all(run: tuple[stages.Stage, ...], root: str = "") -> dict[str, list[pipeline.Source]]:
    """The data of all stages, by their data sections' repr, each opened once."""
    sections = {repr(stage.data): stage.data for stage in run}
    loaded = {}
    return {key: pipeline.open_sets(data, root, loaded) for key, data in sections.items()}


class Work:
    """A stage, ready to run: its compiled step and its clips."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: nn.Module,
        stage: stages.Stage,
        number: int,
        start: int,
        mesh: Mesh,
    ):
        self.config, self.model, self.stage, self.mesh = config, model, stage, mesh
        self.number, self.start = number, start
        pixels = stage.batch * stage.units * model.frames_per_unit * stage.crop**2
        # What a step computes is counted as if all learned.
        if stage.trainable or 0 in dict(stage.lr_scale).values():
            self.flop_per_step = None
        elif stage.motion_only:
            self.flop_per_step = complexity.motion_training_flop(model, pixels)
        else:
            self.flop_per_step = complexity.training_flop(model, stage.exact, pixels)
        self.codec = registry.entry(config.model.name)
        step = training.make_train_step(
            self.codec, model, stage, start, seed=config.seed, warmup_steps=config.warmup_steps
        )
        # Said, not left to the compiler: a resumed run must find the same layouts, and programs.
        shapes = training.state_shapes(self.codec, model, stage)
        self._places = jax.tree.map(lambda x: x.sharding, checkpoints.placed(mesh, shapes))
        self.train_step = jax.jit(
            _merging(step), donate_argnums=0, static_argnums=3,
            out_shardings=(self._places, parallel.replicated(mesh)),
        )  # fmt: skip

    def prepared(self, state: training.TrainState) -> training.TrainState:
        """The state with what this stage needs and the last did not have.

        That is room for the references that steps hand on, and the moments of another optimiser.
        """
        wanted = training.state_shapes(self.codec, self.model, self.stage)

        def refill(name, make):
            shapes, held = getattr(wanted, name), getattr(state, name)
            if jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, shapes):
                return {}
            place = getattr(self._places, name)
            return {name: jax.jit(partial(make, shapes), out_shardings=place)()}

        def zeros(shapes):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def first_moments(_):
            return training.make_optimizer(self.stage).init(zeros(wanted.params))

        return state.replace(**refill("carry", zeros), **refill("opt_state", first_moments))

    def clips(self, sources, step: int) -> Iterator[tuple[training.Clip, bool]]:
        """What the steps from `step` on train with, on the devices ahead of time."""
        pieces = host_clips(
            sources, self.codec, self.model, self.stage, step - self.start,
            seed=self.config.seed * 1000 + self.number, workers=self.config.workers,
        )  # fmt: skip
        put = partial(_to_devices, self.mesh)
        return read_ahead(((put(clip), carried) for clip, carried in pieces), 2)


def host_clips(
    sources: list[pipeline.Source],
    codec: registry.Entry,
    model: nn.Module,
    stage: stages.Stage,
    step: int,
    seed: int,
    workers: int = 0,
) -> Iterator[tuple[training.Clip, bool]]:
    """(this process's part of the clip, whether it goes on where the one before stopped).

    A stage with `walk` n cuts clips n times as long as one step codes, and n steps in a row walk
    through one clip.

    Args:
      step: of the stage, to begin with.
    """
    in_layers = model.references == 2
    coded, reserved = stage.units * model.frames_per_unit, int(model.references > 0)
    process, processes = jax.process_index(), jax.process_count()
    length = 1 + max(stage.spans) if in_layers else reserved + coded * stage.walk
    batches = pipeline.batches(
        sources, seed=seed, batch=stage.batch, frames=length, crop=stage.crop,
        cut_share=stage.cut_share, process=process, processes=processes,
    )  # fmt: skip
    first, piece = divmod(step, stage.walk)
    for number, frames in enumerate(pipeline.iterate(batches, first, workers), first):
        # Drawn for the whole batch, so that it does not depend on how many share it.
        rng = np.random.default_rng([seed, number])
        qp = rng.integers(quality.QP_COUNT, size=stage.batch, dtype=np.int32)
        unit = rng.integers(FIRST_UNITS, size=stage.batch, dtype=np.int32)
        if codec.intra_offset is not None:
            unit[:] = 0
        mine = slice(process * len(frames), (process + 1) * len(frames))
        if registry.in_any_order(model):
            begin, end = stage.temperature
            temperature = begin + (end - begin) * min(number / stage.steps, 1)
            places, run = draw_run(rng, codec, stage.units, stage.spans, stage.orders, temperature)
            chosen = frames[:, _anywhere(rng, places, length)]
            yield training.Clip(chosen[:, :1], chosen, qp[mine], unit[mine], run), False
            continue
        if in_layers:
            places, path = draw_path(rng, stage.units, stage.spans, stage.tail_share)
            chosen = frames[:, _anywhere(rng, places, length)]
            yield (
                training.Clip(chosen[:, :ANCHORS], chosen[:, ANCHORS:], qp[mine], unit[mine], path),
                False,
            )
            continue
        while piece < stage.walk:
            begin = reserved + piece * coded
            yield (
                training.Clip(
                    reference=frames[:, begin - reserved, None],
                    frames=frames[:, begin : begin + coded],
                    qp=qp[mine],
                    phase=unit[mine] * np.int32(model.frames_per_unit) + np.int32(piece * coded),
                ),
                piece > 0,
            )
            piece += 1
        piece = 0


def _anywhere(rng: np.random.Generator, places: list[int], length: int) -> list[int]:
    """The places, all moved on as far as it happens within a clip of this length."""
    shift = int(rng.integers(length - max(places)))
    return [place + shift for place in places]


def _to_devices(mesh: Mesh, clip: training.Clip) -> training.Clip:
    def put(array, rows=None):
        sharding = parallel.batch_sharding(mesh, array, rows)
        shape = len(array) * jax.process_count(), *array.shape[1:]
        return jax.make_array_from_process_local_data(sharding, array, shape)

    everywhere = partial(jax.make_array_from_process_local_data, parallel.replicated(mesh))
    return training.Clip(
        put(clip.reference, rows=2), put(clip.frames, rows=2), put(clip.qp), put(clip.phase),
        jax.tree.map(everywhere, clip.path),
    )  # fmt: skip


def _merging(train_step: Callable) -> Callable:
    """A train step that adds its metrics to earlier ones, which costs less than keeping them."""

    def step(state, metrics, clip, carried, teacher):
        state, new = train_step(state, clip, carried, teacher)
        return state, metrics.merge(new)

    return step


class Pace:
    """When to save, to stop, to fail, such that all processes of a run do it at the same step."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._seconds, self._steps = config.checkpoint_every_seconds, config.checkpoint_every_steps
        # Asking the others means waiting for the step; alone there is nobody to ask.
        self._alone, self._ask_at, self._asked = jax.process_count() == 1, 0, None
        self._last, self._error = time.monotonic(), None

    def attempt(self, work: Callable[[], None]) -> None:
        """Does what only this process does. Errors surface at once, or when all processes agree."""
        try:
            work()
        except NvcError as e:
            self._error = self._error or e
            if jax.process_count() == 1:
                raise

    def saved(self) -> None:
        self._last = time.monotonic()

    def agree(
        self, step: int, last: bool, stops: list[signal.Signals]
    ) -> tuple[signal.Signals | None, bool]:
        """(the signal to stop for, whether a checkpoint is due). `last`: of all steps.

        Raises:
          NvcError: an attempt has failed, here or on another process.
        """
        due = bool(self._steps) and step % self._steps == 0
        if not (self._alone or last or step >= self._ask_at):
            return None, due
        now = time.monotonic()
        stop, late = int(stops[0]) if stops else 0, now - self._last > self._seconds
        if not self._alone:
            before, then = self._asked or (step - 1, now - ASK_SECONDS)
            pace = 1e6 * (now - then) / max(step - before, 1)
            mine = np.array([stop, late, self._error is not None, pace], np.int32)
            flags = multihost_utils.process_allgather(mine).reshape(-1, 4)
            stop, late, failed, pace = flags.max(0)
            if failed:
                raise self._error or NvcError(f"process {flags[:, 2].argmax()} cannot go on")
            self._asked = step, now
            self._ask_at = step + int(np.clip(1e6 * ASK_SECONDS / pace, 1, ASK_STEPS))
        return (signal.Signals(int(stop)) if stop else None), bool(due or late)


class Profiler:
    """Records steps with JAX's profiler; none if `count` is 0."""

    def __init__(self, workdir: str, first: int, count: int):
        self._workdir, self._first, self._last = str(workdir), first, first + count - 1
        self._running = False

    def after(self, step: int, result: Any) -> None:
        """To be called when so many steps are on their way, of which the last gives `result`."""
        if step in (self._first - 1, self._last):
            jax.block_until_ready(result)
        if self._running and step >= self._last:
            self.close()
        elif not self._running and self._first - 1 <= step < self._last:
            jax.profiler.start_trace(self._workdir)
            self._running = True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False


# What a log line says of time, and two runs of the same training never agree on.
TIMES = {"seconds_per_step", "data_wait_share", "tflops_per_device", "mfu"}


class Window:
    """Metrics and times since the last log line.

    Attributes:
      metrics: StepMetrics of `steps` steps, merged.
    """

    def __init__(self, work: Work):
        self._work = work
        # On the devices where the step leaves them, so that no second program is compiled.
        everywhere = parallel.replicated(work.mesh)
        self._empty = jax.jit(training.StepMetrics.empty, out_shardings=everywhere)
        self._begin()

    def _begin(self):
        self.metrics, self.steps = self._empty(), 0
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
        if self._work.flop_per_step:
            devices = self._work.mesh.devices.ravel()
            speed = self._work.flop_per_step / values["seconds_per_step"] / len(devices) / 1e12
            values["tflops_per_device"] = speed
            if peak := parallel.peak_tflops(devices[0]):
                values["mfu"] = speed / peak
        self._begin()
        return values


def print_line(step: int, steps: int, values: dict[str, float]) -> None:
    eta = timedelta(seconds=int((steps - step) * values["seconds_per_step"]))
    special = f"motion {values['motion_gain']:+.2f} dB  " if values["motion_gain"] else ""
    special += f"misjudged {values['misjudged']:.2f}  " if values["misjudged"] else ""
    coded = f"bpp y {values['bpp_y']:.4f} z {values['bpp_z']:.4f}  " if values["bpp_y"] else ""
    if values["psnr_y"]:
        planes = (f"{name} {values[f'psnr_{name.lower()}']:.2f}" for name in "YUV")
        coded += f"PSNR {' '.join(planes)}  "
    print(
        f"step {step}/{steps}  loss {values['loss']:.4f}  {coded}"
        f"{special}|g| {values['grad_norm']:.3f}  skipped {values['skipped']:.0f}  "
        f"{1 / values['seconds_per_step']:.1f} steps/s  ETA {eta}",
        flush=True,
    )


def make_sampler(codec, model: nn.Module, mesh: Mesh) -> Callable[[Any, training.Clip], np.ndarray]:
    """A function (state, clip) -> uint8 RGB sheet: originals above reconstructions, first clips."""

    @partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def reconstruct(params, clip):
        path = jax.tree.map(lambda x: x[:SAMPLE_FRAMES], clip.path)
        frames = clip.frames[:, :SAMPLE_FRAMES]
        clip = training.as_floats(clip._replace(frames=frames, path=path))
        refs = training.as_refs(model, clip.reference)
        recon = training.unroll(codec, model, params, clip, refs, None).recon
        both = jnp.concatenate([clip.frames, recon], axis=2)[:4]  # one above the other
        return jnp.round(255 * jnp.clip(colour.to_rgb(both), 0, 1)).astype(jnp.uint8)

    def sample(state, clip):
        rgb = np.asarray(reconstruct(state.average, clip))
        batch, frames, height, width, _ = rgb.shape
        return rgb.transpose(0, 2, 1, 3, 4).reshape(batch * height, frames * width, 3)

    return sample
