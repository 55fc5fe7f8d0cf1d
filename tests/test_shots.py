"""Shot boundaries."""

import numpy as np

from nvc_jax.shots import scene_cuts, with_cuts


def test_scene_cuts():
    dark, bright = np.full((16, 16), 20, np.uint8), np.full((16, 16), 200, np.uint8)
    assert scene_cuts([dark] * 4 + [bright] * 4 + [dark] * 2) == [4, 8]
    assert scene_cuts([dark, bright, bright]) == [1]
    fade = [np.full((16, 16), 20 + 20 * i, np.uint8) for i in range(6)]
    assert scene_cuts(fade) == []
    assert scene_cuts([dark] * 3 + [bright] + [dark] * 3) == []  # a flash
    assert scene_cuts([dark]) == scene_cuts([]) == []


def test_pictures_come_through_in_order_with_their_marks():
    dark, bright = np.full((16, 16), 20, np.uint8), np.full((16, 16), 200, np.uint8)
    pictures = [(n, bright if 3 <= n < 7 else dark) for n in range(9)]
    marked = list(with_cuts(pictures, lambda picture: picture[1]))
    assert [picture for picture, _ in marked] == pictures
    assert [n for (n, _), cut in marked if cut] == [3, 7]


def test_motion_is_no_cut():
    texture = np.random.default_rng(0).integers(0, 255, (64, 256)).astype(np.uint8)
    assert scene_cuts([texture[:, 9 * n : 9 * n + 96] for n in range(12)]) == []
