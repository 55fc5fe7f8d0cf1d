"""UI2C nano under short trainings of equal length, one change at a time; docs/weights.md compares.

  python train.py --config=configs/ui2c_ablations.py:no_mixed --workdir=runs/no_mixed \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/no_mixed --config=configs/ui2c_ablations.py:no_mixed OUT.safetensors

The argument is one of `CHANGES`; without one it is the base.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from nvc_jax.models import ui2c
from nvc_jax.training import recipes

# Name -> (changes of the size, changes of the stages). Sizes cost what the base does, within 6 %:
# 8 kMAC per pixel each way, without the exact mode's network.
CHANGES = {
    "base": ({}, {}),
    # Every clip starts without a reference, as files do.
    "no_mixed": ({}, dict(references=dict(blank=1.0))),
    "one_frame": (
        dict(frames=1, width=104, y=96, recon=112, prior=112, temporal=96), dict(units=4),
    ),
    "wide": (dict(width=160, encoder=1, decoder=1, recon=104), {}),
    "deep": (dict(width=132, encoder=3, decoder=3), {}),
    "entropy": (dict(width=128, prior=208, spatial=2, fusion=3), {}),
    # More of a picture fits through, fewer layers think about it.
    "channels": (
        dict(
            width=176, y=288, extractor=(1, 1), encoder=1, decoder=1, recon=112, recon_blocks=2,
            prior=112, temporal=64,
        ),
        {},
    ),
}  # fmt: skip


def get_config(name="base"):
    size, special = CHANGES[name]
    c = recipes.on_a_cpu()
    size = asdict(ui2c.SIZES["nano"]) | dict(scale_head=0) | size
    c.model = ConfigDict(dict(name="ui2c", size=size, dtype="float32"))
    c.data = recipes.own_clips(image_share=0.25)
    common = dict(units=2, batch=4, crop=128) | special
    c.stages = (
        ConfigDict(dict(steps=1_500, lr=1e-3, end_lr=6e-4) | common),
        ConfigDict(dict(steps=3_500, lr=6e-4, end_lr=2e-5, walk=5) | common),
    )
    return c
