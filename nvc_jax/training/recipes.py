"""What training configs have in common: everything of a run that is not the codec's own.

A config starts from one of these and sets its model, data and stages, and what it has otherwise:

    c = recipes.on_a_cpu()
    c.model = ConfigDict(dict(name="intra", size="nano", dtype="float32"))
"""

from typing import Any

from ml_collections import ConfigDict

from nvc_jax.training.stages import RUN_DEFAULTS


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


def _run(**special: Any) -> ConfigDict:
    # The defaults are written out, because a command line can only change what a config has.
    common = RUN_DEFAULTS | dict(
        seed=0,
        init_from="",  # a released model to start from
        max_skipped_in_row=50,
        log_every=100,
    )
    return ConfigDict(common | special)
