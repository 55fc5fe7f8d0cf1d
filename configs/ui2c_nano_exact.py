"""The integer scale head of UI2C nano: everything else stays as released.

  python train.py --config=configs/ui2c_nano_exact.py --workdir=runs/ui2c_nano_exact \
      --config.init_from=MODEL.safetensors --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS

Long walks, because the head sees references only as the symbols that they were coded with.
"""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.seed = 1
    c.model = ConfigDict(dict(name="ui2c", size="nano", dtype="float32"))
    c.data = ConfigDict(dict(folder="../shared/data/train", image_share=0.25))
    c.init_from = "ui2c-nano"
    c.transform_start = False
    common = dict(units=2, walk=8, batch=4, crop=128, exact=True, trainable=("scale_head",))
    c.stages = (
        ConfigDict(dict(steps=4_000, lr=3e-3, end_lr=1e-3, **common)),
        ConfigDict(dict(steps=4_000, lr=1e-3, end_lr=2e-5, **common)),
    )
    c.warmup_steps = 200
    c.clip_norm = 1.0
    c.weight_decay = 0.0
    c.rate_balance = 0.5
    c.average_decay = 0.995
    c.max_skipped_in_row = 50
    c.log_every = 100
    c.sample_every = 2_000
    c.checkpoint_every_seconds = 300.0
    return c
