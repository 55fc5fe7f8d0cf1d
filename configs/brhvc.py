"""BRHVC for GPUs and TPU pods, at full size; its smaller relative `light` as an argument.

  python train.py --config=configs/brhvc.py --workdir=runs/brhvc --config.data_root=DATA_DIR \
      --config.init_from=INTRA.safetensors
  python train.py --config=configs/brhvc.py:light --workdir=runs/light ...
  python train.py --config=configs/brhvc.py:full,8 ...    # larger batches, for up to 64 devices
  nvc release --workdir=runs/brhvc --config=configs/brhvc.py OUT.safetensors

INTRA is the intra codec, which does not learn: for `full` the published one as `nvc import
brhvc-intra` writes it, for `light` what `configs/intra.py:dev` trains. DATA_DIR holds the data sets
that configs/ui2c.py names.

The paper (arXiv 2511.08938) does not publish its training. The order - motion first, few layers
before many, from septuplets to long clips - is what its relatives do; everything else is our
choice. An epoch is as many steps as Vimeo-90k's 64,612 training clips make.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes
from nvc_jax.training.stages import on_more_devices

SEPTUPLETS = dict(sets=(dict(path="vimeo90k_septuplet/default/1.0.0"),))
LONG = dict(sets=(dict(path="video_folder/long/1.0.0"),))
CLIPS = 64_612


def stage(epochs, units, spans, batch, crop, lr, end_lr=None, **special):
    """units: B-frames of one path per sample. spans: distances of the anchors.

    special: see `nvc_jax.training.stages.Stage`.
    """
    fields = dict(
        steps=epochs * (CLIPS // batch), units=units, spans=spans, batch=batch, crop=crop,
        lr=lr, end_lr=end_lr or lr, schedule="cosine" if end_lr else "constant",
    )  # fmt: skip
    return ConfigDict(fields | special)


def get_config(argument="full"):
    size, _, times = argument.partition(",")
    c = recipes.on_accelerators()
    c.model = ConfigDict(dict(name="brhvc", size=size, dtype="bfloat16"))
    c.data = ConfigDict(SEPTUPLETS)
    c.init_from = "intra.safetensors"
    long = dict(data=LONG, remat=True)
    c.stages = (
        # Flows by themselves, then everything, for a while with an eye on motion.
        stage(5, 1, (2, 4, 6), batch=8, crop=256, lr=1e-4, motion_only=True),
        stage(30, 1, (2, 3, 4, 6), batch=8, crop=256, lr=1e-4, flow_loss=0.1),
        # Two layers: B-frames between B-frames.
        stage(20, 2, (4, 5, 6), batch=8, crop=256, lr=5e-5),
        # Long clips, up to whole paths of groups of 32; short and odd groups mixed in.
        stage(8, 3, (8, 12, 16, 32), batch=8, crop=256, lr=5e-5, **long),
        stage(12, 5, (32,), batch=8, crop=256, lr=5e-5, end_lr=1e-5, **long),
        stage(6, 5, (32, 48, 64), batch=8, crop=384, lr=1e-5, end_lr=1e-6, **long),
    )
    c.stages = tuple(on_more_devices(stage, int(times or 1)) for stage in c.stages)
    return c
