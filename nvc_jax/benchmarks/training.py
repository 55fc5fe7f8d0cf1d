"""Training steps per second: real data beside a resident batch, our layers beside plain `nn.Conv`.

Also what several devices cost: emulated ones share the same cores, so that the same batch should
take the same time, and what it takes longer is overhead.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nvc_jax import parallel
from nvc_jax.benchmarks import own_process
from nvc_jax.data import pipeline
from nvc_jax.errors import NvcError
from nvc_jax.models import registry
from nvc_jax.nn.blocks import Depthwise, Pointwise, precision_of
from nvc_jax.training import checkpoints, stages
from nvc_jax.training.loop import Window, Work

WARM_UP = 2  # steps
ROUNDS = 5  # in which the things compared take turns, so that a busy machine slows all alike


def as_plain_convolutions(next_fun, args, kwargs, context):
    """An interceptor of Linen methods that computes our layers by `nn.Conv`, as is usual."""
    layer = context.module
    ours = context.method_name == "__call__" and isinstance(layer, Pointwise | Depthwise)
    if not ours or layer.is_initializing():
        return next_fun(*args, **kwargs)
    (x,), params = args, layer.variables["params"]
    if isinstance(layer, Pointwise):
        params, size, groups = params["dense"], (1, 1), 1
        kernel = params["kernel"][None, None]
    else:
        size, groups = params["kernel"].shape[:2], x.shape[-1]
        kernel = params["kernel"][:, :, None]
    conv = nn.Conv(
        kernel.shape[-1], size, padding=size[0] // 2, feature_group_count=groups,
        dtype=layer.dtype, precision=precision_of(layer.dtype), parent=None,
    )  # fmt: skip
    return conv.apply({"params": {"kernel": kernel, "bias": params["bias"]}}, x)


class Run:
    """A stage's training, step by step.

    Attributes:
      clips: what its steps train with, on the devices.
    """

    def __init__(self, config_file: str, folder: str | None, number: int):
        config = stages.load(config_file)
        if folder is not None:
            config.data = type(config)(dict(folder=folder, image_share=0.25))
        run = stages.read(config)
        if not 0 <= number < len(run):
            raise NvcError(f"--stage={number}: {config_file} has stages 0 to {len(run) - 1}")
        stage, self.model = run[number], registry.build(**config.model)
        mesh = parallel.make_mesh(config.mesh.space)
        where = f"config.stages[{number}]"
        parallel.check_batch(mesh, stage.batch, stage.accumulate, stage.crop, where)
        self.work = Work(config, self.model, stage, number, 0, mesh)
        state = checkpoints.fresh(self.model, config, stage, mesh)
        self._state, self._metrics = self.work.prepared(state), Window(self.work).metrics
        # Any weights take as long to learn from.
        self._teacher = jax.tree.map(jnp.copy, self._state.average) if stage.teacher else None
        self.clips = self.work.clips(pipeline.open_sets(stage.data, config.data_root), 0)

    def seconds(self, clips: Iterator, steps: int) -> float:
        """Per step, for steps on these clips."""
        begin = time.perf_counter()
        for _ in range(steps):
            clip, carried = next(clips)
            self._state, self._metrics = self.work.train_step(
                self._state, self._metrics, clip, carried, self._teacher
            )
        jax.block_until_ready(self._state)
        return (time.perf_counter() - begin) / steps


def forever(item: Any) -> Iterator[Any]:
    while True:
        yield item


def matrix_tflops(dtype: Any) -> float:
    """10^12 floating-point operations per second of one device in a large matrix product."""
    size = 4096 if jax.default_backend() != "cpu" else 1024
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision_of(dtype)))
    product(x, x).block_until_ready()

    def seconds():
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        return time.perf_counter() - begin

    return 2 * size**3 / min(seconds() for _ in range(20)) / 1e12


def in_turns(measure: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Medians over rounds in which everything is measured once."""
    found = {name: [] for name in measure}
    for _ in range(ROUNDS):
        for name, function in measure.items():
            found[name].append(function())
    return {name: statistics.median(values) for name, values in found.items()}


def benchmark(
    config: str, folder: str | None, stage: int, steps: int, devices: list[int], plain: bool
) -> dict[str, Any]:
    """Times a stage's steps, prints and returns the results.

    Args:
      config: file of a training config.
      folder: of training material in the place of the config's data; "" for made-up clips.
      steps: in each of a few rounds.
      devices: numbers of emulated devices, on a CPU.
      plain: whether to compare with plain convolutions.

    Raises:
      NvcError: a config, stage or data that cannot be used, or a number of devices that cannot
        share its batch.
    """
    run = Run(config, folder, stage)
    with closing(run.clips):
        run.seconds(run.clips, max(WARM_UP, 2 * run.work.stage.walk))
        resident = forever(next(run.clips))
        run.seconds(resident, WARM_UP)
        measured = in_turns(
            {
                "resident": lambda: run.seconds(resident, steps),
                "real": lambda: run.seconds(run.clips, steps),
            }
        )
    results = {
        "config": config,
        "stage": stage,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "steps_per_second_resident": 1 / measured["resident"],
        "steps_per_second_real_data": 1 / measured["real"],
        "real_data_share": measured["resident"] / measured["real"],
    }
    if flop := run.work.flop_per_step:  # not known where something does not learn
        speed = flop / measured["resident"] / jax.device_count() / 1e12
        results["tflop_per_step"] = flop / 1e12
        results["tflops_per_device"] = speed
        results["share_of_a_matrix_product"] = speed / matrix_tflops(run.model.dtype)
        if peak := parallel.peak_tflops(jax.devices()[0]):
            results["mfu"] = speed / peak
    if plain:
        results["plain_convolutions_times_slower"] = _plain(config, folder, stage, measured)
    for count in devices:
        seconds = emulated(config, folder, stage, steps, count)
        results[f"seconds_per_step_on_{count}_emulated_devices"] = seconds
    for key, value in results.items():
        print(f"{key:40} {value:.4g}" if isinstance(value, float) else f"{key:40} {value}")
    return results


def _plain(config: str, folder: str | None, stage: int, measured: dict[str, float]) -> float:
    with nn.intercept_methods(as_plain_convolutions):
        run = Run(config, folder, stage)
        with closing(run.clips):
            resident = forever(next(run.clips))
            run.seconds(resident, 1)  # traced and compiled under the interceptor
            return min(run.seconds(resident, 1) for _ in range(2)) / measured["resident"]


def emulated(config: str, folder: str | None, stage: int, steps: int, devices: int) -> float:
    """Seconds per step of a process of its own with so many devices on the same cores."""
    if jax.default_backend() != "cpu":
        raise NvcError("--devices: only CPUs can emulate devices")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {"XLA_FLAGS": flags}
    return own_process.ask(__name__, config, folder, stage, steps, environment=environment)


def seconds_per_step(config: str, folder: str | None, stage: int, steps: int) -> float:
    """With all of the devices that this process has, on a batch that is there."""
    run = Run(config, folder, stage)
    with closing(run.clips):
        resident = forever(next(run.clips))
        run.seconds(resident, WARM_UP)
        return statistics.median(run.seconds(resident, steps) for _ in range(ROUNDS))


if __name__ == "__main__":
    own_process.answer(seconds_per_step)
