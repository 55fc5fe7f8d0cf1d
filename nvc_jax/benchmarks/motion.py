"""What the motion search finds, what that costs in bytes and in time, beside full search and DIS.

Every picture of a clip is predicted from the original before it, under the weight that a quality
point gives a bit. The peers have no bits to save: full search of 8x8 blocks at whole samples and
then at halves and quarters, which is what a search can find at most where blocks are on their own;
and OpenCV's DIS optical flow (Kroeger et al., ECCV 2016), a vector per sample, sampled with 8 taps.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvc_jax import codec as coding
from nvc_jax import unit_program
from nvc_jax.benchmarks.clips import progress, read_clip
from nvc_jax.benchmarks.codec import model_of
from nvc_jax.entropy import motion as coder
from nvc_jax.entropy.coder import compiled
from nvc_jax.errors import NvcError
from nvc_jax.models.light import MOTION_WEIGHT, step_of_qp
from nvc_jax.nn.compensation import TAPS, compensate, interpolation_kernel
from nvc_jax.nn.motion import BLOCK
from nvc_jax.nn.motion_search import search
from nvc_jax.quality import QP_ROWS
from nvc_jax.video import Planes

FAR = 24  # reach of the full search, in samples
PRESETS = ("fast", "medium")  # of DIS
COLUMNS = {
    "qp": "3", "copied_db": "9.2f", "searched_db": "11.2f", "full_db": "8.2f",
    "dis_fast_db": "11.2f", "dis_medium_db": "13.2f", "bytes": "7.0f", "full_bytes": "10.0f",
    "none_percent": "6.1f",
}  # fmt: skip
TITLES = {"copied_db": "copied dB", "searched_db": "searched dB", "full_db": "full dB",
          "dis_fast_db": "DIS fast dB", "dis_medium_db": "DIS medium dB", "bytes": "bytes",
          "full_bytes": "full bytes", "none_percent": "none %"}  # fmt: skip


def benchmark(
    clips: list[str],
    qps: list[int],
    frames: int,
    size: tuple[int, int],
    speed_sizes: list[tuple[int, int]],
    repeats: int,
    model: str | None = None,
) -> dict[str, Any]:
    """Searches everything, prints tables and returns them.

    Args:
      clips: paths of clips, of at least two pictures each.
      frames, size: of a clip at most, which is cut to them, and to multiples of 16.
      speed_sizes: (width, height) of which the time is taken, on the first clip, mirrored until it
        is as large.
      repeats: runs of each measurement of time, of which the fastest counts.
      model: name or file, or CODEC:SIZE, of a codec that searches motion, or None. How much of its
        time to encode is search is measured on the first clip.

    Returns:
      {"rows": of `compare` with "clip", "speeds": of `speeds`, "encode": of `share_of_encoding` or
      None, and the arguments}.

    Raises:
      NvcError: no such qp, a clip that cannot be read or is too short, or a model that does not
        search motion.
    """
    if wrong := [qp for qp in qps if not 0 <= qp < QP_ROWS]:
        raise NvcError(f"qp {wrong[0]} is out of range: 0 to {QP_ROWS - 1}")
    encode = share_of_encoding(model, clips[0], frames, size, qps) if model else None
    rows, first = [], None
    flows = _optical_flows()
    with progress() as bar:
        task = bar.add_task("", total=len(clips))
        for clip in clips:
            bar.update(task, description=Path(clip).name)
            lumas = [_luma(planes) for planes in read_clip(clip, size, frames)[1]]
            if len(lumas) < 2:
                raise NvcError(f"'{clip}' has a single picture, and no motion; give a longer one")
            first = first or lumas[:2]
            rows += [{"clip": Path(clip).name} | row for row in compare(lumas, qps, flows)]
            bar.advance(task)
    _print(rows)
    timed = [speeds(first, wh, qps[len(qps) // 2], flows, repeats) for wh in speed_sizes]
    _print_speeds(timed)
    for row in encode or []:
        print(
            f"{model}, qp {row['qp']}: {row['encode_ms']:.1f} ms to encode a unit, of which "
            f"{row['search_ms']:.1f} ms are search, {row['search_percent']:.1f} %"
        )
    return {"rows": rows, "speeds": timed, "encode": encode, "model": model, "clips": clips,
            "qps": qps, "frames": frames, "size": size}  # fmt: skip


def compare(lumas: list[np.ndarray], qps: list[int], flows: dict[str, Callable]) -> list[dict]:
    """How well pictures are predicted from those before them.

    Args:
      lumas: float32 [h, w] each, in [0, 1], sides multiples of 16.
      flows: see `_optical_flows`.

    Returns:
      For each qp {"qp", "copied_db", "searched_db", "full_db", "dis_<preset>_db" for each of the
      flows, "bytes" of motion per picture, "full_bytes", "none_percent" of blocks}. Decibels are
      those of all pictures together where the search predicts anything, for all peers alike; None
      if that is nowhere.
    """
    pairs = list(zip(lumas[1:], lumas[:-1], strict=True))
    fields = [full_search(*pair) for pair in pairs]
    full_bytes = np.mean([len(coder.encode(field)) for field in fields])
    moved = {
        "copied": [reference for _, reference in pairs],
        "full": [_compensated(r, field) for (_, r), field in zip(pairs, fields, strict=True)],
    } | {name: [_warped(r, flow(p, r)) for p, r in pairs] for name, flow in flows.items()}
    result = []
    for qp in qps:
        field, found, sizes = _nothing(*lumas[0].shape), [], []
        for picture, reference in pairs:
            ours = jnp.asarray(picture)[None], jnp.asarray(reference)[None], _weight(qp)
            field = _search(*ours, field)
            found.append(np.asarray(field[0]))
            sizes.append(len(coder.encode(found[-1])))
        moved["searched"] = [
            _compensated(r, field) for (_, r), field in zip(pairs, found, strict=True)
        ]
        used = np.stack(found)[..., 2].repeat(BLOCK, 1).repeat(BLOCK, 2) > 0
        decibels = {
            f"{name}_db": _psnr(np.stack(pictures)[used], np.stack(lumas[1:])[used])
            for name, pictures in moved.items()
        }
        none = 100 * (1 - used.mean())
        result.append({"qp": qp, "bytes": float(np.mean(sizes)), "full_bytes": float(full_bytes),
                       "none_percent": float(none)} | decibels)  # fmt: skip
    return result


def full_search(picture: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The nearest block of all within `FAR` samples, then halves and quarters of one around it.

    Args:
      picture, reference: float32 [h, w], sides multiples of 8.

    Returns:
      int16 [h/8, w/8, 3], a motion field: see `nvc_jax.nn.motion`.
    """
    margin = FAR + BLOCK
    planes = _interpolated(jnp.asarray(reference)[None, None], margin)[0, :, 0]
    vectors = _nearest_blocks(np.ascontiguousarray(picture), np.asarray(planes), margin)
    return np.concatenate([vectors, np.ones_like(vectors[..., :1])], -1)


def _interpolated(reference: jax.Array, margin: int) -> jax.Array:
    """[b, c, h, w] -> [b, PHASES^2, c, h + 2 margin, w + 2 margin], every phase of the reference.

    Phase PHASES * i + j holds what lies i quarters below and j quarters to the right.
    """
    before, behind = TAPS // 2 - 1, TAPS // 2
    padding = ((0, 0), (0, 0), *2 * ((margin + before, margin + behind),))
    padded = jnp.pad(reference, padding, mode="edge")
    kernel = interpolation_kernel()

    def along(x, axis):
        size = x.shape[axis] - TAPS + 1
        parts = [lax.slice_in_dim(x, k, k + size, axis=axis) for k in range(TAPS)]
        moved = [sum(p * w for p, w in zip(parts, row, strict=True)) for row in kernel[1:]]
        # Or compilers would interpolate along one axis anew for every position along the other.
        return lax.optimization_barrier([parts[before], *moved])

    return jnp.stack([p for rows in along(padded, 2) for p in along(rows, 3)], 1)


@compiled
def _nearest_blocks(picture, planes, margin):
    rows, columns = picture.shape[0] // 8, picture.shape[1] // 8
    vectors = np.zeros((rows, columns, 2), np.int16)
    for row in range(rows):
        for column in range(columns):
            down = across = 0
            # Of equals the first counts: no motion, then what is there already.
            best = _error(picture, planes, margin, row, column, 0, 0, np.float32(np.inf))
            for unit in (4, 2, 1):
                reach = 4 * (margin - 8) if unit == 4 else unit
                y, x = down, across
                for v0 in range(y - reach, y + reach + 1, unit):
                    for v1 in range(x - reach, x + reach + 1, unit):
                        error = _error(picture, planes, margin, row, column, v0, v1, best)
                        if error < best:
                            best, down, across = error, v0, v1
            vectors[row, column, 0], vectors[row, column, 1] = down, across
    return vectors


@compiled
def _error(picture, planes, margin, row, column, down, across, enough):
    """Squared differences of a block; of a part of it if that is `enough` already."""
    plane = planes[4 * (down & 3) + (across & 3)]
    y, x = 8 * row, 8 * column
    there_y, there_x = y + (down >> 2) + margin, x + (across >> 2) + margin
    total = np.float32(0)
    for i in range(8):
        for j in range(8):
            apart = picture[y + i, x + j] - plane[there_y + i, there_x + j]
            total += apart * apart
        if total >= enough:
            break
    return total


def speeds(
    lumas: list[np.ndarray],
    size: tuple[int, int],
    qp: int,
    flows: dict[str, Callable],
    repeats: int,
) -> dict[str, Any]:
    """Milliseconds of search, coding of fields, and compensation at one size; of DIS as well.

    Args:
      lumas: a picture and the next.
      size: (width, height), which is padded as codecs do, to multiples of 16.

    Returns:
      {"width", "height", "qp", "search", "encode", "decode", "compensation" (of all planes),
      "dis_<preset>" and "search_over_dis_<preset>" for each of the flows}: milliseconds of the
      fastest of the runs, which take turns, and ratios of those.
    """
    width, height = (-(-side // 16) * 16 for side in size)
    reference, picture = (_mirrored(luma, height, width) for luma in lumas)
    chroma = np.stack([reference[::2, ::2]] * 2, -1)
    planes = jnp.asarray(reference)[None, ..., None], jnp.asarray(chroma)[None]
    ours = jnp.asarray(picture)[None], jnp.asarray(reference)[None], _weight(qp)
    field = _search(*ours, _nothing(height, width))
    on_host = np.asarray(field[0])
    data = coder.encode(on_host)
    jobs = {
        "search": lambda: jax.block_until_ready(_search(*ours, field)),
        "encode": lambda: coder.encode(on_host),
        "decode": lambda: coder.decode(data, *on_host.shape[:2]),
        "compensation": lambda: jax.block_until_ready(_compensate(planes, field)),
    } | {name: lambda flow=flow: flow(picture, reference) for name, flow in flows.items()}
    for job in jobs.values():  # compilation does not count
        job()
    seconds = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - begin)
    best = {name: 1e3 * min(runs) for name, runs in seconds.items()}
    ratios = {f"search_over_{name}": best["search"] / best[name] for name in flows}
    return {"width": size[0], "height": size[1], "qp": qp} | best | ratios


def share_of_encoding(
    name: str, clip: str, frames: int, size: tuple[int, int], qps: list[int]
) -> list[dict[str, float]]:
    """How much of the time to encode units with references is search.

    Returns:
      For each qp {"qp", "encode_ms" of a unit, all included, "search_ms", "search_percent"}.

    Raises:
      NvcError: a model that does not search motion, or a clip that is too short.
    """
    model = model_of(name)
    info, pictures = read_clip(clip, size, frames)
    codec = unit_program.prepare(model, info.width, info.height)
    if codec.search is None:
        raise NvcError(f"'{model.name}' does not search motion")
    if len(pictures) < 2:
        raise NvcError(f"'{clip}' has a single picture, and no motion; give a longer one")
    seconds = []

    def timed(*arguments):
        begin = time.perf_counter()
        result = jax.block_until_ready(codec.search(*arguments))
        seconds.append(time.perf_counter() - begin)
        return result

    watched = codec._replace(search=timed)
    schedule = coding.schedule_for(model)
    for _ in coding.encode(watched, pictures[:3], qps[0], schedule):  # compiles
        pass
    result = []
    for qp in qps:
        seconds.clear()
        total, searches, begin = 0.0, 0, time.perf_counter()
        for _ in coding.encode(watched, pictures, qp, schedule):
            if len(seconds) > searches:
                total += time.perf_counter() - begin
            searches, begin = len(seconds), time.perf_counter()
        row = {"qp": qp, "encode_ms": 1e3 * total / len(seconds)}
        row["search_ms"] = 1e3 * sum(seconds) / len(seconds)
        result.append(row | {"search_percent": 100 * sum(seconds) / total})
    return result


_search = jax.jit(search)


@jax.jit
def _compensate(planes, field):
    return [compensate(plane, field) for plane in planes]


def _weight(qp: int) -> jax.Array:
    return (MOTION_WEIGHT * step_of_qp(jnp.full(1, qp, jnp.int32)) ** 2).astype(jnp.float32)


def _nothing(height: int, width: int) -> jax.Array:
    """What was found before the first search."""
    return jnp.zeros((1, height // BLOCK, width // BLOCK, 3), jnp.int16)


def _compensated(reference: np.ndarray, field: np.ndarray) -> np.ndarray:
    (moved,) = _compensate((jnp.asarray(reference)[None, ..., None],), jnp.asarray(field)[None])
    return np.asarray(moved[0, ..., 0])


def _optical_flows() -> dict[str, Callable]:
    """By name, flow(picture, reference): float32 [h, w, 2], across and down; {} without OpenCV."""
    try:
        import cv2
    except ImportError:
        print("OpenCV is not installed, so there is no DIS: pip install opencv-python-headless")
        return {}

    def flow(preset):
        dis = cv2.DISOpticalFlow_create(getattr(cv2, f"DISOpticalFlow_PRESET_{preset.upper()}"))
        return lambda picture, reference: dis.calc(_bytes(picture), _bytes(reference), None)

    return {f"dis_{preset}": flow(preset) for preset in PRESETS}


def _warped(reference: np.ndarray, flow: np.ndarray) -> np.ndarray:
    import cv2

    h, w = reference.shape
    rows, columns = np.mgrid[:h, :w].astype(np.float32)
    return cv2.remap(
        reference, columns + flow[..., 0], rows + flow[..., 1],
        cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip


def _bytes(luma: np.ndarray) -> np.ndarray:
    return np.round(255 * luma).astype(np.uint8)


def _luma(planes: Planes) -> np.ndarray:
    """float32 in [0, 1], cut to multiples of 16, of clips that are larger than that."""
    h, w = planes.y.shape
    if min(h, w) < 16:
        raise NvcError(f"a clip of {w}x{h} is too small for motion: 16x16 is the least")
    return np.ascontiguousarray(planes.y[: h // 16 * 16, : w // 16 * 16], np.float32) / 255


def _mirrored(luma: np.ndarray, height: int, width: int) -> np.ndarray:
    h, w = luma.shape
    more = ((0, max(0, height - h)), (0, max(0, width - w)))
    return np.ascontiguousarray(np.pad(luma, more, mode="symmetric")[:height, :width])


def _psnr(one: np.ndarray, other: np.ndarray) -> float | None:
    if not one.size:
        return None
    return float(-10 * np.log10(max(np.mean(np.square(one - other), dtype=np.float64), 1e-10)))


def _cell(value: float | None, form: str) -> str:
    return f"{'-':>{form.partition('.')[0]}}" if value is None else f"{value:>{form}}"


def _print(rows: list[dict[str, Any]]) -> None:
    columns = {name: form for name, form in COLUMNS.items() if name in rows[0]}
    width = max(4, *(len(row["clip"]) for row in rows))
    titles = [f"{TITLES.get(n, n):>{form.partition('.')[0]}}" for n, form in columns.items()]
    print("  ".join([f"{'clip':{width}}", *titles]))
    for row in rows:
        cells = [_cell(row[name], form) for name, form in columns.items()]
        print("  ".join([f"{row['clip']:{width}}", *cells]))


def _print_speeds(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    names = [name for name in rows[0] if name not in ("width", "height", "qp")]
    titles = [name.replace("_", " ").replace("dis", "DIS") for name in names]
    print("\n" + "  ".join([f"{'milliseconds':12}", *(f"{t:>8}" for t in titles)]))
    for row in rows:
        cells = [f"{row[n]:>{max(8, len(t))}.2f}" for n, t in zip(names, titles, strict=True)]
        print("  ".join([f"{row['width']}x{row['height']}".ljust(12), *cells]))
