"""Uni-LVC for GPUs and TPU pods: `fast`, or the sizes `large` and `dev` as an argument.

  python train.py --config=configs/uni_lvc.py --workdir=runs/uni_lvc --config.data_root=DATA_DIR
  python train.py --config=configs/uni_lvc.py:dev --workdir=runs/uni_dev --config.data_root=DATA_DIR
  python train.py --config=configs/uni_lvc.py:fast,8 ...    # larger batches, for up to 64 devices
  nvc release --workdir=runs/uni_lvc --config=configs/uni_lvc.py OUT.safetensors

DATA_DIR holds the data sets that configs/intra.py and configs/ui2c.py name.

Of the paper's training (arXiv 2603.05756) only that it has several stages is public; these are our
own. What each must not make worse is at its side, to be checked with `eval.py` between stages. An
epoch is as many steps as Vimeo-90k's 64,612 training clips make; in the first stage, as Open
Images' 330,000 pictures make.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from nvc_jax.models import uni_lvc
from nvc_jax.training import recipes
from nvc_jax.training.recipes import LONG, OPEN_IMAGES, PICTURES, SEPTUPLETS, epochs


def shares(ai, ld, ra):
    return dict(orders=dict(ai=ai, ld=ld, ra=ra))


def get_config(argument="fast"):
    size, times = recipes.sized(argument)
    c = recipes.on_accelerators()
    size = asdict(uni_lvc.SIZES[size]) | dict(scale_head=256)
    c.model = ConfigDict(dict(name="uni_lvc", size=size, dtype="bfloat16"))
    # A picture for every four clips: those on their own are drawn from both.
    c.data = ConfigDict(dict(sets=(SEPTUPLETS, OPEN_IMAGES | dict(weight=0.25))))
    pictures = dict(data=dict(sets=(OPEN_IMAGES,)), units=1, spans=(1,), **shares(1, 0, 0))
    long = dict(data=dict(sets=(LONG, OPEN_IMAGES | dict(weight=0.25))), remat=True)
    backbone_slowly = dict(lr_scale=dict.fromkeys(uni_lvc.BACKBONE, 0.1))
    replay = dict(teacher=dict(weights=1, recon=0.1))  # as S0 left them
    doubtful = dict(spoil=0.3, judged=True, cut_share=0.0)
    c.stages = (
        # S0: the intra codec.
        epochs(
            45, PICTURES, batch=16, crop=256, lr=2e-4, trainable=uni_lvc.BACKBONE, **pictures
        ),
        epochs(
            30, PICTURES, batch=16, crop=256, lr=5e-5, end_lr=1e-6,
            trainable=uni_lvc.BACKBONE, **pictures,
        ),
        # S1: what listens to references. Pictures on their own stay the same, bit for bit.
        epochs(
            10, batch=8, crop=256, lr=1e-4, units=3, spans=(6,), trainable=uni_lvc.LISTENING,
            **shares(0, 1, 0),
        ),
        # S2: everything, on clips that grow longer. From here on pictures on their own stay within
        # 0.5 % BD-rate of S0.
        epochs(
            10, batch=8, crop=256, lr=1e-4, units=6, spans=(6,),
            **shares(0.25, 0.75, 0), **backbone_slowly, **replay,
        ),
        epochs(
            5, batch=8, crop=256, lr=5e-5, units=16, spans=(32,),
            **shares(0.25, 0.75, 0), **backbone_slowly, **replay, **long,
        ),
        # S3: random access too. Low delay stays what it was after S2.
        epochs(
            12, batch=8, crop=256, lr=5e-5, units=7, spans=(32,),
            **shares(0.15, 0.35, 0.5), **backbone_slowly, **replay, **long,
        ),
        # S4: whom to trust: first who judges it alone, then all. Where references are good, neither
        # low delay nor random access gets worse.
        epochs(
            1, batch=8, crop=256, lr=1e-3, units=7, spans=(32,), trainable=("judge",),
            judge_loss=1.0, **shares(0.15, 0.35, 0.5), **doubtful, **long,
        ),
        epochs(
            6, batch=8, crop=256, lr=5e-5, end_lr=1e-5, units=7, spans=(32,), judge_loss=0.01,
            temperature=(0.3, 0.3), **shares(0.15, 0.35, 0.5), **backbone_slowly, **replay,
            **doubtful, **long,
        ),
        # S5: long clips; then larger pictures and groups of up to 64. The judge learns by rates and
        # distortions alone. What was good on short clips gets no worse.
        epochs(
            3, batch=8, crop=256, lr=2e-5, end_lr=1e-5, units=48, spans=(64,),
            temperature=(0.3, 0.3), **shares(0.1, 0.9, 0), **backbone_slowly, **replay,
            **doubtful, **long,
        ),
        epochs(
            6, batch=8, crop=512, lr=1e-5, end_lr=2e-6, units=7, spans=(32, 48, 64),
            temperature=(0.3, 0.3), **shares(0.1, 0.45, 0.45), **backbone_slowly, **replay,
            **doubtful, **long,
        ),
        # The exact mode. The other modes stay the same, bit for bit.
        epochs(
            3, batch=8, crop=256, lr=3e-3, end_lr=2e-5, units=7, spans=(32,), exact=True,
            trainable=("scale_head",), noise=False, judged=True, rate_balance=0.6,
            **shares(0.1, 0.45, 0.45), **long,
        ),
    )  # fmt: skip
    c.stages = recipes.on_more_devices(c.stages, times)
    return c
