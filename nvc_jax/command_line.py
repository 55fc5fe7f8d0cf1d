"""The command lines of train.py and eval.py: sentences in the place of tracebacks."""

import sys

from absl import flags


def parse(argv: list[str], config: flags.FlagHolder, prefix: str) -> list[str]:
    """absl's parser; where a flag or the config cannot be used, says why and exits with status 2.

    Args:
      config: what `config_flags.DEFINE_config_file` gave.
      prefix: of the line.
    """
    try:
        rest = flags.FLAGS(argv)
        config.value.lock()  # a config file that could not be read raises only now
    except Exception as error:  # a config is a program, and may raise anything
        text = str(error).replace("\\'", "'").strip()
        # What a config raises comes with its traceback, of which the last line says what it was.
        reason = text.splitlines()[-1] if "Traceback" in text else " ".join(text.split())
        of_a_flag = isinstance(error, flags.Error) and "--config" not in text
        what = "" if of_a_flag else "the config cannot be used: "
        print(f"{prefix}: {what}{reason or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    return rest
