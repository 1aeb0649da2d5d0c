"""Runs rank programs as plain processes, without MPI: any of them can be killed by a test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch import ROOT
from ranks.fail_common import FOLDER, RANK, SIZE


class Processes:
    """Processes that play ranks; their group is `ranks.fail_common.folder_group`."""

    def __init__(self, folder: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
        self.folder = folder
        self.processes = processes

    def wait_for(self, name: str, timeout_s: float = 30.0) -> None:
        """Wait until a rank has made a file of this name in the folder."""
        wait_for(lambda: (self.folder / name).exists(), f"file {name}", timeout_s)

    def tell(self, name: str) -> None:
        """Make a file that ranks wait for."""
        (self.folder / name).touch()

    def kill(self, rank: int) -> None:
        """SIGKILL a rank, and return when it is gone."""
        self.processes[rank].kill()
        self.processes[rank].wait(10)

    def results(self, timeout_s: float = 30.0) -> list[str]:
        """Wait for all; return what each printed, "" for one that was killed."""
        printed = []
        for rank, process in enumerate(self.processes):
            stdout, stderr = process.communicate(timeout=timeout_s)
            assert process.returncode in (0, -9), f"rank {rank}:\n{stdout}\n{stderr}"
            printed.append(stdout if process.returncode == 0 else "")
        return printed


@contextmanager
def start(
    program: str,
    num_ranks: int,
    *args: object,
    folder: Path,
    env: Mapping[str, str] | None = None,
) -> Iterator[Processes]:
    """Start tests/ranks/<program>.py once a rank; all are ended at the end of the block.

    Args:
        program: File name in tests/ranks, without ``.py``.
        num_ranks: How many processes.
        *args: The program's arguments.
        folder: An empty folder for the group's messages.
        env: Variables to set.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EPCOMM_")}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    clean |= {FOLDER: str(folder), SIZE: str(num_ranks)} | dict(env or {})
    command = [sys.executable, str(ROOT / "tests" / "ranks" / f"{program}.py"), *map(str, args)]
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(num_ranks):
            processes.append(
                subprocess.Popen(
                    command,
                    env=clean | {RANK: str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield Processes(folder, processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(is_true: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait until something holds; fail when it does not in time."""
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)
