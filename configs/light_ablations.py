"""Light nano under short trainings of equal length, one change at a time.

  python train.py --config=configs/light_ablations.py:soap --workdir=runs/soap \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/soap --config=configs/light_ablations.py:soap OUT.safetensors

The argument is one of `CHANGES`; without one it is the base.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes
from nvc_jax.training.recipes import stage

# Name -> optimiser, learning rate, share of synthetic clips.
CHANGES = {
    "base": ("muon", 2e-3, 0.0),
    "adamw": ("adamw", 1e-3, 0.0),
    "soap": ("soap", 2e-3, 0.0),
    "synthetic": ("muon", 2e-3, 0.33),
}


def get_config(name="base"):
    optimizer, lr, synthetic_share = CHANGES[name]
    c = recipes.on_a_cpu()
    c.transform_start = False
    c.optimizer = optimizer
    c.average_decay = 0.99
    c.warmup_steps = 100
    c.model = ConfigDict(dict(name="light", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.1, synthetic_share=synthetic_share)
    # As in light_nano.py.
    fixed = dict.fromkeys(("transform", "inverse", "q_step", "q_dead_zone"), 0.0)
    c.stages = (
        stage(
            steps=1_500, units=1, walk=4, batch=4, crop=128, lr=lr, end_lr=lr / 20,
            references={"blank": 1.0}, rounded=True, exact=True, float_share=0.2,
            lr_scale=fixed | dict(z_prior=5.0),
        ),
    )  # fmt: skip
    return c
