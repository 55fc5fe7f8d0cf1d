"""Encoder and decoder give the same pictures: real clips, every size of picture, all qualities.

Also: files are as large as the rate estimate says.
"""

from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from nvc_jax import bitstream, codec, schedule, unit_program, video
from nvc_jax.entropy import calibration
from nvc_jax.entropy.bottleneck import Estimate
from nvc_jax.entropy.calibration import CALIBRATED, EXACT
from nvc_jax.models import registry, released

EVAL = Path(__file__).parents[1].parent / "shared/data/eval"
# One of every size.
CLIPS = [
    path
    for name in ("akiyo_cif", "basketballpass_240", "city_4cif", "crowd_360", "sintel_ambush_272")
    if (path := EVAL / f"{name}.mkv").exists()
]
QPS = (0, 21, 42, 63)
FRAMES = 5  # two pairs and an odd one

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The shipped models, and dev with random weights: it is not trained, but it has to agree."""
    module = registry.build("ui2c", "dev")
    params = registry.init(module, jax.random.key(0))
    path = tmp_path_factory.mktemp("models") / "dev.safetensors"
    released.save(path, *released.freeze("dev", "ui2c", module, params))
    return [released.load(p) for p in (*released.shipped(), path)]


def estimated_bits(unit_codec, picture, refs, qps, unit):
    """The rate that training would report for these pictures and references."""

    @jax.jit
    def estimate(variables, planes, refs, qp):
        bottleneck = Estimate(exact=unit_codec.entropy_mode == EXACT)
        frames = unit_program.planes_to_frames(planes, unit_codec.height, unit_codec.width)
        unit_codec.model.module.apply(variables, frames, refs, qp, bottleneck)
        return bottleneck.bits

    planes = tuple(np.stack(p) for p in zip(*picture, strict=True))
    refs = unit_program._completed(unit_codec, refs, unit)
    bits = estimate(unit_codec.model.variables, planes, refs, np.array([qps], np.int32))
    return float(bits["y"].sum() + bits["z"].sum())


@pytest.mark.skipif(not CLIPS, reason="the evaluation clips are not on this machine")
@pytest.mark.parametrize("clip", CLIPS, ids=lambda p: p.stem)
def test_decoder_repeats_the_encoder_on_real_clips(models, clip, tmp_path):
    info, pictures = video.open_video(clip)
    pictures = list(islice(pictures, FRAMES))
    for model in models:
        unit_codec = unit_program.prepare(model, info.width, info.height)
        order = codec.schedule_for(model)
        for qp in QPS:
            path = tmp_path / "clip.nvc"
            recons = {}  # by frame: the order of coding is not that of display
            with bitstream.write_stream(path, codec.make_header(unit_codec, info, order)) as out:
                for unit in codec.encode(unit_codec, pictures, qp, order, render=True):
                    out.write(unit.packet)
                    recons |= dict(zip(unit.packet.frames, unit.recons, strict=True))
            with bitstream.open_stream(path) as stream:
                decoded = [p for _, ps in codec.decode(unit_codec, stream) for p in ps]
            assert len(decoded) == len(recons) == FRAMES
            for frame, ours in enumerate(decoded):
                for a, b in zip(ours, recons[frame], strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{model.name} qp {qp}")


@pytest.mark.skipif(not CLIPS, reason="the evaluation clips are not on this machine")
@pytest.mark.parametrize(
    "name, order, length, large",
    [("ui2c-nano", schedule.two_frame(), 4, 2), ("brhvc-nano", schedule.hierarchical(2), 3, 3)],
)
def test_files_are_as_large_as_the_estimate_says(name, order, length, large):
    """Within 1 % per unit for units above 10 kB; headers and calibrated elements come on top.

    Of symbols that follow a Gaussian and, in B-frames, a Laplace distribution.
    """
    model = released.load(name)
    info, pictures = video.open_video(next(c for c in CLIPS if c.stem.startswith("city")))
    pictures = list(islice(pictures, length))
    unit_codec = unit_program.prepare(model, info.width, info.height)
    slots, counted = {}, 0
    for number, unit in enumerate(schedule.plan(order, length)):
        own, refs = [pictures[frame] for frame in unit.frames], codec.references(unit, slots)
        qps = tuple(60 + offset for offset in unit.qp_offset)
        payload, coded = unit_program.encode_unit(unit_codec, own, refs, qps, False, unit)
        estimate = estimated_bits(unit_codec, own, refs, qps, unit) / 8
        if unit_codec.entropy_mode == CALIBRATED:
            listed = calibration.write_flags(coded.flags)
            estimate += len(bitstream.varint(len(listed))) + len(listed)
        if len(payload) > 10_000:
            counted += 1
            assert abs(len(payload) - estimate) <= 0.01 * estimate, (len(payload), estimate)
        slots[number] = coded.refs
    assert counted == large
