"""BRHVC nano: hierarchical B-frames on a CPU, 77 kMAC per pixel to encode, 54 to decode.

  python train.py --config=configs/brhvc_nano.py --workdir=runs/brhvc_nano \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/brhvc_nano --config=configs/brhvc_nano.py OUT.safetensors

The intra codec is that of intra-nano and does not learn.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes


def stage(steps, units, spans, batch, crop, lr, end_lr, **special):
    """units: B-frames of one path per sample. spans: distances of the anchors.

    special: see `nvc_jax.training.stages.Stage`.
    """
    common = dict(steps=steps, units=units, spans=spans, batch=batch, crop=crop)
    return ConfigDict(common | dict(lr=lr, end_lr=end_lr) | special)


# Flows that have learnt alone are better than those that rates and distortions lead to, and unlearn
# in large steps.
MUON = dict(optimizer="muon", flow_loss=0.2, lr_scale=dict(flow=0.1))


def get_config():
    c = recipes.on_a_cpu()
    c.model = ConfigDict(dict(name="brhvc", size="nano", dtype="float32"))
    c.data = ConfigDict(dict(folder="../shared/data/train", image_share=0.1))
    c.init_from = "intra-nano"
    c.stages = (
        # Motion by itself, which is quick. Without, it hardly gets started.
        stage(
            3_000, 1, (2, 4, 8, 16, 32), batch=4, crop=128, lr=2e-3, end_lr=1e-5, motion_only="flow"
        ),
        # Only with three units are there frames between two B-frames.
        stage(9_000, 3, (8, 16, 32), batch=2, crop=128, lr=7e-4, end_lr=1e-5, **MUON),
    )
    return c
