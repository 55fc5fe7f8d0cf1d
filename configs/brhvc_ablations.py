"""BRHVC nano under short trainings of equal length, one change at a time.

  python train.py --config=configs/brhvc_ablations.py:no_converge --workdir=runs/no_converge \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/no_converge --config=configs/brhvc_ablations.py:no_converge \
      OUT.safetensors

The argument is one of `CHANGES`; without one it is the base.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from nvc_jax.models import registry, with_intra
from nvc_jax.training import recipes

# Name -> changes of the B-frame codec's size.
CHANGES = {
    "base": {},
    # Bi-directional Motion Converge: motion from one scale instead of three.
    "no_converge": dict(converge=False),
    # Bi-directional Contextual Fusion: contexts are joined without predicted weights.
    "no_weights": dict(weigh=False),
    # Motion looked for at half the size of the networks' patches.
    "coarse_motion": dict(flow_halvings=1),
}
# What changes do something to. By all of them, also by the base, so that none has a lead.
LEARNT_ANEW = ("motion_encoder", "motion_decoder", "encoder_fusion", "decoder_fusion")


def get_config(name="base"):
    nano = with_intra.BRHVC_SIZES["nano"]
    nano = replace(nano, inter=replace(nano.inter, **CHANGES[name]))
    c = recipes.on_a_cpu()
    size = registry.size_as_dict(with_intra.WithIntra(nano))
    c.model = ConfigDict(dict(name="brhvc", size=size, dtype="float32"))
    c.data = recipes.own_clips(image_share=0.1)
    # The rest starts as it is with everything in place, so that little time tells what is missing.
    networks = registry.network_names(registry.build("brhvc", "nano"))
    c.init_from = "brhvc-nano"
    c.init_only = tuple(name for name in networks if name not in LEARNT_ANEW)
    stage = dict(steps=1_000, units=2, spans=(4, 8, 16, 32), batch=2, crop=128)
    rates = dict(optimizer="muon", lr=1e-3, end_lr=1e-5, flow_loss=0.2, lr_scale=dict(flow=0.0))
    c.stages = (ConfigDict(stage | rates),)
    return c
