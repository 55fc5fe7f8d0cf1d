"""Measure codecs on clips and write a report.

    python eval.py --config=configs/demo.py [--workdir=DIR] [--json=FILE] [--config.frames=17 ...]

Encodes every clip with every model at every qp by the installed command line, decodes each file in
a fresh process, checks the decoded pictures against the encoder's reconstruction, measures rate
(file bytes), PSNR, MS-SSIM and speed, does the same with x264, x265, SVT-AV1 and VVenC, and writes
`report.html` and `results.json` to the work folder.

Several processes, on one host or more, share the work if each is given --coordinator=HOST:PORT
--processes=N --process=I and the same --workdir; process 0 writes the report.

Exit status: 0; 1 when a stream of ours failed or did not decode to exactly what the encoder saw, or
when a BD-rate is above the limit that the config sets for it; 2 with one line of explanation for a
config or clip that is not usable.
"""

if __name__ == "__main__":
    from nvc_jax.launch import setup

    setup()  # before anything else: it may start this process anew

import json
import sys
from functools import partial
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from nvc_jax.command_line import parse
from nvc_jax.errors import NvcError
from nvc_jax.evaluation.report import print_tables, write_report
from nvc_jax.evaluation.runner import Share, all_passed, check_config, evaluate, leave_error

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to measure; see configs/demo.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results; instead of the config's.")
_JSON = flags.DEFINE_string("json", None, "Write the results to this file, too.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0 of several that share a --workdir."
)
_PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes evaluate together.")
_PROCESS = flags.DEFINE_integer("process", 0, "Which of them this is, from 0.")
flags.mark_flag_as_required("config")


def join(workdir: Path, coordinator: str, processes: int, process: int) -> Share:
    """This process's share of the work, once the others are there."""
    if not coordinator and processes == 1 and process == 0:
        return Share()
    import jax

    from nvc_jax import parallel

    # Models run in processes of their own, which must find the accelerator free.
    jax.config.update("jax_platforms", "cpu")
    if process == 0:
        for old in workdir.glob("points-*.json"):
            old.unlink(missing_ok=True)
    parallel.initialize(coordinator, processes, process)
    share = Share(jax.process_index(), jax.process_count())
    jax.distributed.shutdown()  # from here on they meet in the work folder
    return share


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Only flags are understood")
    config = _CONFIG.value.to_dict()
    try:
        if _WORKDIR.value:
            config["workdir"] = _WORKDIR.value
        if _JSON.value and not Path(_JSON.value).absolute().parent.is_dir():
            raise NvcError(f"--json={_JSON.value}: its folder does not exist")
        check_config(config)
        share = join(
            Path(config["workdir"]), _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
        )  # fmt: skip
        try:
            results = evaluate(config, say=lambda line: print(line, flush=True), share=share)
        except NvcError as error:
            if share.index:
                leave_error(Path(config["workdir"]), share, error)
            raise
        if share.index:
            return 0 if all_passed(results) else 1
        report = write_report(results, Path(config["workdir"]))
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(results, indent=1))
    except (NvcError, OSError) as error:  # OSError: above all a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_tables(results, Console())
    print(f"report: {report}")
    return 0 if all_passed(results) else 1


if __name__ == "__main__":
    app.run(main, flags_parser=partial(parse, config=_CONFIG, prefix="error"))
