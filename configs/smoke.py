"""The whole training system in about a minute on two cores: a tiny UI2C, two stages, 40 steps.

  python train.py --config=configs/smoke.py --workdir=runs/smoke
  python train.py --config=configs/smoke.py --workdir=runs/smoke --config.data.folder=DIR

Without a folder it trains on clips that it makes up. A checkpoint every 10 steps; interrupt it and
run the same command again to see it go on. What it learns is of no use.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes


def get_config():
    c = recipes.on_a_cpu()
    tiny = dict(
        width=16, y=16, z=8, recon=16, prior=16, temporal=16, extractor=(1, 1), encoder=1,
        decoder=1, recon_blocks=1, fusion=1, spatial=1, subpixel=1, form="uf2", latent_gain=True,
    )  # fmt: skip
    c.model = ConfigDict(dict(name="ui2c", size=tiny, dtype="float32"))
    c.data = ConfigDict(dict(folder="", image_share=0.25))
    c.transform_start = False
    common = dict(batch=4, crop=64, units=1)
    c.stages = (
        ConfigDict(common | dict(steps=20, lr=2e-3, end_lr=1e-3)),
        ConfigDict(common | dict(steps=20, lr=1e-3, end_lr=1e-4, references=dict(blank=1.0))),
    )
    c.warmup_steps = 5
    c.average_decay = 0.99
    c.max_skipped_in_row = 10
    c.log_every = 1
    c.sample_every = 20
    c.checkpoint_every_steps = 10
    return c
