"""Intra nano: every picture on its own, about 10 kMAC per pixel each way, trained on a CPU.

  python train.py --config=configs/intra_nano.py --workdir=runs/intra_nano \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/intra_nano --config=configs/intra_nano.py OUT.safetensors

The model card of the released weights (nvc_jax/weights/intra-nano.md) says what this reaches.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes
from nvc_jax.training.recipes import stage

# Rates of rounded symbols under integer scales, and nothing but the network behind them learns.
SCALE_HEAD = dict(exact=True, trainable=("scale_head",), noise=False)


def get_config():
    c = recipes.on_a_cpu()
    c.model = ConfigDict(dict(name="intra", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.6)
    c.stages = (
        stage(steps=4_000, units=1, walk=1, batch=8, crop=128, lr=1e-3, end_lr=1e-5),
        # A warm restart: the shipped weights went on from there.
        stage(steps=6_000, units=1, walk=1, batch=8, crop=128, lr=8e-4, end_lr=1e-5),
        # The exact mode.
        stage(
            steps=6_000, units=1, walk=1, batch=8, crop=128, lr=3e-3, end_lr=2e-5,
            **SCALE_HEAD, rate_balance=0.8,
        ),
        stage(
            steps=3_000, units=1, walk=1, batch=8, crop=128, lr=5e-4, end_lr=1e-5,
            **SCALE_HEAD, rate_balance=0.45,
        ),
        stage(
            steps=4_000, units=1, walk=1, batch=8, crop=128, lr=1e-3, end_lr=1e-5,
            **SCALE_HEAD, rate_balance=0.6,
        ),
    )  # fmt: skip
    return c
