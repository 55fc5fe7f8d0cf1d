"""The intra codec at full size, for GPUs and TPU pods; `dev`, a smaller one, as an argument.

  python train.py --config=configs/intra.py --workdir=runs/intra --config.data_root=DATA_DIR
  python train.py --config=configs/intra.py:dev --workdir=runs/intra_dev \
      --config.data_root=DATA_DIR
  python train.py --config=configs/intra.py:full,4 ...    # batches of 64, for up to 64 devices
  nvc release --workdir=runs/intra --config=configs/intra.py OUT.safetensors

DATA_DIR holds `image_folder/open_images`, made by `python -m nvc_jax.data.build image_folder FOLDER
--name open_images --tile 512` from the first three parts of Open Images' training set, as in the
released code of DCVC-UF (arXiv 2606.04410), whose schedule this is; the exact mode's stages at the
end are ours. An epoch is as many steps as 330,000 pictures make.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from nvc_jax.models import intra
from nvc_jax.training import recipes
from nvc_jax.training.stages import on_more_devices

PICTURES = 330_000


def stage(epochs, batch, crop, lr, end_lr=None, **special):
    """special: see `nvc_jax.training.stages.Stage`."""
    fields = dict(
        steps=epochs * (PICTURES // batch), units=1, batch=batch, crop=crop, lr=lr,
        end_lr=end_lr or lr, schedule="cosine" if end_lr else "constant",
    )  # fmt: skip
    return ConfigDict(fields | special)


def get_config(argument="full"):
    size, _, times = argument.partition(",")
    c = recipes.on_accelerators()
    size = asdict(intra.SIZES[size]) | dict(scale_head=256)
    c.model = ConfigDict(dict(name="intra", size=size, dtype="bfloat16"))
    c.data = ConfigDict(dict(sets=(dict(path="image_folder/open_images/1.0.0"),)))
    c.stages = (
        stage(45, batch=16, crop=256, lr=2e-4),
        stage(25, batch=16, crop=256, lr=5e-5),
        stage(20, batch=16, crop=256, lr=1e-5),
        stage(5, batch=16, crop=512, lr=2e-4),
        stage(4, batch=16, crop=512, lr=5e-5),
        stage(4, batch=16, crop=512, lr=1e-5),
        stage(2, batch=16, crop=512, lr=1e-6),
        # The exact mode.
        stage(
            2, batch=16, crop=256, lr=3e-3, end_lr=2e-5, exact=True, trainable=("scale_head",),
            noise=False, rate_balance=0.6,
        ),
    )  # fmt: skip
    c.stages = tuple(on_more_devices(stage, int(times or 1)) for stage in c.stages)
    c.clip_norm = 0.1
    return c
