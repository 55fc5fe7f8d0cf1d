"""Trains a codec.

  python train.py --config=configs/ui2c_nano.py --workdir=runs/ui2c_nano

On several hosts the same command runs on each, with --coordinator=auto on TPU pods and under Slurm,
elsewhere with --coordinator=HOST:PORT --processes=N --process=I; see docs/training.md.

Stops and resumes at any time: Ctrl-C and SIGTERM save a checkpoint first, and the same command goes
on from the newest checkpoint in the workdir. Exit status: 0 when training is complete; 2 with one
line of explanation for a config, data or workdir that is not usable; 130 or 143 when stopped.
"""

from nvc_jax.launch import setup

setup()

import sys  # noqa: E402
from functools import partial  # noqa: E402

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from nvc_jax.command_line import parse  # noqa: E402
from nvc_jax.errors import NvcError  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and logs go.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0 of several; auto: JAX finds out."
)
_PROFILE = flags.DEFINE_list("profile", None, "FIRST,COUNT: steps to record for TensorBoard.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes train together.")
_PROCESS = flags.DEFINE_integer("process", 0, "Which of them this is, from 0.")
flags.mark_flags_as_required(["config", "workdir"])


def profile_window(given: list[str] | None) -> tuple[int, int] | None:
    if given is None:
        return None
    if len(given) != 2 or not all(part.isdigit() and int(part) for part in given):
        raise NvcError(f"--profile={','.join(given)}: give FIRST,COUNT, both at least 1")
    return int(given[0]), int(given[1])


def main(_):
    from nvc_jax import parallel
    from nvc_jax.training.loop import Stopped, train

    logging.set_verbosity(logging.INFO)
    try:
        parallel.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train(_CONFIG.value, _WORKDIR.value, profile_window(_PROFILE.value))
    except NvcError as e:
        print(f"train.py: {e}", file=sys.stderr)
        sys.exit(128 + e.signal if isinstance(e, Stopped) else 2)
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=partial(parse, config=_CONFIG, prefix="train.py"))
