"""Light nano: P-frames with searched motion, at most 10 kMAC per pixel to decode, trained on a CPU.

  python train.py --config=configs/light_nano.py --workdir=runs/light_nano \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/light_nano --config=configs/light_nano.py OUT.safetensors

Training starts from a hybrid codec that works (cosine transform, searched motion), so there is no
stage that finds transforms first. The model card of the released weights
(nvc_jax/weights/light-nano.md) says what this reaches.
"""

from ml_collections import ConfigDict

from nvc_jax.training import recipes
from nvc_jax.training.recipes import stage

# Clips begin with a frame that has no reference, as they do in use, and go on from what the codec
# itself has coded. Rates are those of rounded symbols: nearly all of them are 0, and noise in
# their place would hide how little these cost. Integer scales learn from the first step, because
# the hyper-latent has to say what these need; float scales learn beside them.
IN_USE = dict(references={"blank": 1.0}, rounded=True, exact=True, float_share=0.2)
# Transforms, steps and dead zones stay as theory has them. Gradients through rounding are not exact
# enough: steps that learn from them grow, and dead zones vanish where a symbol costs little.
FIXED = dict.fromkeys(("transform", "inverse", "q_step", "q_dead_zone"), 0.0)
# Residuals of predicted cells have no means, whatever is trained. Zeros of a dead zone pull a mean
# to what makes them decode better, and what that costs elsewhere has no gradient: from the same
# references, learned means took 9 to 19 % more bytes for 0 to 0.3 dB.
# A row of these tables learns only when its quality is drawn.
TABLES = dict(z_prior=5.0)


def get_config():
    c = recipes.on_a_cpu()
    c.transform_start = False
    c.optimizer = "muon"
    c.model = ConfigDict(dict(name="light", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.1)
    c.stages = (
        # Short walks, as first frames, which have the larger networks, take half of a clip's bytes.
        stage(
            steps=24_000, units=1, walk=4, batch=4, crop=128, lr=2e-3, end_lr=2e-4, **IN_USE,
            lr_scale=FIXED | TABLES,
        ),
        # Long clips, on which errors add up.
        stage(
            steps=8_000, units=1, walk=32, batch=4, crop=128, lr=5e-4, end_lr=3e-5, **IN_USE,
            lr_scale=FIXED | TABLES,
        ),
    )  # fmt: skip
    return c
