"""Uni-LVC nano: pictures on their own, low delay and random access with one set of weights.

  python train.py --config=configs/uni_lvc_nano.py --workdir=runs/uni_lvc_nano \
      --config.data.folder=FOLDER_OF_VIDEOS_AND_PHOTOS
  nvc release --workdir=runs/uni_lvc_nano --config=configs/uni_lvc_nano.py OUT.safetensors

First the intra codec, then what listens to references, then everything together. From there on
pictures on their own stay in the mix ("knowledge replay"), and are held to what S0 made of them.
What a stage must not make worse stands beside it; `nvc release --stage N` makes a model of what
stage N left, for `eval.py` to compare.
"""

from ml_collections import ConfigDict

from nvc_jax.models import uni_lvc
from nvc_jax.training import recipes

SLOWLY = dict.fromkeys(uni_lvc.BACKBONE, 0.1)
REPLAY = dict(weights=0, recon=0.1)  # as S0 left them
DOUBTFUL = dict(spoil=0.3, judged=True, cut_share=0.0, temperature=(0.3, 0.3))
# Rates of rounded symbols under integer scales, and nothing but the network behind them learns.
SCALE_HEAD = dict(
    batch=4, spans=(8, 16, 32), exact=True, trainable=("scale_head",), noise=False, judged=True,
    rate_balance=0.6,
)  # fmt: skip


def stage(steps, orders, lr, end_lr, units=4, batch=2, **special):
    """orders: shares of pictures on their own, low delay, random access.

    special: see `nvc_jax.training.stages.Stage`.
    """
    orders = dict(zip(("ai", "ld", "ra"), orders, strict=True))
    common = dict(steps=steps, orders=orders, lr=lr, end_lr=end_lr, units=units, batch=batch)
    return ConfigDict(common | dict(crop=128, spans=(4, 8, 16, 32)) | special)


def get_config():
    c = recipes.on_a_cpu()
    c.optimizer = "muon"
    c.model = ConfigDict(dict(name="uni_lvc", size="nano", dtype="float32"))
    c.data = recipes.own_clips(image_share=0.2)
    c.stages = (
        # S0: the intra codec.
        stage(
            5_000, (1, 0, 0), lr=3e-3, end_lr=3e-5, units=1, spans=(1,), batch=8,
            trainable=uni_lvc.BACKBONE, data=dict(image_share=0.6),
        ),
        # S1: what listens to references, first of all to those of low delay. Pictures on their own
        # stay the same, bit for bit.
        stage(2_700, (0, 1, 0), lr=3e-3, end_lr=1e-3, trainable=uni_lvc.LISTENING),
        # S2: everything, the intra codec slowly. From here on pictures on their own stay within
        # 0.5 % BD-rate of S0.
        stage(
            2_400, (0.25, 0.75, 0), lr=2e-3, end_lr=7e-4, lr_scale=SLOWLY, teacher=REPLAY,
        ),
        # S3: random access too. Low delay stays what it was.
        stage(
            2_500, (0.15, 0.35, 0.5), lr=1.5e-3, end_lr=2e-4, units=5, spans=(8, 16, 32),
            lr_scale=SLOWLY, teacher=REPLAY,
        ),
        # S4: which references to trust; first only who judges them, by pictures as large as short
        # sides allow, because what is judged is a whole picture. Where references are good, nothing
        # gets worse.
        stage(
            400, (0.15, 0.35, 0.5), lr=1e-2, end_lr=1e-3, trainable=("judge",), crop=256,
            **DOUBTFUL | dict(temperature=(1.0, 0.3)), judge_loss=1.0,
            average_decay=0.98,  # it starts from nothing, and the average is what counts
        ),
        stage(
            1_000, (0.15, 0.35, 0.5), lr=2e-4, end_lr=5e-5, lr_scale=SLOWLY, teacher=REPLAY,
            **DOUBTFUL, judge_loss=0.01,
        ),
        # S5: longer clips; the judge by rates and distortions alone. Short clips get no worse.
        stage(
            150, (0.1, 0.9, 0), lr=1e-4, end_lr=2e-5, units=16, spans=(31,), remat=True,
            lr_scale=SLOWLY, teacher=REPLAY, **DOUBTFUL,
        ),
        stage(
            200, (0.1, 0.45, 0.45), lr=5e-5, end_lr=1e-5, units=6, spans=(16, 32),
            lr_scale=SLOWLY, teacher=REPLAY, **DOUBTFUL,
        ),
        # The exact mode. The other modes stay the same, bit for bit.
        stage(6_000, (0.2, 0.4, 0.4), lr=3e-3, end_lr=3e-4, **SCALE_HEAD),
        stage(6_000, (0.2, 0.4, 0.4), lr=1e-3, end_lr=1e-5, **SCALE_HEAD),
    )  # fmt: skip
    return c
