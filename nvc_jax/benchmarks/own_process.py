"""Measurements in a process of their own, for peaks of memory and for other numbers of devices.

A module that is measured in this way ends with

    if __name__ == "__main__":
        own_process.answer(function)
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from nvc_jax.errors import NvcError


def ask(module: str, *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What the function that `module` answers with returns; all values as JSON has them.

    Args:
      environment: variables beside those of this process.

    Raises:
      NvcError: with the process' last line on stderr, if it fails.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    environment = os.environ | dict(environment or {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise NvcError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def answer(function: Callable) -> None:
    """The other side of `ask`."""
    try:
        print(json.dumps(function(*json.loads(sys.argv[1]))))
    except NvcError as e:
        sys.exit(str(e))
