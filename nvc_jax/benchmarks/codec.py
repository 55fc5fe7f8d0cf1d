"""Frames per second, memory and arithmetic of codecs, entropy coding included."""

import resource
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nvc_jax import codec as coding
from nvc_jax import schedule as schedules
from nvc_jax import unit_program
from nvc_jax.benchmarks import own_process
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy import coder
from nvc_jax.errors import NvcError
from nvc_jax.models import complexity, registry, released

COLUMNS = {
    "model": "16", "schedule": "14", "width": "5", "height": "6", "encode_fps": "10.2f",
    "decode_fps": "10.2f", "encode_kmac_per_pixel": "11.1f", "decode_kmac_per_pixel": "11.1f",
    "compile_seconds": "10.1f", "peak_memory_mib": "10.0f", "bpp": "8.3f",
}  # fmt: skip


def table(
    models: list[str], sizes: list[tuple[int, int]], frames: int, qp: int, mode: str | None = None
) -> list[dict]:
    """`benchmark` of every model at every size, each in a process of its own, as a table.

    A process of its own, so that its peak memory is that of this model and size.

    Raises:
      NvcError: one of them fails.
    """
    print("  ".join(f"{_title(name):>{_width(form)}}" for name, form in COLUMNS.items()))
    results = []
    for model, (width, height) in product(models, sizes):
        try:
            results.append(own_process.ask(__name__, model, width, height, frames, qp, mode))
        except NvcError as e:
            raise NvcError(f"{model} at {width}x{height}: {e}") from None
        print(
            "  ".join(f"{results[-1][name]:>{form}}" for name, form in COLUMNS.items()), flush=True
        )
    return results


def _title(name: str) -> str:
    return {
        "encode_kmac_per_pixel": "enc kMAC/px", "decode_kmac_per_pixel": "dec kMAC/px",
        "compile_seconds": "compile s", "peak_memory_mib": "peak MiB",
    }.get(name, name.replace("_", " "))  # fmt: skip


def _width(form: str) -> str:
    return form.partition(".")[0]


def model_of(name: str) -> released.Released:
    """A released model, or with CODEC:SIZE one with random weights, which costs the same.

    Raises:
      NvcError: no such model, codec or size.
    """
    codec, colon, size = name.partition(":")
    if not colon or Path(name).suffix == ".safetensors":
        return released.load(name)
    module = registry.build(codec, size)
    params = registry.random_params(module, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "untrained.safetensors"
        released.save(path, *released.freeze(name, codec, module, params))
        return released.load(path)


def benchmark(
    model: str, width: int, height: int, frames: int, qp: int, mode: str | None = None
) -> dict[str, Any]:
    """Encodes and decodes a synthetic clip in memory and returns the speed.

    A few pictures are coded before, so that compilation does not count. "decode" is the jitted unit
    program with its callbacks, "coder" the host coder alone on the same symbols.

    Args:
      model: see `model_of`. With random weights the number of bits means nothing.
      mode: of models that know several, see `nvc_jax.schedule.MODES`.

    Raises:
      NvcError: no such model, or a size or qp that is out of range.
    """
    if width < 1 or height < 1:
        raise NvcError(f"size {width}x{height}: width and height must be positive")
    loaded = model_of(model)
    codec = unit_program.prepare(loaded, width, height)
    if mode is None:  # named all the same, where there are several
        orders = {order: name for name, order in coding.modes(loaded).items()}
        mode = orders.get(loaded.module.schedule)
    schedule = coding.schedule_for(loaded, mode=mode)
    pictures = moving_texture(width, height, frames)

    # Every program once: B-frames need two frames around them.
    few = schedules.hierarchical(2) if schedules.in_layers(schedule) else schedule
    begin = time.perf_counter()
    for _ in coding.encode(codec, pictures[:3], qp, few):
        pass
    compile_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    packets = [unit.packet for unit in coding.encode(codec, pictures, qp, schedule)]
    encode_seconds = time.perf_counter() - begin

    seconds, slots = {"decode": 0.0, "coder_encode": 0.0, "coder_decode": 0.0}, {}
    for number, unit in enumerate(schedules.plan(schedule, frames)):
        packet, refs = packets[number], coding.references(unit, slots)
        begin = time.perf_counter()
        decoded = unit_program.decode_unit(codec, packet.payload, refs, packet.qps, unit)
        slots[number] = jax.block_until_ready(decoded.refs)
        middle = time.perf_counter()
        for slot in unit.release:
            del slots[slot]
        steps = list(zip(decoded.symbols, decoded.indices, strict=True))
        payload = coder.encode(steps, codec.tables)
        encoded = time.perf_counter()
        buffer = np.frombuffer(payload, np.uint8)
        state = coder.begin_decode(buffer, len(payload))
        for _, index in steps:
            _, state = coder.decode_step(buffer, state, index, codec.tables)
        seconds["decode"] += middle - begin
        seconds["coder_encode"] += encoded - middle
        seconds["coder_decode"] += time.perf_counter() - encoded
    coded_bytes = sum(len(packet.payload) for packet in packets)
    return {
        "model": loaded.name,
        "mode": mode,
        "schedule": schedule.name,
        "device": jax.devices()[0].device_kind,
        "width": width,
        "height": height,
        "frames": frames,
        "qp": qp,
        "compile_seconds": compile_seconds,
        "encode_fps": frames / encode_seconds,
        "decode_fps": frames / seconds["decode"],
        "coder_encode_ms_per_frame": 1e3 * seconds["coder_encode"] / frames,
        "coder_decode_ms_per_frame": 1e3 * seconds["coder_decode"] / frames,
        "bpp": 8 * coded_bytes / (frames * width * height),
        **complexity.coding_cost(loaded.module, alone=schedule.name == "all_intra"),
        "peak_memory_mib": _peak_memory() / 2**20,
    }


def _peak_memory() -> int:
    """Bytes: of the accelerator, or of this process where it computes on the CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return stats.get("peak_bytes_in_use", own)


def print_one(results: dict[str, Any]) -> None:
    for key, value in results.items():
        print(f"{key:28} {value:.3f}" if isinstance(value, float) else f"{key:28} {value}")


if __name__ == "__main__":
    own_process.answer(benchmark)
