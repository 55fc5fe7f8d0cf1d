"""What training configs have in common: everything of a run that is not the codec's own.

A config starts from one of these and sets its model, data and stages, and what it has otherwise:

    c = recipes.on_a_cpu()
    c.model = ConfigDict(dict(name="intra", size="nano", dtype="float32"))
"""

from typing import Any

from ml_collections import ConfigDict

from nvc_jax.errors import NvcError
from nvc_jax.training.stages import RUN_DEFAULTS

# Data sets that `python -m nvc_jax.data.build` makes, and how many samples make an epoch of them.
SEPTUPLETS = dict(path="vimeo90k_septuplet/default/1.0.0")
LONG = dict(path="video_folder/long/1.0.0")
OPEN_IMAGES = dict(path="image_folder/open_images/1.0.0")
CLIPS = 64_612  # of SEPTUPLETS
PICTURES = 330_000  # of OPEN_IMAGES


def own_clips(image_share: float, synthetic_share: float = 0.0) -> ConfigDict:
    """A folder of videos and photographs, decoded into memory: see `nvc_jax.data.pipeline`.

    `--config.data.folder=FOLDER` names another one.
    """
    shares = dict(image_share=image_share, synthetic_share=synthetic_share)
    return ConfigDict(dict(folder="data/clips", **shares))


def on_a_cpu() -> ConfigDict:
    """For codecs that a CPU trains in hours: large steps, a short average, clips from a folder."""
    return _run(
        transform_start=True,  # see nvc_jax.training.transform_start
        warmup_steps=200,
        clip_norm=1.0,
        weight_decay=1e-4,
        rate_balance=0.5,
        average_decay=0.999,
        sample_every=1_000,
        checkpoint_every_seconds=300.0,
    )


def on_accelerators() -> ConfigDict:
    """For trainings of days on GPUs and TPUs, from data sets that worker processes read."""
    return _run(
        data_root="data",
        transform_start=False,
        warmup_steps=1_000,
        clip_norm=0.2,
        weight_decay=0.01,
        rate_balance=0.0,  # as published
        average_decay=0.9999,
        sample_every=5_000,
        checkpoint_every_seconds=600.0,
        workers=8,
    )


def stage(**fields: Any) -> ConfigDict:
    """fields: see `nvc_jax.training.stages.Stage`."""
    return ConfigDict(fields)


def epochs(
    number: int,
    of: int = CLIPS,
    *,
    batch: int,
    lr: float,
    end_lr: float | None = None,
    walk: int = 1,
    **fields: Any,
) -> ConfigDict:
    """A stage of so many epochs of `of` samples; without `end_lr` its learning rate stays."""
    return stage(
        steps=number * (of // batch) * walk, walk=walk, batch=batch, lr=lr, end_lr=end_lr or lr,
        schedule="cosine" if end_lr else "constant", **fields,
    )  # fmt: skip


def sized(argument: str) -> tuple[str, int]:
    """A config's argument "SIZE" or "SIZE,TIMES" -> (size, times), see `on_more_devices`.

    Raises:
      NvcError: TIMES is no whole number above 0.
    """
    size, _, times = argument.partition(",")
    if times and (not times.isdecimal() or not int(times)):
        raise NvcError(f"batches {times} times as large: give a whole number above 0")
    return size, int(times or 1)


def on_more_devices(stages: tuple[ConfigDict, ...], times: int) -> tuple[ConfigDict, ...]:
    """Stages with batches `times` as large, for as many more devices.

    Fewer steps see the same data; Adam's learning rates grow with the square root of the batch.
    """
    return tuple(
        stage(
            **s.to_dict()
            | dict(
                steps=s.steps // (times * s.walk) * s.walk, batch=s.batch * times,
                lr=s.lr * times**0.5, end_lr=s.end_lr * times**0.5,
            )
        )
        for s in stages
    )  # fmt: skip


def _run(**special: Any) -> ConfigDict:
    # The defaults are written out, because a command line can only change what a config has.
    common = RUN_DEFAULTS | dict(
        seed=0,
        init_from="",  # a released model to start from
        max_skipped_in_row=50,
        log_every=100,
    )
    return ConfigDict(common | special)
