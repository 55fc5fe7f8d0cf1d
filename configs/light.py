"""Light at full size, for GPUs and TPU pods: its P-frames; with searched motion as an argument.

  python train.py --config=configs/intra.py:light --workdir=runs/intra_light \
      --config.data_root=DATA_DIR
  nvc release --workdir=runs/intra_light --config=configs/intra.py:light intra.safetensors
  python train.py --config=configs/light.py --workdir=runs/light --config.data_root=DATA_DIR
  python train.py --config=configs/light.py:full_searched --workdir=runs/light_searched ...
  python train.py --config=configs/light.py:full,8 ...    # larger batches, for up to 64 devices
  nvc release --workdir=runs/light --config=configs/light.py OUT.safetensors

The intra codec comes first and then stays as it is; `--config.init_from` names it. DATA_DIR holds
`vimeo90k_septuplet/default`, made by `python -m nvc_jax.data.build`.

Tian et al. (ACM MM 2023, arXiv 2309.11276) train on Vimeo-90k in crops of 256x256, I- and
P-frames on their own, then together in groups of 7 frames, one model for each of four lambdas.
Here one model learns all lambdas, the last stages code the septuplets' six P-frames after a frame
that the intra codec has coded, and lengths and learning rates are our choice. Motion goes first,
as with DCVC-HEM (arXiv 2207.05894), and the exact mode's integer scales come last. An epoch is as
many steps as the 64,612 training clips make. """

from ml_collections import ConfigDict

from nvc_jax.training import recipes
from nvc_jax.training.recipes import SEPTUPLETS, epochs

# References as they are, and as the intra codec leaves them.
BOTH = dict(references=dict(true=0.5, coded=0.5))
HEADS = dict(exact=True, noise=False, rate_balance=0.9)


def get_config(argument="full"):
    size, times = recipes.sized(argument)
    flow = size != "full_searched"
    c = recipes.on_accelerators()
    c.model = ConfigDict(dict(name="light", size=size, dtype="bfloat16"))
    c.data = ConfigDict(dict(sets=(SEPTUPLETS,)))
    c.init_from = "intra.safetensors"
    motion = (
        # Flows by themselves, then everything, for a while with an eye on motion.
        epochs(5, units=1, batch=8, crop=256, lr=1e-4, motion_only=True),
        epochs(10, units=1, batch=8, crop=256, lr=1e-4, flow_loss=0.2, **BOTH),
    )
    heads = ("motion_scale_head", "scale_head") if flow else ("scale_head",)
    c.stages = (
        *(motion if flow else ()),
        # P-frames one by one: first with references as they come, then in a row.
        epochs(10, units=1, batch=8, crop=256, lr=1e-4, **BOTH),
        epochs(15, units=1, walk=6, batch=8, crop=256, lr=1e-4),
        # Groups of 7 frames.
        epochs(10, units=3, walk=2, batch=8, crop=256, lr=5e-5),
        epochs(15, units=6, batch=8, crop=256, lr=5e-5, end_lr=1e-6, remat=True),
        # The exact mode.
        epochs(
            2, units=1, walk=6, batch=8, crop=256, lr=3e-3, end_lr=1e-5, trainable=heads, **HEADS
        ),
    )
    c.stages = recipes.on_more_devices(c.stages, times)
    return c
