"""PSNR and MS-SSIM of decoded 8-bit 4:2:0 video, in numpy.

Everything is measured on the planes that a decoder hands to a viewer: 8-bit 4:2:0, at the original
size, for neural codecs and for x264 and its kin alike. (Publications on neural codecs usually score
the network's output before it is rounded to 8 bits, which reads a little higher at high rates.)

Combined figures weigh the planes 6:1:1, per frame, as (6 Y + U + V) / 8; a clip's figure is the
mean over its frames (not the PSNR of the mean error).
"""

from collections.abc import Iterable

import numpy as np

from nvc_jax.errors import NvcError

PSNR_CAP_DB = 99.9  # what identical planes score: infinity would spoil every mean

# Wang, Simoncelli, Bovik: "Multi-scale structural similarity for image quality assessment",
# Asilomar 2003, section 3.2.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11
SIGMA = 1.5


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 arrays of equal shape, 10 log10(255^2 / MSE), at most 99.9."""
    _same_shape(a, b)
    error = np.square(a.astype(np.int16) - b.astype(np.int16), dtype=np.int32)
    mse = error.mean(dtype=np.float64)
    if mse == 0:
        return PSNR_CAP_DB
    return float(min(10 * np.log10(255.0**2 / mse), PSNR_CAP_DB))


def psnr_611(source, decoded) -> float:
    """Combined PSNR in dB of one picture, given as two triples of (y, u, v) planes."""
    return combined(*map(psnr, source, decoded))


def combined(y: float, u: float, v: float) -> float:
    """One score from those of the planes, 6:1:1."""
    return (6 * y + u + v) / 8


def ssim(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure term of two planes with values 0..255.

    Gaussian window of 11x11, sigma 1.5, where it fits entirely ("valid"), as in Wang, Bovik,
    Sheikh, Simoncelli: "Image quality assessment", IEEE TIP 13(4), 2004. A plane with a side below
    11 samples is measured with a window cut down to that side.

    Args:
      a: [height, width], uint8 or float32.
      b: the same shape.
    Returns:
      (ssim, contrast_structure), the second without the luminance term.
    """
    _same_shape(a, b)
    a = a.astype(np.float32, copy=False)
    b = b.astype(np.float32, copy=False)
    mean_a, mean_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mean_a * mean_a
    var_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = (2 * covariance + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return (
        float((luminance * contrast).mean(dtype=np.float64)),
        float(contrast.mean(dtype=np.float64)),
    )


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """MS-SSIM of two planes [height, width] with values 0..255; 1 for identical planes.

    Five scales; each next scale is the 2x2 mean of the one before. A scale counts only where the
    11x11 window fits, so planes whose smaller side is below 176 samples get four scales, below 88
    three, and so on, with the remaining weights scaled to sum to one. Negative terms count as 0.
    """
    a, b = a.astype(np.float32), b.astype(np.float32)
    weights = np.array(MS_SSIM_WEIGHTS[: scale_count(a.shape)])
    weights /= weights.sum()
    result = 1.0
    for i, weight in enumerate(weights):
        full, contrast = ssim(a, b)
        term = full if i == len(weights) - 1 else contrast
        result *= max(term, 0.0) ** weight
        a, b = _halve(a), _halve(b)
    return float(result)


def scale_count(shape: tuple[int, int]) -> int:
    """How many MS-SSIM scales a plane [height, width] gets: 5, or as many as fit; at least 1."""
    side, count = min(shape), 1
    while count < len(MS_SSIM_WEIGHTS) and side // 2 >= WINDOW:
        side //= 2
        count += 1
    return count


def ms_ssim_db(value: float) -> float:
    """MS-SSIM on a logarithmic scale, -10 log10(1 - value), at most 99.9."""
    return PSNR_CAP_DB if value >= 1 else float(min(-10 * np.log10(1 - value), PSNR_CAP_DB))


def frame_scores(source, decoded) -> dict[str, float]:
    """Scores of one picture, both given as (y, u, v) planes (`nvc_jax.video.Planes`).

    Returns:
      `psnr_y`, `psnr_u`, `psnr_v`, `psnr` (6:1:1) in dB and the same four for `ms_ssim` (0..1).
    """
    scores = {}
    for name, measure in (("psnr", psnr), ("ms_ssim", ms_ssim)):
        y, u, v = (measure(a, b) for a, b in zip(source, decoded, strict=True))
        scores |= {f"{name}_y": y, f"{name}_u": u, f"{name}_v": v, name: combined(y, u, v)}
    return scores


def clip_scores(source: Iterable, decoded: Iterable) -> dict:
    """Mean scores of a clip, and the two combined ones of every frame.

    Args:
      source, decoded: iterables of (y, u, v) planes; read once, one picture at a time.
    Returns:
      the means of every entry of `frame_scores`, plus `frames` (count), `frame_psnr` and
      `frame_ms_ssim` (lists).
    Raises:
      NvcError: no frames, or one side has more frames or other sizes than the other.
    """
    rows, missing = [], object()
    source, decoded = iter(source), iter(decoded)
    while True:
        a, b = next(source, missing), next(decoded, missing)
        if a is missing and b is missing:
            break
        if a is missing or b is missing:
            which = "source" if a is missing else "decoded video"
            raise NvcError(f"the {which} ends after {len(rows)} frames, the other one goes on")
        rows.append(frame_scores(a, b))
    if not rows:
        raise NvcError("nothing to measure: the clip has no frames")
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return means | {
        "frames": len(rows),
        "frame_psnr": [row["psnr"] for row in rows],
        "frame_ms_ssim": [row["ms_ssim"] for row in rows],
    }


def recovery_frames(frame_psnr: list[float], cut: int, end: int) -> tuple[int, float]:
    """How long the quality takes to come back after a cut.

    Args:
      frame_psnr: PSNR of every frame of the clip.
      cut: first frame after the cut; `end`: first frame after the scene.
    Returns:
      (frames, mean): how many frames after the cut the first one comes whose PSNR is within 1 dB of
      the scene's mean or better (0: the very first frame is), and that mean in dB.
    """
    scene = np.array(frame_psnr[cut:end])
    return int(np.argmax(scene >= scene.mean() - 1)), float(scene.mean())


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise NvcError(f"cannot compare pictures of different sizes: {a.shape} and {b.shape}")


def _blur(x: np.ndarray) -> np.ndarray:
    """Separable Gaussian over the places where the window fits: slices, much faster than 2-D."""
    for axis in (0, 1):
        taps = min(WINDOW, x.shape[axis])
        place = np.arange(taps) - (taps - 1) / 2
        kernel = np.exp(-0.5 * (place / SIGMA) ** 2)
        kernel = (kernel / kernel.sum()).astype(np.float32)
        length = x.shape[axis] - taps + 1
        shifted = [x[i : i + length] if axis == 0 else x[:, i : i + length] for i in range(taps)]
        total = kernel[0] * shifted[0]
        for weight, part in zip(kernel[1:], shifted[1:], strict=True):
            total += weight * part
        x = total
    return x


def _halve(x: np.ndarray) -> np.ndarray:
    """2x2 means; an odd last row or column is left out."""
    h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    x = x[:h, :w]
    return (x[0::2, 0::2] + x[1::2, 0::2] + x[0::2, 1::2] + x[1::2, 1::2]) / 4
