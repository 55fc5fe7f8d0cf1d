"""UI2C at full size, for GPUs and TPU pods; its smaller relatives `plain` and `dev` as an argument.

  python train.py --config=configs/ui2c.py --workdir=runs/ui2c --config.data_root=DATA_DIR
  python train.py --config=configs/ui2c.py:dev --workdir=runs/ui2c_dev --config.data_root=DATA_DIR
  python train.py --config=configs/ui2c.py:base,8 ...    # larger batches, for up to 64 devices
  nvc release --workdir=runs/ui2c --config=configs/ui2c.py OUT.safetensors

DATA_DIR holds data sets that `python -m nvc_jax.data.build` made: `vimeo90k_septuplet/default`, and
`video_folder/long`, clips of 129 pictures cut from longer videos (--name long --frames 129
--stride 129 --min-frames 33 --min-size 512 --tile 512).

The paper (arXiv 2510.14431) publishes the data, the mixed references, and that clips grow longer;
lengths, learning rates and the exact mode's stages at the end are our choice. An epoch is as many
steps as Vimeo-90k's 64,612 training clips make.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from nvc_jax.models import ui2c
from nvc_jax.training import recipes
from nvc_jax.training.recipes import LONG, SEPTUPLETS, epochs

# Half of the degraded references as the codec itself would have made them.
OWN_ERRORS = dict(blank=1 / 3, true=1 / 3, degraded=1 / 6, coded=1 / 6)


def get_config(argument="base"):
    size, times = recipes.sized(argument)
    c = recipes.on_accelerators()
    # All sizes get the integer network of the exact mode.
    size = asdict(ui2c.SIZES[size]) | dict(scale_head=256)
    c.model = ConfigDict(dict(name="ui2c", size=size, dtype="bfloat16"))
    c.data = ConfigDict(dict(sets=(SEPTUPLETS,)))
    clips = dict(data=dict(sets=(LONG,)))
    long = dict(clips, remat=True)
    own_errors = dict(long, references=OWN_ERRORS)
    c.stages = (
        # The intra path must exist before references can be judged.
        epochs(5, units=1, batch=16, crop=256, lr=1e-4, references=dict(blank=1.0)),
        # Detached: a step per pair.
        epochs(5, units=1, batch=16, crop=256, lr=1e-4),
        epochs(35, units=1, walk=3, batch=16, crop=256, lr=1e-4),
        # Cascaded: gradients through all pairs.
        epochs(8, units=3, batch=8, crop=256, lr=5e-5),
        epochs(6, units=8, batch=8, crop=256, lr=5e-5, **long),
        epochs(6, units=16, batch=8, crop=256, lr=5e-5, end_lr=5e-6, **long),
        epochs(15, units=16, batch=8, crop=512, lr=5e-5, **own_errors),
        epochs(15, units=32, batch=8, crop=512, lr=5e-5, end_lr=2e-6, **own_errors),
        epochs(2, units=48, batch=8, crop=512, lr=1e-5, **own_errors),
        epochs(2, units=64, batch=8, crop=512, lr=1e-5, end_lr=2e-6, **own_errors),
        # The exact mode: the integer scales alone, then everything once more, then the scales on
        # clips that start without a reference, as they do in use.
        epochs(
            2, units=3, batch=16, crop=256, lr=3e-3, end_lr=5e-4, exact=True,
            trainable=("scale_head",), noise=False, rate_balance=0.9,
        ),
        epochs(
            2, units=16, batch=8, crop=256, lr=2e-5, end_lr=1e-6, exact=True, detached=True, **long,
        ),
        epochs(
            2, units=2, walk=4, batch=16, crop=256, lr=5e-4, end_lr=1e-6, exact=True,
            trainable=("scale_head",), noise=False, rate_balance=0.9, references=dict(blank=1.0),
            **clips,
        ),
    )  # fmt: skip
    c.stages = recipes.on_more_devices(c.stages, times)
    return c
