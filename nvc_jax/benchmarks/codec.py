"""Frames per second of a codec's parts: the compiled program, the host coder, both together."""

import time
from typing import Any

import jax
import numpy as np

from nvc_jax import codec as coding
from nvc_jax import schedule as schedules
from nvc_jax.data.synthetic import moving_texture
from nvc_jax.entropy import coder
from nvc_jax.errors import NvcError
from nvc_jax.models import released


def benchmark(model: str, width: int, height: int, frames: int, qp: int) -> dict[str, Any]:
    """Encodes and decodes a synthetic clip in memory, prints and returns the speed.

    A few pictures are coded before, so that compilation does not count. "program" is the jitted
    unit program (when decoding with its callbacks), "coder" the host coder alone on the same
    symbols.

    Raises:
      NvcError: no such model, or a size or qp that is out of range.
    """
    if width < 1 or height < 1:
        raise NvcError(f"size {width}x{height}: width and height must be positive")
    loaded = released.load(model)
    codec = coding.prepare(loaded, width, height)
    schedule = coding.schedule_for(loaded)
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
        decoded = coding.decode_unit(codec, packet.payload, refs, packet.qps, unit)
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
    results = {
        "model": loaded.name,
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
    }
    for key, value in results.items():
        print(f"{key:28} {value:.3f}" if isinstance(value, float) else f"{key:28} {value}")
    return results
