"""UI2C nano: two frames at once, about 10 kMAC per pixel each way, trained on a CPU.

  python train.py --config=configs/ui2c_nano.py --workdir=runs/ui2c_nano \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/ui2c_nano --config=configs/ui2c_nano.py OUT.safetensors

The model card of the released weights (nvc_jax/weights/ui2c-nano.md) says what this reaches.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes
from nvc_jax.training.recipes import stage

# Rates come from integer scales, and nothing but the network behind them learns. It does so best
# from rounded symbols: noise hides how small the scales of low rates are.
SCALE_HEAD = dict(exact=True, trainable=("scale_head",))
# All networks learn, under integer scales and under float ones, so that every mode stays good.
BOTH_SCALES = dict(exact=True, float_share=0.5)


def get_config():
    c = recipes.on_a_cpu()
    c.model = ConfigDict(dict(name="ui2c", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.25)
    c.stages = (
        # Intra and short-range prediction first, then long walks against drift.
        stage(steps=7_000, units=2, walk=1, batch=4, crop=128, lr=1e-3, end_lr=6e-4),
        stage(steps=8_000, units=2, walk=8, batch=4, crop=128, lr=6e-4, end_lr=1e-4),
        stage(steps=2_000, units=3, walk=5, batch=4, crop=128, lr=1e-4, end_lr=1e-5),
        # A warm restart of the two stages above: the shipped weights went on from there.
        stage(steps=16_000, units=2, walk=8, batch=4, crop=128, lr=5e-4, end_lr=1e-4),
        stage(steps=2_500, units=3, walk=5, batch=4, crop=128, lr=1e-4, end_lr=1e-5),
        # The exact mode: the integer scales alone, everything together, the scales alone again.
        stage(steps=5_000, units=2, walk=8, batch=4, crop=128, lr=3e-3, end_lr=5e-4, **SCALE_HEAD),
        stage(steps=6_000, units=2, walk=8, batch=4, crop=128, lr=3e-4, end_lr=1e-5, **BOTH_SCALES),
        stage(
            steps=8_000, units=2, walk=8, batch=4, crop=128, lr=1.5e-3, end_lr=2e-5,
            **SCALE_HEAD, noise=False, rate_balance=0.8,
        ),
        stage(
            steps=8_000, units=2, walk=8, batch=4, crop=128, lr=1e-3, end_lr=1e-5,
            **SCALE_HEAD, noise=False, rate_balance=1.0,
        ),
        stage(
            steps=6_000, units=2, walk=8, batch=4, crop=128, lr=1e-3, end_lr=1e-5,
            **SCALE_HEAD, noise=False, rate_balance=0.9,
        ),
        # Everything once more, the integer scales now always on rounded symbols; at last on clips
        # that start without a reference, as they do in use.
        stage(
            steps=6_000, units=2, walk=8, batch=4, crop=128, lr=2e-4, end_lr=2e-6,
            exact=True, detached=True, rate_balance=0.7,
        ),
        stage(
            steps=8_000, units=4, walk=5, batch=3, crop=128, lr=1e-3, end_lr=1e-5,
            **SCALE_HEAD, noise=False, rate_balance=0.9,
        ),
        stage(
            steps=9_000, units=2, walk=4, batch=4, crop=128, lr=5e-4, end_lr=1e-6,
            **SCALE_HEAD, noise=False, rate_balance=0.9, references={"blank": 1.0},
        ),
    )  # fmt: skip
    return c
