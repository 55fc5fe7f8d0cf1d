"""BRHVC nano: hierarchical B-frames on a CPU, 75 kMAC per pixel to encode, 54 to decode.

  python train.py --config=configs/brhvc_nano.py --workdir=runs/brhvc_nano \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/brhvc_nano --config=configs/brhvc_nano.py OUT.safetensors

The intra codec is that of intra-nano and does not learn. The released weights came by more and
shorter stages, see docs/weights.md; their model card (nvc_jax/weights/brhvc-nano.md) says what they
reach.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes


def stage(steps, units, spans, lr, end_lr, **special):
    """units: B-frames of one path per sample. spans: distances of the anchors.

    special: see `nvc_jax.training.stages.Stage`.
    """
    common = dict(steps=steps, units=units, spans=spans, lr=lr, end_lr=end_lr)
    return ConfigDict(common | special)


LONG = (8, 16, 32)  # paths of three units: only with these are there frames between two B-frames
# Flows that have learnt alone stay as they are: rates and distortions only make them worse.
MUON = dict(optimizer="muon", lr_scale=dict(flow=0.0), batch=2, crop=128)


def get_config():
    c = recipes.on_a_cpu()
    c.model = ConfigDict(dict(name="brhvc", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.1)
    c.init_from = "intra-nano"
    c.stages = (
        # Motion by itself, which is quick. Without, it hardly gets started.
        stage(3_000, 1, (2, 4, 8, 16, 32), 2e-3, 1e-5, batch=4, crop=128, motion_only=True),
        stage(9_000, 3, LONG, 7e-4, 1e-5, flow_loss=0.2, **MUON),
    )
    return c
