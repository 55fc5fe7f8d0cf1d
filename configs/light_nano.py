"""Light nano: P-frames with searched motion, about 7 kMAC per pixel to decode, trained on a CPU.

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
# their place would hide how little these cost.
IN_USE = dict(references={"blank": 1.0}, rounded=True)


def get_config():
    c = recipes.on_a_cpu()
    c.transform_start = False
    c.optimizer = "muon"
    c.model = ConfigDict(dict(name="light", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.1)
    # The cosine transforms stay as they are.
    transforms = dict.fromkeys(("transform", "inverse"), 0.0)
    # And then the whole encoder, its steps and dead zone. No gradient through a dead zone is right:
    # one that passes as if nothing was rounded lifts latents to the threshold, one that does not
    # pass at all leaves them to the rate.
    encoder = dict.fromkeys(("encoder", "encoder_out", "q_step", "q_dead_zone"), 0.0)
    c.stages = (
        stage(
            steps=10_000, units=1, walk=8, batch=4, crop=128, lr=2e-3, end_lr=3e-4, **IN_USE,
            lr_scale=transforms,
        ),
        stage(
            steps=6_000, units=1, walk=8, batch=4, crop=128, lr=1.2e-3, end_lr=1e-4, **IN_USE,
            lr_scale=transforms | encoder,
        ),
        # The exact mode: the integer scales alone, from rounded symbols.
        stage(
            steps=3_200, units=1, walk=16, batch=4, crop=128, lr=3e-3, end_lr=1e-4, noise=False,
            exact=True, trainable=("scale_head",), references={"blank": 1.0}, optimizer="adamw",
        ),
    )  # fmt: skip
    return c
