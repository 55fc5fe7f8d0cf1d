"""BRHVC for GPUs and TPU pods, at full size; its smaller relative `small` as an argument.

  python train.py --config=configs/brhvc.py --workdir=runs/brhvc --config.data_root=DATA_DIR \
      --config.init_from=INTRA.safetensors
  python train.py --config=configs/brhvc.py:small --workdir=runs/brhvc_small ...
  python train.py --config=configs/brhvc.py:full,8 ...    # larger batches, for up to 64 devices
  nvc release --workdir=runs/brhvc --config=configs/brhvc.py OUT.safetensors

INTRA is the intra codec, which does not learn: for `full` the published one as `nvc import
brhvc-intra` writes it, for `small` what `configs/intra.py:dev` trains. DATA_DIR holds the data sets
that configs/ui2c.py names.

The paper (arXiv 2511.08938) does not publish its training. The order - motion first, few layers
before many, from septuplets to long clips - is what its relatives do; everything else is our
choice. An epoch is as many steps as Vimeo-90k's 64,612 training clips make.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes
from nvc_jax.training.recipes import LONG, SEPTUPLETS, epochs


def get_config(argument="full"):
    size, times = recipes.sized(argument)
    c = recipes.on_accelerators()
    c.model = ConfigDict(dict(name="brhvc", size=size, dtype="bfloat16"))
    c.data = ConfigDict(dict(sets=(SEPTUPLETS,)))
    c.init_from = "intra.safetensors"
    long = dict(data=dict(sets=(LONG,)), remat=True)
    c.stages = (
        # Flows by themselves, then everything, for a while with an eye on motion.
        epochs(5, units=1, spans=(2, 4, 6), batch=8, crop=256, lr=1e-4, motion_only=True),
        epochs(30, units=1, spans=(2, 3, 4, 6), batch=8, crop=256, lr=1e-4, flow_loss=0.1),
        # Two layers: B-frames between B-frames.
        epochs(20, units=2, spans=(4, 5, 6), batch=8, crop=256, lr=5e-5),
        # Long clips, up to whole paths of groups of 32; short and odd groups mixed in.
        epochs(8, units=3, spans=(8, 12, 16, 32), batch=8, crop=256, lr=5e-5, **long),
        epochs(12, units=5, spans=(32,), batch=8, crop=256, lr=5e-5, end_lr=1e-5, **long),
        epochs(6, units=5, spans=(32, 48, 64), batch=8, crop=384, lr=1e-5, end_lr=1e-6, **long),
    )
    c.stages = recipes.on_more_devices(c.stages, times)
    return c
