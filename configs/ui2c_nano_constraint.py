"""The piecewise Gaussian constraint of Tian et al. (arXiv 2309.11276), on the released UI2C nano.

Everything is frozen but the entropy model, which learns to keep its scales away from the limits of
their levels: fewer elements have to be listed in calibrated mode. docs/cross_platform.md says what
that saves and what it costs.

  python train.py --config=configs/ui2c_nano_constraint.py --workdir=runs/constraint \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/constraint --config=configs/ui2c_nano_constraint.py OUT.safetensors
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes

ENTROPY_MODEL = (
    "hyper_encoder", "hyper_decoder", "temporal_prior_encoder", "prior_fusion", "spatial_prior",
    "z_prior",
)  # fmt: skip


def get_config():
    c = recipes.on_a_cpu()
    c.model = ConfigDict(dict(name="ui2c", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.25)
    c.init_from = "ui2c-nano"
    c.transform_start = False
    # Per pixel, and with a density as narrow as the band in which it acts; the printed values,
    # delta 1 and beta 1 on the sum over all elements, are nearly flat and depend on picture size.
    penalty = ConfigDict(dict(variant="gaussian", eta=0.3, delta=0.1, beta=3e-2))
    c.stages = (
        ConfigDict(
            dict(
                steps=2_000, units=2, walk=8, batch=4, crop=128, lr=1e-4, end_lr=1e-6,
                trainable=ENTROPY_MODEL, penalty=penalty,
            )
        ),
    )  # fmt: skip
    return c
