"""The launcher: what the environment looks like afterwards, and that a restart goes unnoticed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvc_jax import launch

needs_glibc = pytest.mark.skipif(
    not launch._huge_pages_would_help(), reason="needs Linux, glibc, huge pages and no accelerator"
)

SCRIPT = """\
import json, os, sys
from pathlib import Path
log = Path(os.environ["STARTS"])
log.write_text(log.read_text() + f"{os.getpid()} " if log.exists() else f"{os.getpid()} ")
from nvc_jax import launch
launch.setup()
assert "jax" not in sys.modules
print(json.dumps({"argv": sys.argv, "flags": sys.flags.optimize, "env": dict(os.environ)}))
"""


@pytest.fixture
def command(tmp_path):
    """Runs Python on `tool.py` with a home of its own; gives what it printed, and its starts."""
    tmp_path.joinpath("tool.py").write_text(SCRIPT)

    def run(*arguments, **changes):
        unwanted = ("GLIBC_TUNABLES", launch.RESTARTED, "TF_CPP_MIN_LOG_LEVEL")
        unwanted += ("OPENBLAS_NUM_THREADS",)
        environ = {
            name: value
            for name, value in os.environ.items()
            if name not in unwanted and not name.startswith("JAX_")
        }
        environ |= {"HOME": str(tmp_path), "STARTS": str(tmp_path / "starts")} | changes
        environ["PYTHONPATH"] = str(Path(launch.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        starts = tmp_path.joinpath("starts").read_text().split()
        tmp_path.joinpath("starts").unlink()
        return json.loads(done.stdout), starts

    return run


@needs_glibc
@pytest.mark.parametrize(
    "before",
    [["tool.py"], ["-m", "tool"], ["-O", "-u", "tool.py"], ["./tool.py"], ["-X", "dev", "tool.py"]],
)
def test_restarts_once_with_the_same_arguments(command, before):
    arguments = ["encode", "a file.y4m", "", "--size=3x4", "ü", "*"]
    plain, starts = command(*before, *arguments, GLIBC_TUNABLES=launch.HUGE_PAGES + "=0")
    assert len(starts) == 1
    printed, starts = command(*before, *arguments)
    assert len(starts) == 2 and starts[0] == starts[1]
    assert printed["argv"] == plain["argv"] and printed["argv"][1:] == arguments
    assert printed["flags"] == plain["flags"]
    assert printed["env"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


@needs_glibc
def test_other_tunables_are_kept(command):
    printed, starts = command("tool.py", GLIBC_TUNABLES="glibc.malloc.tcache_count=4")
    assert len(starts) == 2
    tunables = printed["env"]["GLIBC_TUNABLES"]
    assert tunables == "glibc.malloc.tcache_count=4:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    "changes",
    [
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"},
        {"JAX_PLATFORMS": "cuda"},
        {"JAX_PLATFORMS": "tpu,cpu"},
        {launch.RESTARTED: "1"},
    ],
)
def test_does_not_restart_without_need(command, changes):
    printed, starts = command("tool.py", **changes)
    assert len(starts) == 1
    assert printed["env"].get("GLIBC_TUNABLES") == changes.get("GLIBC_TUNABLES")


def test_does_not_restart_code_without_a_file(command):
    assert len(command("-c", SCRIPT)[1]) == 1


def test_does_not_restart_tests(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv(launch.RESTARTED, raising=False)
    assert not launch._may_restart()


@needs_glibc
def test_an_accelerator_is_recognised(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(launch, "ACCELERATORS", (str(tmp_path / "nvidia[0-9]*"),))
    assert launch._huge_pages_would_help()
    tmp_path.joinpath("nvidia5").touch()
    assert not launch._huge_pages_would_help()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch._huge_pages_would_help()


def heed_interrupts():
    """Also where the tests run in the background of a shell, which has its children ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@needs_glibc
def test_interruption_and_exit_status_come_through(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(
        "import sys, time\nfrom nvc_jax import launch\nlaunch.setup()\n"
        "if len(sys.argv) > 1: sys.exit(int(sys.argv[1]))\n"
        "try:\n    print(sys.stdin.readline(), flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt: sys.exit(7)\n"
    )
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environ["PYTHONPATH"] = str(Path(launch.__file__).parents[1])
    assert subprocess.run([sys.executable, script, "2"], env=environ).returncode == 2
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, script], env=environ, stdin=pipe, stdout=pipe, preexec_fn=heed_interrupts
    ) as child:
        child.stdin.write(b"input survives\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"input survives\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 7


def test_compiled_programs_are_kept_in_a_folder_per_cpu(command, tmp_path):
    printed, _ = command("tool.py")
    folder = Path(printed["env"]["JAX_COMPILATION_CACHE_DIR"])
    assert folder.is_dir() and folder.parent == tmp_path / ".cache/nvc_jax/xla"
    assert printed["env"]["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert printed["env"]["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "-1"
    assert printed["env"]["TF_CPP_MIN_LOG_LEVEL"] == "3"
    assert printed["env"]["OPENBLAS_NUM_THREADS"] == "1"


def test_given_settings_win(command, tmp_path):
    given = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3",
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "OPENBLAS_NUM_THREADS": "2",
    }
    printed, _ = command("tool.py", **given)
    assert given.items() <= printed["env"].items()
    assert not tmp_path.joinpath(".cache").exists()


def test_a_home_that_cannot_be_written_means_no_cache(command, tmp_path):
    tmp_path.joinpath("file").touch()
    printed, _ = command("tool.py", HOME=str(tmp_path / "file"))
    assert "JAX_COMPILATION_CACHE_DIR" not in printed["env"]


def test_jax_reads_these_variables(tmp_path):
    code = (
        "from nvc_jax import launch; launch.setup(); import jax;"
        "jax.jit(lambda x: x * 2 + 1)(1.0); c = jax.config;"
        "print(c.jax_persistent_cache_min_compile_time_secs,"
        " c.jax_persistent_cache_min_entry_size_bytes)"
    )
    environ = {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]}
    environ["PYTHONPATH"] = str(Path(launch.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["0.0", "-1"], "")
    assert list(tmp_path.glob(".cache/nvc_jax/xla/*/jit_*"))
