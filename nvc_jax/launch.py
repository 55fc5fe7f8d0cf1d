"""Settings of the process that must be made before JAX is imported.

Every entry point calls `setup()` first, before any import that pulls in JAX. It decides four
things by environment variables, so a variable that is already set wins:

* Compiled programs are kept on disk (`JAX_COMPILATION_CACHE_DIR`, by default a folder below
  `~/.cache/nvc_jax/xla`), small and quickly compiled ones too, so a second run starts sooner. JAX
  0.10 never keeps programs that call back to the host, as a codec's unit program does; later
  versions do. Machine code in such a cache fits one kind of CPU, and JAX does not put the CPU into
  its keys, so the folder's name does: home directories are shared between machines.
* On a CPU, memory comes in huge pages (glibc's tunable `glibc.malloc.hugetlb`), which made training
  steps 15 to 30 % faster. glibc reads the tunable when a process starts, so the process replaces
  itself once by the same command; that costs one start of the interpreter, about 25 ms.
* Decompositions of matrices use one thread (`OPENBLAS_NUM_THREADS`). With as many as there are
  cores, one of 288 x 288 took 2 s instead of 4 ms beside other processes: its threads wait for each
  other by spinning.
* XLA's C++ log is silent below fatal errors. What it reports as an error is either raised in Python
  too, or a notice about slow constant folding or about tuning flags in cached programs.
"""

from __future__ import annotations

import glob
import os
import platform
import sys
import zlib
from contextlib import suppress
from pathlib import Path

HUGE_PAGES = "glibc.malloc.hugetlb"
RESTARTED = "NVC_JAX_RESTARTED"
TRANSPARENT_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
# NVIDIA, AMD, TPU up to v4, TPU from v5 on.
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def setup() -> None:
    """Prepares environment variables, and restarts the process if huge pages need it.

    Returns normally in the process that is to go on; the restarted one has the same process id,
    arguments, working directory and open standard streams. Never fails: what is not possible here
    is left out.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _keep_compiled_programs()
    if _huge_pages_would_help() and _may_restart():
        _restart_with_huge_pages()


def _keep_compiled_programs() -> None:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = Path.home() / ".cache" / "nvc_jax" / "xla" / _cpu_name()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # read-only, full, or no home directory
            return
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _cpu_name() -> str:
    """A short name for the instructions that this CPU has."""
    flags = ""
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def _huge_pages_would_help() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        on_cpu = set(platforms.split(",")) == {"cpu"}
    else:
        on_cpu = not any(map(glob.glob, ACCELERATORS))
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        knows_tunable = name == "glibc" and [int(x) for x in version.split(".")] >= [2, 35]
        available = "[never]" not in Path(TRANSPARENT_HUGE_PAGES).read_text()
    except (AttributeError, OSError, ValueError):  # not glibc, not Linux
        return False
    return on_cpu and knows_tunable and available


def _may_restart() -> bool:
    """Whether this process was started by a command that can simply be given again."""
    return (
        HUGE_PAGES not in os.environ.get("GLIBC_TUNABLES", "")
        and RESTARTED not in os.environ
        and bool(sys.executable)
        # No file: typed in, piped in, given with -c, or the worker of a process pool.
        and getattr(sys.modules["__main__"], "__file__", None) is not None
        and "pytest" not in sys.modules
        and sys.gettrace() is None  # a debugger would lose its process
    )


def _restart_with_huge_pages() -> None:
    tunables = os.environ.get("GLIBC_TUNABLES")
    os.environ["GLIBC_TUNABLES"] = (f"{tunables}:" if tunables else "") + f"{HUGE_PAGES}=1"
    os.environ[RESTARTED] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
