"""Clips made of photographs, whose motion is true to a fraction of a pixel and never runs out.

A camera pans, zooms and turns over one photograph, while a piece of a second one passes in front of
it on a way of its own, and the light may change. Positions of a picture are complex numbers, across
+ i down, so that one factor both scales and turns. (Our own choice of motion, not from a paper.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nvc_jax.data.clips import Clip
from nvc_jax.data.crops import FLIP_SHARE

MAX_SPEED = 16  # pixels per frame; slow motion is more frequent
BEND = 0.1  # deviation of how much of its speed a way gains or loses per frame, in any direction
TURN_SHARE, TURN = 0.5, 0.01  # of ways, and deviation, radians per frame
ZOOM_SHARE, ZOOM = 0.5, 0.01  # of ways, and deviation, natural logarithm per frame
FRONT_SHARE = 0.7  # of clips with something in front
FRONT_RADII = (0.1, 0.35)  # of the picture's side
LIGHT_SHARE, LIGHT = 0.3, 0.02  # of clips, and deviation of the gain, natural logarithm per frame
MAX_SCALE = (
    2  # pixels of a photograph for one of the clip: shrunk ones are sharp between pixels too
)
BLACK = (16, 128, 128)  # about which light scales Y, U and V


class Scene(NamedTuple):
    """A photograph, and those that may pass in front of it, as clips of one frame."""

    back: Clip
    fronts: Sequence[Clip]


class Scenes(Sequence):
    """A scene for each photograph."""

    def __init__(self, images: Sequence[Clip]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Scene:
        return Scene(self._images[index], self._images)


class Way(NamedTuple):
    """Where a picture is seen: position z of frame t shows `centres[t] + factors[t] * z`.

    Attributes:
      centres: complex [frames], what the middle of the frame shows, from which z starts.
      factors: complex [frames], pixels of the picture for one of the frame, and its angle.
    """

    centres: np.ndarray
    factors: np.ndarray


def film(scene: Scene, sample: np.ndarray, rng: np.random.Generator) -> None:
    """Fill `sample`, uint8 [frames, crop, crop, 3], with a clip of the scene.

    Y, U, V at 4:4:4, chroma of half the resolution repeated, as `nvc_jax.data.crops.cut_out` does.
    """
    frames, crop = sample.shape[:2]
    back = tuple(plane[0] for plane in scene.back)
    way = _pan(back[0].shape, frames, crop, rng)
    luma, chroma = seen(back[:1], way, crop)[0], seen(back[1:], _of_chroma(way), crop // 2)
    if rng.random() < FRONT_SHARE:
        front = scene.fronts[int(rng.integers(len(scene.fronts)))]
        _pass_in_front(tuple(plane[0] for plane in front), luma, chroma, rng)
    gains = np.exp(_drift(frames, LIGHT, rng) if rng.random() < LIGHT_SHARE else np.zeros(frames))
    mirror = slice(None, None, -1 if rng.random() < FLIP_SHARE else 1)
    for target, y, u, v, gain in zip(sample, luma, *chroma, gains, strict=True):
        for channel, plane in enumerate((y, u, v)):
            table = BLACK[channel] + gain * (np.arange(256) - BLACK[channel])
            plane = np.rint(table).clip(0, 255).astype(np.uint8)[plane][:, mirror]
            target[..., channel] = plane if channel == 0 else plane.repeat(2, 0).repeat(2, 1)


def seen(planes: Sequence[np.ndarray], way: Way, size: int) -> list[np.ndarray]:
    """What a way shows of planes uint8 [height, width] of one shape: of each, [frames, size, size].

    Bilinear, in 256ths of a pixel. Beyond their borders planes go on as they end.
    """
    result = [np.empty((len(way.centres), size, size), np.uint8) for _ in planes]
    for time, (centre, factor) in enumerate(zip(*way, strict=True)):
        pictures = _sampled(planes, centre, factor, size, slice(0, size), slice(0, size))
        for target, picture in zip(result, pictures, strict=True):
            target[time] = picture
    return result


def _sampled(planes, centre, factor, size, rows: slice, columns: slice) -> list[np.ndarray]:
    """What rows and columns of a frame of `size` show; integers of 16 bits behind the point."""
    planes = [_at_least_two(plane) for plane in planes]
    height, width = planes[0].shape
    across = np.arange(columns.start, columns.stop) - (size - 1) / 2
    down = (np.arange(rows.start, rows.stop) - (size - 1) / 2)[:, None]
    y = _fixed(centre.imag + factor.real * down) + _fixed(factor.imag * across)
    x = _fixed(centre.real - factor.imag * down) + _fixed(factor.real * across)
    np.clip(y, 0, ((height - 1) << 16) - 1, out=y)
    np.clip(x, 0, ((width - 1) << 16) - 1, out=x)
    corner = np.multiply(y >> 16, width, dtype=np.intp) + (x >> 16)
    y, x = (y >> 8) & 255, (x >> 8) & 255
    result = []
    for plane in planes:
        flat = plane.ravel()
        one, other = (
            _between(flat[start:].take(corner), flat[start + 1 :].take(corner), x)
            for start in (0, width)
        )
        result.append(((_between(one, other, y) + (1 << 15)) >> 16).astype(np.uint8))
    return result


def _fixed(x: np.ndarray) -> np.ndarray:
    return np.rint(x * 65536).astype(np.int32)


def _between(one: np.ndarray, other: np.ndarray, part: np.ndarray) -> np.ndarray:
    """int32, 256 times what is `part` 256ths of the way from one to the other."""
    one = one.astype(np.int32)
    return (one << 8) + (other - one) * part


def _at_least_two(plane: np.ndarray) -> np.ndarray:
    """The plane, with its only row or column twice."""
    repeats = [2 if side == 1 else 1 for side in plane.shape]
    return plane if repeats == [1, 1] else plane.repeat(repeats[0], 0).repeat(repeats[1], 1)


def _of_chroma(way: Way) -> Way:
    """The same way for planes and frames of half the size; chroma is between its luma samples."""
    return Way((way.centres - 0.5 * (1 + 1j)) / 2, way.factors)


def _drift(frames: int, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """A value that grows at a constant random rate, and is 0 half-way."""
    return rng.normal(0, deviation) * (np.arange(frames) - (frames - 1) / 2)


def _turn_and_zoom(frames: int, rng: np.random.Generator) -> np.ndarray:
    turn = _drift(frames, TURN, rng) * (rng.random() < TURN_SHARE)
    zoom = _drift(frames, ZOOM, rng) * (rng.random() < ZOOM_SHARE)
    return np.exp(zoom + 1j * turn)


def _travel(frames: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth way in pixels, complex [frames], 0 half-way."""
    times = np.arange(frames) - (frames - 1) / 2
    speed = MAX_SPEED * rng.random() ** 2
    velocity = speed * np.exp(2j * np.pi * rng.random())
    change = speed * BEND * (rng.normal() + 1j * rng.normal()) / max(frames - 1, 1)
    return velocity * times + change * times**2 / 2


def _pan(shape: tuple[int, int], frames: int, crop: int, rng: np.random.Generator) -> Way:
    """A way of a camera over a photograph that it does not leave: shorter if there is no room."""
    factors, travel = _turn_and_zoom(frames, rng), _travel(frames, rng)
    # Of half a frame, to each side, at most.
    reach = crop / 2 * np.max(np.abs(factors.real) + np.abs(factors.imag))
    fits = min(shape) / (2 * reach)
    scale = min(fits, max(1.0, rng.uniform(0.5, 1) * min(fits, MAX_SCALE)))
    across, down = (
        _within(scale * part, scale * reach, side, rng)
        for part, side in ((travel.real, shape[1]), (travel.imag, shape[0]))
    )
    return Way(across + 1j * down, scale * factors)


def _within(travel: np.ndarray, reach: float, side: int, rng: np.random.Generator) -> np.ndarray:
    """Positions along a side, `reach` and more away from its ends."""
    room = max(side - 2 * reach, 0)
    length = np.ptp(travel)
    if length > room:
        travel = travel * (room / length)
    first, last = reach - 0.5 - travel.min(), side - 0.5 - reach - travel.max()
    return first + rng.random() * (last - first) + travel


def _pass_in_front(
    front: Sequence[np.ndarray], luma: np.ndarray, chroma: Sequence[np.ndarray], rng
) -> None:
    """Lays a piece of a photograph over frames [frames, crop, crop] and chroma, on its own way."""
    frames, crop = luma.shape[:2]
    radius = crop * rng.uniform(*FRONT_RADII)
    height, width = front[0].shape
    size = min(2 * max(1, round(radius * rng.uniform(1, MAX_SCALE))), height, width)
    top, left = (2 * int(rng.integers((side - size) // 2 + 1)) for side in (height, width))
    y = front[0][top : top + size, left : left + size]
    half = slice(top // 2, (top + size) // 2), slice(left // 2, (left + size) // 2)
    cover = _blob(size, rng)
    factors = size / (2 * radius) * _turn_and_zoom(frames, rng)
    # Where it is, from the middle of the frame.
    places = crop * (rng.random() - 0.5 + 1j * (rng.random() - 0.5)) + _travel(frames, rng)
    way = Way((size - 1) / 2 * (1 + 1j) - factors * places, factors)
    _lay_over([luma], [y], cover, way, places)
    small = cover.reshape(size // 2, 2, size // 2, 2).mean((1, 3)).astype(np.uint8)
    _lay_over(chroma, [plane[half] for plane in front[1:]], small, _of_chroma(way), places / 2)


def _lay_over(frames, planes, cover, way: Way, places: np.ndarray) -> None:
    """Mixes planes into frames by 255ths of `cover`, within its circle about places only."""
    crop = frames[0].shape[1]
    for time, (centre, factor) in enumerate(zip(*way, strict=True)):
        radius = len(cover) / 2 / np.abs(factor) + 1
        rows, columns = (
            slice(*np.clip([middle - radius, middle + radius + 1], 0, crop).astype(int))
            for middle in (places[time].imag + crop / 2, places[time].real + crop / 2)
        )
        *pictures, share = _sampled((*planes, cover), centre, factor, crop, rows, columns)
        for frame, picture in zip(frames, pictures, strict=True):
            behind = frame[time, rows, columns].astype(np.int32)
            mixed = 255 * behind + (picture - behind) * share + 127
            frame[time, rows, columns] = mixed // 255


def _blob(size: int, rng: np.random.Generator) -> np.ndarray:
    """A round random shape, uint8 [size, size]: 255 inside, 0 outside, and at the borders."""
    position = (np.arange(size) - (size - 1) / 2) / (size / 2)
    across, down = position[None], position[:, None]
    angle = np.arctan2(down, across)
    waves = [(n, rng.uniform(0, 0.15), rng.uniform(0, 2 * np.pi)) for n in (1, 2, 3)]
    edge = sum(amplitude * np.cos(n * angle + phase) for n, amplitude, phase in waves)
    edge = (1 + edge) / (1 + sum(amplitude for _, amplitude, _ in waves))
    # Two pixels from inside to outside.
    inside = (edge - np.hypot(across, down)) * size / 4
    result = np.rint(255 * inside.clip(0, 1)).astype(np.uint8)
    result[[0, -1]] = result[:, [0, -1]] = 0
    return result
