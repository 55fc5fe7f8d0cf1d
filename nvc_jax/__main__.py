"""Entry point of the `nvc` command and of `python -m nvc_jax`."""

import os
import sys

from nvc_jax.launch import setup
from nvc_jax.machine import cores


def main() -> int:
    """Settings that must precede JAX first, then the command line."""
    setup()
    # Programs that call back to the host are safest when nothing runs behind their back (jax issues
    # 24255 and 25861); coding waits for every unit anyway.
    os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
    # They need a thread to spare (see `nvc_jax.unit_program.decode_unit`), which one core has not.
    if cores() == 1:
        os.environ.setdefault("NPROC", "2")
    from nvc_jax import cli

    status = cli.main()
    if status:
        # When memory ran out, JAX reports the same again at exit, with a traceback.
        sys.unraisablehook = lambda _: None
    return status


if __name__ == "__main__":
    sys.exit(main())
