"""Runs the programs of tests/ranks under mpiexec, and leaves no process behind.

pytest itself never imports MPI: an initialised MPI cannot start another mpiexec reliably, and
leaves variables behind that make ranks believe they belong to the outer job.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What a rank program prints once when all its checks have passed: this and its rank.
OK_MARK = "EPCOMM-OK"

# Variables of an outer MPI job, or that change what epcomm does. MPI4PY_* stays: it chooses the MPI
# library. Unbuffered Python writes a line in pieces, between which those of other ranks fall.
_SETTINGS = re.compile(r"OMPI_MCA_(plm|rmaps|hwloc|btl|pml|mtl|osc|rte)_?")
_CLEANED = re.compile(
    r"MPI(?!4PY_)|I_MPI|PMI|OMPI_|OPAL_|PRTE_|HYD|SLURM|EPCOMM_|PYTHONUNBUFFERED$"
)
# In the environment of every process of a launch, whatever session or group it moved to.
_LAUNCH_ID = "TEST_LAUNCH_ID"
_GRACE_S = 3.0


@dataclass(frozen=True)
class Result:
    """How a launch ended."""

    command: str
    returncode: int
    stdout: str
    stderr: str
    timed_out: bool
    wall_s: float

    def ok_ranks(self) -> list[int]:
        """Return the ranks that printed the success mark, ascending, repeated where repeated."""
        return sorted(int(rank) for rank in re.findall(rf"{OK_MARK} (\d+)", self.stdout))

    def __str__(self) -> str:
        end = f"exit {self.returncode} after {self.wall_s:.1f} s"
        if self.timed_out:
            end += ", past its deadline"
        return (
            f"$ {self.command}\n{end}; success marks of ranks {self.ok_ranks()}\n"
            f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
        )


def find_mpiexec() -> str | None:
    """Return the mpiexec beside this Python, else the one on PATH, else None."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def run_ranks(
    program: str,
    num_ranks: int,
    *args: object,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    outlives_s: float = 0.0,
    prefix: Sequence[str] = (),
    mpiexec_options: Sequence[str] = (),
) -> Result:
    """Run tests/ranks/<program>.py on ``num_ranks`` ranks.

    Args:
        program: File name in tests/ranks, without ``.py``.
        num_ranks: How many ranks mpiexec starts.
        *args: The program's arguments, each made a string.
        timeout_s: Deadline of the whole launch, in seconds. Past it every Python rank prints where
            each of its threads stands, and everything that was started is killed.
        env: Variables to set on top of the cleaned environment.
        check: Whether to fail unless the launch exits with 0 and every rank printed the success
            mark exactly once.
        outlives_s: If above 0, mpiexec sees the end of each rank so much later: ranks that are
            killed do not take the others with them.
        prefix: A command that runs mpiexec.
        mpiexec_options: Further options of mpiexec.

    Raises:
        AssertionError: ``check`` failed, or (whatever ``check`` says) the deadline passed; the
            message shows the command and both streams.
    """
    if "mpi4py.MPI" in sys.modules:
        raise RuntimeError("pytest's own process has imported mpi4py.MPI; only rank programs may")
    mpiexec = find_mpiexec()
    if mpiexec is None:
        raise FileNotFoundError("no mpiexec beside this Python or on PATH; pip install mpich")
    path = ROOT / "tests" / "ranks" / f"{program}.py"
    options, mpi_env = _open_mpi_needs(mpiexec)
    command = [*prefix, mpiexec, *options, *mpiexec_options, "-n", str(num_ranks)]
    if outlives_s:
        command += ["sh", "-c", f'"$@"; sleep {outlives_s}', "sh"]
    command += [sys.executable, "-m", "mpi4py", str(path), *map(str, args)]
    result = _run(command, _clean_environment() | mpi_env | dict(env or {}), timeout_s)
    if result.timed_out:
        raise AssertionError(str(result))
    if check and (result.returncode != 0 or result.ok_ranks() != list(range(num_ranks))):
        raise AssertionError(str(result))
    return result


def run_threads_of(
    program: str,
    num_ranks: int,
    *args: object,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> Result:
    """Run tests/ranks/<program>.py in one process, whose threads play ranks; as `run_ranks`.

    Args:
        program: File name in tests/ranks, without ``.py``.
        num_ranks: How many ranks print the success mark.
        *args: The program's arguments, each made a string.
        timeout_s: As for `run_ranks`.
        env: As for `run_ranks`.

    Raises:
        AssertionError: The program failed, a mark is missing, or the deadline passed.
    """
    path = ROOT / "tests" / "ranks" / f"{program}.py"
    command = [sys.executable, str(path), *map(str, args)]
    result = _run(command, _clean_environment() | dict(env or {}), timeout_s)
    ends_well = not result.timed_out and result.returncode == 0
    if not ends_well or result.ok_ranks() != list(range(num_ranks)):
        raise AssertionError(str(result))
    return result


def run_command(
    command: str, *, cwd: Path, timeout_s: float = 120.0, variables: Mapping[str, str] | None = None
) -> Result:
    """Run a command line as users would type it, with this Python's programs first on PATH.

    Args:
        command: The line. No shell sees it.
        cwd: Where to run it.
        timeout_s: As for `run_ranks`.
        variables: Those to set on top of the cleaned environment.

    Raises:
        AssertionError: The exit code is not 0, or the deadline passed; the message shows both
            streams.
    """
    words = shlex.split(command)
    options, env = [], _clean_environment()
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    if words[0] == "mpiexec" and (mpiexec := find_mpiexec()) is not None:
        options, mpi_env = _open_mpi_needs(mpiexec)
        env |= mpi_env
    env |= dict(variables or {})
    program = shutil.which(words[0], path=env["PATH"])
    if program is None:
        raise FileNotFoundError(f"no {words[0]} beside this Python or on PATH")
    result = _run([program, *options, *words[1:]], env, timeout_s, cwd)
    if result.timed_out or result.returncode != 0:
        raise AssertionError(str(result))
    return result


def _clean_environment() -> dict[str, str]:
    # Open MPI's own settings stay: a machine may need them to start anything.
    env = {
        name: value
        for name, value in os.environ.items()
        if _SETTINGS.match(name) or not _CLEANED.match(name)
    }
    env["PYTHONPATH"] = str(ROOT)
    env["PYTHONFAULTHANDLER"] = "1"
    env["OMP_NUM_THREADS"] = "1"
    # Machines with GPUs and without do the same, but for programs that name an engine.
    env["EPCOMM_ENGINE"] = "host"
    return env


@cache
def _open_mpi_needs(mpiexec: str) -> tuple[list[str], dict[str, str]]:
    """Return the options and variables with which Open MPI runs as root and on few cores."""
    version = subprocess.run(
        [mpiexec, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=_clean_environment(),
        timeout=60,
    ).stdout
    release = re.search(r"Open(?:RTE| MPI)\)? (\d+)", version)
    if release is None:
        return [], {}
    if int(release[1]) < 5:
        return ["--allow-run-as-root", "--oversubscribe"], {}
    return [], {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def _run(
    command: list[str], env: dict[str, str], timeout_s: float, cwd: Path | None = None
) -> Result:
    launch_id = uuid.uuid4().hex
    shm_before = _mpi_shm_files()
    start = time.monotonic()
    # Files, not pipes: a stray process that holds a pipe open would keep the reader waiting.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=env | {_LAUNCH_ID: launch_id},
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            _show_stacks(launch_id)
        finally:
            _end(process, launch_id)
            if timed_out or process.returncode != 0:
                _remove_unused(_mpi_shm_files() - shm_before)
        streams = []
        for stream in (stdout, stderr):
            stream.seek(0)
            streams.append(stream.read())
    wall_s = time.monotonic() - start
    return Result(shlex.join(command), process.returncode, *streams, timed_out, wall_s)


def _show_stacks(launch_id: str) -> None:
    """Abort the launch's Python processes; faulthandler prints where their threads stood."""
    this_python = os.path.realpath(sys.executable)
    for pid in _processes(launch_id):
        if _executable(pid) == this_python:
            _signal(pid, signal.SIGABRT)
    deadline = time.monotonic() + _GRACE_S
    while _processes(launch_id) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes], launch_id: str) -> None:
    """End everything of this launch that still runs; mpiexec gets the chance to tidy up first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # NOTE: MPI's launchers give each rank a process group, MPICH even a session, of its own:
    # killing mpiexec's group would miss them.
    for _ in range(100):
        strays = _processes(launch_id)
        if not strays:
            return
        for pid in strays:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.02)


def _processes(launch_id: str) -> list[int]:
    """Return the processes that carry this launch's id in their environment (Linux; else none)."""
    mark = f"{_LAUNCH_ID}={launch_id}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def _executable(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _mpi_shm_files() -> set[Path]:
    """Return the shared memory files of MPICH and Open MPI, which ranks that are killed leave."""
    return {
        path
        for pattern in ("mpich_shm_*", "sm_segment.*", "vader_segment.*")
        for path in Path("/dev/shm").glob(pattern)
    }


def _remove_unused(files: set[Path]) -> None:
    """Remove the files that no process has open or mapped: a small /dev/shm would fill up."""
    used = set()
    # NOTE: descriptors first. A launch beside this one opens, maps and closes its own files.
    for path in Path("/proc").glob("[0-9]*/fd/*") if files else ():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            used.add(os.readlink(path))
    for path in Path("/proc").glob("[0-9]*/maps") if files else ():
        with contextlib.suppress(OSError):
            lines = path.read_text().splitlines()
            used.update(line.split(maxsplit=5)[-1] for line in lines)
    for file in files:
        if str(file) not in used:
            file.unlink(missing_ok=True)
