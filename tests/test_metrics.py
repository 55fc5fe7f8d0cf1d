"""PSNR and MS-SSIM against hand calculations and an independent SSIM; cuts and recovery."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvc_jax.errors import NvcError
from nvc_jax.metrics import (
    PSNR_CAP_DB,
    clip_scores,
    frame_scores,
    ms_ssim,
    ms_ssim_db,
    psnr,
    recovery_frames,
    scale_count,
    ssim,
)
from nvc_jax.video import Planes


def picture(height=48, width=64, seed=0) -> Planes:
    """Smooth noise: structured enough that SSIM means something."""
    rng = np.random.default_rng(seed)

    def plane(h, w):
        coarse = rng.integers(0, 256, (h // 8 + 2, w // 8 + 2)).astype(np.float32)
        return np.kron(coarse, np.ones((8, 8)))[:h, :w].astype(np.uint8)

    chroma = (height + 1) // 2, (width + 1) // 2
    return Planes(plane(height, width), plane(*chroma), plane(*chroma))


def noisy(planes: Planes, amount: float, seed=1) -> Planes:
    rng = np.random.default_rng(seed)
    return Planes(
        *(np.clip(p + rng.normal(0, amount, p.shape), 0, 255).astype(np.uint8) for p in planes)
    )


def test_psnr_of_a_known_error():
    a = np.full((8, 8), 100, np.uint8)
    assert psnr(a, a + 5) == pytest.approx(10 * np.log10(255**2 / 25))
    assert psnr(a + 5, a) == psnr(a, a + 5)
    assert psnr(np.zeros_like(a), a * 0 + 255) == 0


def test_identical_planes_reach_the_caps():
    planes = picture()
    scores = frame_scores(planes, planes)
    assert scores["psnr"] == scores["psnr_u"] == PSNR_CAP_DB
    assert scores["ms_ssim"] == pytest.approx(1, abs=1e-6)
    assert ms_ssim_db(1.0) == PSNR_CAP_DB
    assert ms_ssim_db(0.99) == pytest.approx(20)


def test_combined_score_weighs_luma_six_times():
    planes = picture()
    other = Planes(planes.y ^ 1, planes.u ^ 2, planes.v ^ 4)
    scores = frame_scores(planes, other)
    y, u, v = (10 * np.log10(255**2 / error**2) for error in (1, 2, 4))
    assert scores["psnr"] == pytest.approx((6 * y + u + v) / 8)
    parts = [scores[f"ms_ssim_{plane}"] for plane in "yuv"]
    assert scores["ms_ssim"] == pytest.approx(np.dot((6, 1, 1), parts) / 8)


def test_clip_score_is_the_mean_of_frame_scores():
    source = [picture(seed=i) for i in range(3)]
    decoded = [noisy(planes, 3 * i + 1) for i, planes in enumerate(source)]
    scores = clip_scores(iter(source), iter(decoded))
    rows = [frame_scores(a, b) for a, b in zip(source, decoded, strict=True)]
    assert scores["frames"] == 3
    assert scores["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
    assert scores["frame_psnr"] == [row["psnr"] for row in rows]
    assert scores["frame_psnr"][0] > scores["frame_psnr"][1] > scores["frame_psnr"][2]


def test_clips_that_do_not_match_are_refused():
    one, two = [picture()], [picture(), picture()]
    with pytest.raises(NvcError, match="decoded video ends after 1"):
        clip_scores(two, one)
    with pytest.raises(NvcError, match="source ends after 1"):
        clip_scores(one, two)
    with pytest.raises(NvcError, match="no frames"):
        clip_scores([], [])
    with pytest.raises(NvcError, match="different sizes"):
        clip_scores(one, [picture(50, 64)])


def test_ssim_agrees_with_dm_pix():
    dm_pix = pytest.importorskip("dm_pix", reason="dm-pix is a development dependency")
    for seed, amount in enumerate((1, 10, 60)):
        a = picture(40, 56, seed).y
        b = noisy(Planes(a, a, a), amount).y
        expected = dm_pix.ssim(
            a[..., None] / np.float32(255), b[..., None] / np.float32(255), max_val=1.0
        )
        assert ssim(a, b)[0] == pytest.approx(float(expected), abs=2e-4)


def test_ms_ssim_against_the_formula_in_double_precision():
    a = picture(200, 180, 3).y
    b = noisy(Planes(a, a, a), 12).y
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    weights /= weights.sum()
    expected, x, y = 1.0, a.astype(float), b.astype(float)
    for scale, weight in enumerate(weights):
        full, contrast = slow_ssim(x, y)
        expected *= (full if scale == 4 else contrast) ** weight
        x, y = (
            p[: p.shape[0] // 2 * 2, : p.shape[1] // 2 * 2]
            .reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2)
            .mean((1, 3))
            for p in (x, y)
        )
    assert ms_ssim(a, b) == pytest.approx(expected, abs=1e-5)


def slow_ssim(x, y):
    """Full 2-D window, float64."""
    place = np.arange(11) - 5
    g = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(g, g) / g.sum() ** 2

    def mean(p):
        return np.einsum(
            "ijkl,kl->ij", np.lib.stride_tricks.sliding_window_view(p, (11, 11)), window
        )

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    contrast = (2 * cov + c2) / (vx + vy + c2)
    return ((2 * mx * my + c1) / (mx**2 + my**2 + c1) * contrast).mean(), contrast.mean()


def test_number_of_scales_follows_the_smaller_side():
    sides = {1080: 5, 176: 5, 175: 4, 88: 4, 87: 3, 44: 3, 43: 2, 22: 2, 21: 1, 4: 1}
    assert {side: scale_count((side, 2000)) for side in sides} == sides
    assert scale_count((2000, 144)) == 4


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_ms_ssim_of_any_size_is_a_ratio(height, width, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (2, height, width), np.uint8)
    assert 0 <= ms_ssim(a, b) <= 1
    assert ms_ssim(a, a) == pytest.approx(1, abs=1e-6)


def test_recovery_is_counted_from_the_cut_to_within_one_decibel():
    values = [40.0] * 4 + [20.0, 30.0, 34.5, 36.0, 36.0, 36.0] + [50.0]
    frames, mean = recovery_frames(values, cut=4, end=10)
    assert mean == pytest.approx(np.mean(values[4:10]))
    assert frames == 2
    assert recovery_frames([30.0, 30.0], 0, 2)[0] == 0
