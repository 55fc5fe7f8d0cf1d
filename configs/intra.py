"""The intra codec at full size, for GPUs and TPU pods; `dev` and `light`, smaller ones, as an argument.

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
from nvc_jax.training.recipes import OPEN_IMAGES, PICTURES, epochs


def get_config(argument="full"):
    size, times = recipes.sized(argument)
    c = recipes.on_accelerators()
    size = asdict(intra.SIZES[size]) | dict(scale_head=256)
    c.model = ConfigDict(dict(name="intra", size=size, dtype="bfloat16"))
    c.data = ConfigDict(dict(sets=(OPEN_IMAGES,)))
    alone = dict(of=PICTURES, units=1, batch=16)
    c.stages = (
        epochs(45, crop=256, lr=2e-4, **alone),
        epochs(25, crop=256, lr=5e-5, **alone),
        epochs(20, crop=256, lr=1e-5, **alone),
        epochs(5, crop=512, lr=2e-4, **alone),
        epochs(4, crop=512, lr=5e-5, **alone),
        epochs(4, crop=512, lr=1e-5, **alone),
        epochs(2, crop=512, lr=1e-6, **alone),
        # The exact mode.
        epochs(
            2, crop=256, lr=3e-3, end_lr=2e-5, exact=True, trainable=("scale_head",), noise=False,
            rate_balance=0.6, **alone,
        ),
    )  # fmt: skip
    c.stages = recipes.on_more_devices(c.stages, times)
    c.clip_norm = 0.1
    return c
