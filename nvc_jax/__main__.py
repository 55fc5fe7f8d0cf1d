"""Entry point of the `nvc` command and of `python -m nvc_jax`."""

import sys

from nvc_jax.launch import setup


def main() -> int:
    """Settings that must precede JAX first, then the command line."""
    setup()
    from nvc_jax import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
