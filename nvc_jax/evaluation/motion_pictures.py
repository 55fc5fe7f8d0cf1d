"""Pictures of what motion does in a stream: field, prediction, what was added, result."""

import colorsys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nvc_jax import bitstream, unit_program
from nvc_jax import codec as coding
from nvc_jax import schedule as schedules
from nvc_jax.models import registry, released
from nvc_jax.models.light import join_planes, split_planes
from nvc_jax.nn.compensation import compensate
from nvc_jax.nn.motion import BLOCK, PRECISION
from nvc_jax.video import Planes

LEAST_RANGE = 2.0  # pixels: shorter vectors never look as if they were far
NONE = (0.5, 0.5, 0.5)
GAIN = 4  # of what the residual added, around mid-grey


def motion_pictures(
    stream: Path, model: released.Released, frame: int, png: Callable[[Planes], bytes]
) -> dict[str, bytes]:
    """Decodes a stream up to a frame and shows how that came about.

    Args:
      stream: a file of a codec that searches motion, one frame a unit.
      frame: not one without references.
      png: encodes a picture.

    Returns:
      What a picture shows -> PNG. {} for codecs without searched motion, and for intra frames.

    Raises:
      NvcError: the stream is damaged, or of another model.
    """
    if not registry.searches_motion(model.module):
        return {}
    with bitstream.open_stream(stream) as opened:
        header = opened.header
        coding.check_model(header, model)
        codec = unit_program.prepare(
            model, header.width, header.height, header.entropy_mode, header.margin_exponents
        )
        slots = {}
        planned = schedules.plan(header.schedule, frame + 1)
        for unit, (number, packet) in zip(planned, opened.packets(), strict=False):
            refs = coding.references(unit, slots)
            decoded = unit_program.decode_unit(codec, packet.payload, refs, packet.qps, unit)
            slots[number] = decoded.refs
            for slot in unit.release:
                del slots[slot]
    if decoded.motion is None or not refs:
        return {}
    predicted = _predicted(refs[0].frame, decoded.motion, header.height, header.width)
    result = decoded.pictures[0]
    return {
        f"motion, colours of up to {_range(decoded.motion):.0f} pixels": png(
            _colours(decoded.motion, header.height, header.width)
        ),
        "prediction by motion": png(predicted),
        f"what was added, {GAIN} times as strong": png(_difference(result, predicted)),
        "result": png(result),
    }


def _predicted(reference: jax.Array, field: np.ndarray, height: int, width: int) -> Planes:
    """Luma and chroma moved as the codec moves them, cut to the picture's size."""

    @jax.jit
    def planes(reference):
        parts = [compensate(plane, field[None]) for plane in split_planes(reference)]
        return unit_program.frames_to_planes(join_planes(*parts)[None], height, width)

    return Planes(*(np.asarray(plane)[0] for plane in planes(reference)))


def _range(field: np.ndarray) -> float:
    """Pixels that are shown as far."""
    length = np.hypot(*np.moveaxis(field[..., :2].astype(float), -1, 0)) / PRECISION
    return max(LEAST_RANGE, float(np.percentile(length, 98)))


def _colours(field: np.ndarray, height: int, width: int) -> Planes:
    """Directions as hues, distances as saturation; still is white, not predicted is grey."""
    down, across = np.moveaxis(field[..., :2].astype(float), -1, 0) / PRECISION
    hue = np.arctan2(down, across) / (2 * np.pi) % 1
    far = np.minimum(np.hypot(down, across) / _range(field), 1)
    rgb = np.array(
        [
            [colorsys.hsv_to_rgb(*cell, 1) for cell in zip(*row, strict=True)]
            for row in zip(hue, far, strict=True)
        ]
    )
    rgb[field[..., 2] == 0] = NONE
    rgb = rgb.repeat(BLOCK, 0).repeat(BLOCK, 1)
    # BT.601, as players take small pictures to be.
    y = rgb @ (0.299, 0.587, 0.114)
    u, v = (rgb[..., 2] - y) / 1.772, (rgb[..., 0] - y) / 1.402
    limited = [16 + 219 * y, *(128 + 224 * c[::2, ::2] for c in (u, v))]
    sizes = (height, width), *2 * ((-(-height // 2), -(-width // 2)),)
    return Planes(
        *(np.uint8(np.round(p[:h, :w])) for p, (h, w) in zip(limited, sizes, strict=True))
    )


def _difference(a: Planes, b: Planes) -> Planes:
    def grey(x, y):
        return np.clip(128 + GAIN * (x.astype(int) - y), 0, 255).astype(np.uint8)

    return Planes(*map(grey, a, b))
