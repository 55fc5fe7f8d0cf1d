"""Uni-LVC nano under short trainings of equal length, one change at a time, from one intra codec.

  python train.py --config=configs/uni_lvc_ablations.py:linear_only --workdir=runs/linear_only \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS --config.init_from=S0.safetensors
  nvc release --workdir=runs/linear_only --config=configs/uni_lvc_ablations.py:linear_only \
      OUT.safetensors

The argument is one of `CHANGES`; without one it is the base. S0 is what the first stage of
`configs/uni_lvc_nano.py` left, by `nvc release --stage 0`. What listens to references learns first,
then everything, both in low delay.
"""

from dataclasses import asdict, replace

from ml_collections import ConfigDict

from nvc_jax.models import uni_lvc
from nvc_jax.training import recipes

# Name -> (changes of the size, changes of the stage in which everything learns).
CHANGES = {
    "base": ({}, {}),
    "near_only": (dict(linear=False), {}),
    "linear_only": (dict(near=False), {}),
    "no_gate": (dict(gate=False), {}),
    "no_sites": (dict(near=False, linear=False), {}),
    "no_takeover": (dict(takeover=False), {}),
    # No pictures on their own beside low delay, and nobody who remembers how they were coded.
    "no_replay": ({}, dict(orders=dict(ld=1.0), teacher={})),
}


def get_config(name="base"):
    size, changes = CHANGES[name]
    c = recipes.on_a_cpu()
    c.optimizer = "muon"
    nano = replace(uni_lvc.SIZES["nano"], scale_head=0, **size)
    c.model = ConfigDict(dict(name="uni_lvc", size=asdict(nano), dtype="float32"))
    c.data = recipes.own_clips(image_share=0.2)
    c.init_from, c.init_only = "S0.safetensors", uni_lvc.BACKBONE
    common = dict(units=4, batch=2, crop=128, spans=(12,))
    # What listens to references, as far as this size has it.
    listening = tuple(n for n in uni_lvc.LISTENING if n != "takeover" or nano.takeover)
    alone = dict(steps=600, lr=3e-3, end_lr=1e-3, trainable=listening, orders=dict(ld=1.0))
    everything = dict(
        steps=600, lr=2e-3, end_lr=5e-5, lr_scale=dict.fromkeys(uni_lvc.BACKBONE, 0.1),
        orders=dict(ai=0.25, ld=0.75), teacher=dict(weights="previous", recon=0.1),
    )  # fmt: skip
    c.stages = tuple(ConfigDict(common | s) for s in (alone, everything | changes))
    return c
